"""From a checked recipe and opened models to a plan, or to the one sentence that says why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from fusekit.checkpoint.dtypes import DType, dtype_named
from fusekit.checkpoint.folder import Checkpoint, open_checkpoint
from fusekit.checkpoint.layers import Layer, infer_layers
from fusekit.checkpoint.layout import DEFAULT_SHARD_BYTES, lay_out
from fusekit.checkpoint.source import TensorInfo, TensorSource
from fusekit.engine.plan import Kind, Plan, PlannedTensor, TensorRef
from fusekit.errors import CheckpointError, RecipeError, did_you_mean
from fusekit.methods.base import Granularity, Method, Tensor
from fusekit.methods.lines import scale_layers, schedule
from fusekit.methods.registry import find
from fusekit.recipe.parameters import Lookup, read_level
from fusekit.recipe.schema import ModelEntry, Recipe, load_recipe

Masks = Sequence[Mapping[str, Any] | None]
"""Per model, explicit keep masks by tensor name (flat arrays of 0 and 1)."""


@dataclass(frozen=True)
class Operands:
    """Which models a method gets, in its order, and what its base is."""

    entries: tuple[ModelEntry, ...]
    places: tuple[str, ...]
    base: str | None


def plan_recipe(recipe: Recipe, shard_bytes: int = DEFAULT_SHARD_BYTES) -> Plan:
    """Open the recipe's models and plan the merge. Reads headers only.

    Raises:
        RecipeError, CheckpointError: anything that would make the merge fail.
    """
    method = find(recipe.merge_method)
    operands = choose_operands(recipe, method)
    _read_levels(recipe, method)
    references = list(
        dict.fromkeys(
            [*([operands.base] if operands.base else []), *(e.model for e in operands.entries)]
        )
    )
    opened: list[Checkpoint] = []
    try:
        opened.extend(open_checkpoint(reference, recipe.folder) for reference in references)
        return plan_checkpoints(recipe, method, operands, opened, shard_bytes)
    except BaseException:
        for checkpoint in opened:
            checkpoint.source.close()
        raise


def choose_operands(recipe: Recipe, method: Method) -> Operands:
    """The method's operands among the recipe's models; refuses what the method cannot take."""
    listed = [(entry, f"models[{i}]") for i, entry in enumerate(recipe.models)]
    base = recipe.base_model
    if base is not None and method.base is None:
        raise RecipeError(
            f"base_model: found {base!r}, but {method.name} takes no base_model; remove it"
        )
    if method.base == "first" and base is not None:
        first = [pair for pair in listed if pair[0].model == base]
        others = [pair for pair in listed if pair[0].model != base]
        listed = (first or [(ModelEntry(model=base), "base_model")]) + others
        base = None
    elif method.base == "origin" and base is not None:
        if method.max_models is not None and any(e.model == base for e, _ in listed):
            raise RecipeError(
                f"base_model: {base!r} is also one of the models {method.name} is to merge; "
                "its task vector is zero"
            )
        listed = [pair for pair in listed if pair[0].model != base]
    if method.base_required and base is None:
        raise RecipeError(f"base_model is missing: {method.name} merges differences from it")
    _check_count(method, len(listed))
    return Operands(tuple(e for e, _ in listed), tuple(p for _, p in listed), base)


def _check_count(method: Method, count: int) -> None:
    most = method.max_models
    if count < method.min_models or (most is not None and count > most):
        few = method.min_models
        expected = (
            f"at least {few}" if most is None else f"{few}" if few == most else f"{few} to {most}"
        )
        raise RecipeError(
            f"models: {method.name} merges {expected} model(s) besides its base, found {count}"
            if method.base == "origin"
            else f"models: {method.name} merges {expected} model(s), found {count}"
        )


def _read_levels(recipe: Recipe, method: Method) -> tuple[Any, list[Any]]:
    """The checked global settings and those of every listed model."""
    top = read_level(recipe.parameters, method, "parameters")
    own = [
        read_level(entry.parameters, method, f"models[{i}].parameters")
        for i, entry in enumerate(recipe.models)
    ]
    return top, own


def plan_checkpoints(
    recipe: Recipe,
    method: Method,
    operands: Operands,
    checkpoints: Sequence[Checkpoint],
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    masks: Masks = (),
) -> Plan:
    """Plan a merge of models that are already open."""
    index = {checkpoint.reference: i for i, checkpoint in enumerate(checkpoints)}
    models = [index[entry.model] for entry in operands.entries]
    base = None if operands.base is None else index[operands.base]
    reference = models[0] if base is None else base
    infos = checkpoints[reference].source.tensors
    used = [*([] if base is None else [base]), *models]
    if method.missing == "refuse":
        for other in dict.fromkeys(used):
            _check_same_tensors(checkpoints[reference], checkpoints[other])
    sources = [checkpoints[i].source for i in used]
    kinds = {name: _kind(info, method, sources) for name, info in infos.items()}

    layers = infer_layers(infos)
    method = _with_layer_scaling(recipe, method, has_base=base is not None, layers=layers)
    groups = {name: _group(name, layers[name], recipe.granularity) for name in infos}
    sizes: dict[str, int] = {}
    for name, info in infos.items():
        if kinds[name] == "merge":
            sizes[groups[name]] = sizes.get(groups[name], 0) + info.size

    values = _ParameterValues(recipe, method, operands)
    planned = []
    for name, info in infos.items():
        merged = kinds[name] == "merge"
        parameters, model_parameters = values.of(name, layers[name]) if merged else ({}, ())
        tensor = Tensor(
            name=name,
            shape=info.shape,
            size=info.size,
            group_size=sizes.get(groups[name], 0),
            layer=layers[name],
            models=len(models),
            has_base=base is not None,
            parameters=parameters,
            model_parameters=model_parameters,
            keys=tuple(random_key(recipe.seed, i, name) for i in range(len(models))),
            masks=tuple(None if m is None else m.get(name) for m in masks),
            granularity=recipe.granularity,
        )
        holders = models[:1] if kinds[name] == "first" else models
        refs = tuple(_ref(checkpoints, source, name) for source in holders)
        base_ref = None if base is None else _ref(checkpoints, base, name)
        wide = recipe.dtype == "float64" or any(
            ref.dtype.name == "F64" for ref in (*refs, *([base_ref] if base_ref else []))
        )
        planned.append(
            PlannedTensor(
                tensor=tensor,
                dtype=_output_dtype(recipe, info) if _is_float(info) else info.dtype,
                models=refs,
                base=base_ref,
                method=method,
                group=groups[name],
                kind=kinds[name],
                compute="float64" if wide else "float32",
            )
        )
    layout = lay_out([TensorInfo(p.name, p.dtype, p.shape) for p in planned], shard_bytes)
    return Plan(
        tensors=tuple(planned),
        checkpoints=tuple(checkpoints),
        layout=layout,
        granularity=recipe.granularity,
        seed=recipe.seed,
        recipe=recipe.model_dump(mode="json", exclude_defaults=True),
        config_from=reference,
        warnings=_dropped(checkpoints[reference], sources),
        config_updates=_config_updates(recipe),
    )


def _with_layer_scaling(
    recipe: Recipe, method: Method, *, has_base: bool, layers: Mapping[str, Layer | None]
) -> Method:
    """The method, its update scaled by depth if the recipe asks for that."""
    asked = recipe.layer_scaling
    if asked is None:
        return method
    if not has_base:
        raise RecipeError(
            f"layer_scaling: scales what a merge changes of its base_model, and {method.name} has "
            "none here; use a method with a base, such as task_arithmetic"
        )
    outside = [(entry.filter, entry.value) for entry in asked.outside]
    options = asked.model_dump(exclude={"method", "outside"})
    return scale_layers(method, schedule(layers, outside=outside, **options))


def random_key(seed: int, model: int, tensor: str) -> int:
    """The 64-bit key of a model's random numbers for one tensor."""
    return int(xxhash.xxh3_64_intdigest(f"{seed}/{model}/{tensor}".encode()))


def _is_float(info: TensorInfo) -> bool:
    return info.dtype.is_float and info.size > 0


def _kind(info: TensorInfo, method: Method, sources: Sequence[TensorSource]) -> Kind:
    if method.missing == "first":
        found = [source.tensors.get(info.name) for source in sources]
        if not all(other is not None and other.shape == info.shape for other in found):
            return "first"
    if _is_float(info):
        return "merge"
    return "same" if method.integers == "equal" else "first"


def _dropped(reference: Checkpoint, sources: Sequence[TensorSource]) -> tuple[str, ...]:
    """A warning for tensors that the output leaves out because the first model has none."""
    names = {name for source in sources for name in source.tensors}
    extra = sorted(names - set(reference.source.tensors))
    if not extra:
        return ()
    return (
        f"{len(extra)} tensor(s) that {reference.reference} does not have are left out, "
        f"such as {extra[0]!r}",
    )


def _ref(checkpoints: Sequence[Checkpoint], source: int, name: str) -> TensorRef:
    return TensorRef(source, name, checkpoints[source].source.tensors[name].dtype)


def _group(name: str, layer: Layer | None, granularity: Granularity) -> str:
    if granularity == "model":
        return "model"
    if granularity == "module" and layer is not None:
        block = f"{layer.stack}.{layer.index}.".lstrip(".")
        return f"module:{block}{name.removeprefix(block).split('.')[0]}"
    if granularity == "layer" and layer is not None:
        return f"layer:{layer.stack}.{layer.index}"
    return f"tensor:{name}"


def _output_dtype(recipe: Recipe, info: TensorInfo) -> DType:
    wanted = recipe.out_dtype or recipe.dtype
    return dtype_named(wanted) if wanted else info.dtype


def _config_updates(recipe: Recipe) -> dict[str, Any]:
    wanted = recipe.out_dtype or recipe.dtype
    return {"dtype": wanted} if wanted else {}


def _check_same_tensors(reference: Checkpoint, other: Checkpoint) -> None:
    """Refuse models whose tensors differ in name, shape or kind from the reference's."""
    mine, theirs = reference.source.tensors, other.source.tensors
    for name, info in mine.items():
        found = theirs.get(name)
        if found is None:
            raise CheckpointError(
                f"{other.source.label}: tensor {name!r} of {reference.reference} is missing"
                f"{did_you_mean(name, theirs) if len(theirs) < 2000 else ''}"
            )
        if found.shape != info.shape:
            raise CheckpointError(
                f"{other.source.where(name)}: tensor {name!r} has shape {list(found.shape)}, "
                f"expected {list(info.shape)} as in {reference.source.where(name)}"
            )
        both_float = found.dtype.is_float and info.dtype.is_float
        if found.dtype != info.dtype and not both_float:
            raise CheckpointError(
                f"{other.source.where(name)}: tensor {name!r} is {found.dtype.torch_name}, "
                f"expected {info.dtype.torch_name} as in {reference.source.where(name)}"
            )
    if len(theirs) > len(mine):
        extra = next(name for name in theirs if name not in mine)
        raise CheckpointError(
            f"{other.source.where(extra)}: tensor {extra!r} is not in {reference.reference}; "
            "all models must hold the same tensors"
        )


class _ParameterValues:
    """Parameter values per tensor, computed once where they are the same everywhere."""

    def __init__(self, recipe: Recipe, method: Method, operands: Operands) -> None:
        top, own = _read_levels(recipe, method)
        by_place = {f"models[{i}]": level for i, level in enumerate(own)}
        self._shared = Lookup(method, [(top, "parameters")])
        self._models = [
            Lookup(method, [(by_place.get(place, {}), f"{place}.parameters"), (top, "parameters")])
            for place in operands.places
        ]
        self._whose = [
            f"{place} ({entry.model})"
            for place, entry in zip(operands.places, operands.entries, strict=True)
        ]
        self._constant = self._shared.is_constant(per_model=False) and all(
            lookup.is_constant(per_model=True) for lookup in self._models
        )
        self._once: tuple[dict[str, Any], tuple[dict[str, Any], ...]] | None = None

    def of(
        self, tensor: str, layer: Layer | None
    ) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
        if self._constant and self._once is not None:
            return self._once
        position = layer.position if layer is not None else 0.0
        shared = self._shared.values(
            per_model=False, tensor=tensor, position=position, whose="recipe"
        )
        each = tuple(
            lookup.values(per_model=True, tensor=tensor, position=position, whose=whose)
            for lookup, whose in zip(self._models, self._whose, strict=True)
        )
        self._once = shared, each
        return self._once


def plan(recipe: Any, *, out_shard_size: int = DEFAULT_SHARD_BYTES) -> Plan:
    """What a merge would do, from headers alone: `Plan.tensors`, `.layout`, bytes, memory.

    Args:
        recipe: path of a YAML recipe, a mapping, or a `Recipe`.
        out_shard_size: largest size of a weight file in bytes.

    Raises:
        RecipeError, CheckpointError: anything that would make the merge fail.

    Example:
        >>> import fusekit
        >>> fusekit.plan("recipe.yml").output_bytes  # doctest: +SKIP
    """
    return plan_recipe(load_recipe(recipe), out_shard_size)
