"""From a checked recipe and opened models to a plan, or to the one sentence that says why not."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import xxhash

from fusekit.adapters.recipe import merges_adapters
from fusekit.checkpoint.dtypes import DType, dtype_named
from fusekit.checkpoint.folder import Checkpoint, open_checkpoint
from fusekit.checkpoint.layers import Layer, infer_layers
from fusekit.checkpoint.layout import DEFAULT_SHARD_BYTES, lay_out, parse_size
from fusekit.checkpoint.source import TensorInfo
from fusekit.engine.adapter_tokenizer import carried_tokenizer
from fusekit.engine.chat_template import with_chat_template
from fusekit.engine.filters import idle_filters
from fusekit.engine.matching import Matched, Matcher, head_notes
from fusekit.engine.measurements import check_statistics
from fusekit.engine.operands import Operands, choose_operands
from fusekit.engine.output_config import output_config, part_configs, stack_notes
from fusekit.engine.plan import Kind, Plan, PlannedTensor
from fusekit.engine.rules import check_rules
from fusekit.engine.stages import planned_checkpoint
from fusekit.engine.tasks import side_file
from fusekit.engine.units import Structure, units
from fusekit.engine.values import ParameterValues
from fusekit.engine.vocabulary import Vocabulary, common_vocabulary
from fusekit.errors import CheckpointError, RecipeError
from fusekit.methods.base import Granularity, Method, Tensor
from fusekit.methods.lines import scale_layers, schedule
from fusekit.methods.registry import find
from fusekit.recipe.schema import Recipe, load_recipe

Masks = Sequence[Mapping[str, Any] | None]
"""Per model, explicit keep masks by tensor name (flat arrays of 0 and 1)."""


def plan_recipe(
    recipe: Recipe,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    *,
    stream: bool = False,
    stages: Mapping[str, Checkpoint] | None = None,
) -> Plan:
    """Open the recipe's models and plan the merge. Reads headers only.

    Args:
        recipe: what to merge.
        shard_bytes: largest size of a weight file.
        stream: read models of the hub by byte range, without storing them.
        stages: results of the other documents of a file, by name; planned here if not given.

    Raises:
        RecipeError, CheckpointError: anything that would make the merge fail.
    """
    with _collector_paused():
        return _plan_recipe(recipe, shard_bytes, stream, stages or {})


def _plan_recipe(
    recipe: Recipe, shard_bytes: int, stream: bool, stages: Mapping[str, Checkpoint]
) -> Plan:
    method = find(recipe.merge_method)
    operands = choose_operands(recipe, method)
    named = dict(stages)
    for stage in recipe.stages:
        if stage.name is not None and stage.name not in named:
            made = _plan_recipe(stage, shard_bytes, stream, named)
            named[stage.name] = planned_checkpoint(stage.name, made)
            made.close()
    opened: list[Checkpoint] = []
    try:
        opened.extend(
            open_checkpoint(model, recipe.folder, stream=stream, named=named)
            for model in operands.models()
        )
        for checkpoint in opened:
            if not checkpoint.source.tensors:
                raise CheckpointError(f"{checkpoint.source.label}: holds no tensors")
        return plan_checkpoints(recipe, method, operands, opened, shard_bytes)
    except BaseException:
        for checkpoint in opened:
            checkpoint.source.close()
        raise


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Without the cyclic collector, which would walk the growing plan again and again."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.freeze()  # takes what is new for old, which unfreezing leaves it:
            gc.unfreeze()  # the collector would else walk all of it at once
            gc.enable()


def plan_checkpoints(
    recipe: Recipe,
    method: Method,
    operands: Operands,
    checkpoints: Sequence[Checkpoint],
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    masks: Masks = (),
) -> Plan:
    """Plan a merge of models that are already open."""
    vocabulary = common_vocabulary(recipe, operands, checkpoints)
    opened = list(vocabulary.checkpoints)
    structures = {checkpoint.reference: Structure(checkpoint) for checkpoint in opened}
    wanted, stacks = units(operands, structures)
    matcher = Matcher(opened, method, recipe.missing)
    matched = [tensor for unit in wanted for tensor in matcher.match(unit)]

    layers = infer_layers(tensor.info.name for tensor in matched)
    has_base = matched[0].base is not None if matched else False
    method = _with_layer_scaling(recipe, method, has_base=has_base, layers=layers)
    groups = {
        tensor.info.name: _group(tensor.info.name, layers[tensor.info.name], recipe.granularity)
        for tensor in matched
    }
    sizes: dict[str, int] = {}
    for tensor in matched:
        if _kind(tensor, method) == "merge":
            group = groups[tensor.info.name]
            sizes[group] = sizes.get(group, 0) + tensor.info.size

    values = ParameterValues(method, recipe.folder)
    planned = [
        _planned(
            recipe,
            method,
            tensor,
            layers[tensor.info.name],
            groups[tensor.info.name],
            sizes,
            values,
            masks,
        )
        for tensor in matched
    ]
    check_rules(planned)
    reference = next(i for i, c in enumerate(opened) if c.reference == operands.reference)
    if recipe.tokenizer_source is None and recipe.tokenizer is None:
        written = [tensor.info for tensor in matched]
        files, notes = carried_tokenizer(opened, opened[reference], written)
        vocabulary = replace(vocabulary, files=files, notes=(*vocabulary.notes, *notes))
    made = Plan(
        tensors=tuple(planned),
        checkpoints=tuple(opened),
        layout=lay_out(
            [TensorInfo(p.name, p.dtype, p.shape) for p in planned],
            shard_bytes,
            *side_file(planned, opened),
            parts=opened[reference].parts(),
        ),
        granularity=recipe.granularity,
        seed=recipe.seed,
        recipe=recipe.model_dump(mode="json", exclude_defaults=True),
        config_from=reference,
        config=output_config(
            vocabulary.config,
            opened[reference],
            {checkpoint.reference: checkpoint for checkpoint in opened},
            dtype=recipe.out_dtype or recipe.dtype,
            stacks=stacks,
            tensors=[tensor.info for tensor in matched],
            heads=matcher.heads,
        ),
        files=_files(recipe, vocabulary, opened, opened[reference]),
        warnings=tuple(
            dict.fromkeys(
                [
                    *recipe.notes,
                    *operands.notes,
                    *vocabulary.notes,
                    *matcher.notes(),
                    *idle_filters(operands, opened, [tensor.info.name for tensor in matched]),
                    *head_notes(operands, opened, [tensor.info for tensor in matched]),
                    *stack_notes(stacks, structures),
                ]
            )
        ),
    )
    check_statistics(made)
    return made


def _files(
    recipe: Recipe,
    vocabulary: Vocabulary,
    checkpoints: Sequence[Checkpoint],
    reference: Checkpoint,
) -> dict[str, bytes | None]:
    """What differs from the files beside the reference's weights, config.json aside."""
    files = {**vocabulary.files, **part_configs(reference, recipe.out_dtype or recipe.dtype)}
    if recipe.chat_template is None:
        return files
    return with_chat_template(recipe.chat_template, checkpoints, reference, files)


def _planned(
    recipe: Recipe,
    method: Method,
    matched: Matched,
    layer: Layer | None,
    group: str,
    sizes: Mapping[str, int],
    values: ParameterValues,
    masks: Masks,
) -> PlannedTensor:
    info = matched.info
    kind = _kind(matched, method)
    shared, each = values.of(matched) if kind == "merge" else ({}, ())
    refs = matched.models if matched.base is None else (matched.base, *matched.models)
    wide = recipe.dtype == "float64" or any(ref.dtype.name == "F64" for ref in refs)
    return PlannedTensor(
        tensor=Tensor(
            name=info.name,
            shape=info.shape,
            size=info.size,
            group_size=sizes.get(group, 0),
            layer=layer,
            models=len(matched.models),
            has_base=matched.base is not None,
            parameters=shared,
            model_parameters=each,
            keys=tuple(random_key(recipe.seed, i, info.name) for i in matched.kept),
            masks=tuple(
                None if mask is None else mask.get(info.name)
                for mask in (masks[i] for i in matched.kept if masks)
            ),
            granularity=recipe.granularity,
        ),
        dtype=_output_dtype(recipe, info) if info.dtype.is_float and info.size else info.dtype,
        models=matched.models[:1] if kind == "first" else matched.models,
        base=matched.base,
        method=method,
        group=group,
        kind=kind,
        compute="float64" if wide else "float32",
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


def _kind(matched: Matched, method: Method) -> Kind:
    if matched.is_alone or not matched.models:
        return "first"
    if matched.info.dtype.is_float and matched.info.size > 0:
        return "merge"
    return "same" if method.integers == "equal" else "first"


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


def plan(
    recipe: Any, *, out_shard_size: int | str = DEFAULT_SHARD_BYTES, stream: bool = False
) -> Plan:
    """What a merge would do, from headers alone: `Plan.tensors`, `.layout`, bytes, memory.

    Args:
        recipe: path of a YAML recipe, a mapping, or a `Recipe`.
        out_shard_size: largest size of a weight file, in bytes or as a text such as `5GB`.
        stream: look at models of the hub where they are, without downloading them.

    Raises:
        RecipeError, CheckpointError: anything that would make the merge fail.

    Example:
        >>> import fusekit
        >>> fusekit.plan("recipe.yml").output_bytes  # doctest: +SKIP
    """
    loaded = load_recipe(recipe)
    if merges_adapters(loaded):
        raise RecipeError(
            "the recipe merges adapters, which fusekit.adapters.plan_adapters describes"
        )
    return plan_recipe(loaded, parse_size(out_shard_size), stream=stream)
