"""Continual merging: a checkpoint that further models can be added to, one at a time.

Beside the checkpoint lies `<out>.continual`, itself a checkpoint: the running update in float32,
whose manifest records which models it holds, in which order. It is published before the checkpoint
that is made from it, so a run that is interrupted in between only has that last step to repeat.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fusekit.checkpoint.folder import open_checkpoint
from fusekit.checkpoint.memory import MemorySource
from fusekit.checkpoint.source import TensorSource
from fusekit.checkpoint.writer import check_target
from fusekit.engine import run
from fusekit.engine.blocks import BLOCK_ELEMENTS, Workspace
from fusekit.engine.manifest import MANIFEST
from fusekit.errors import CheckpointError, FusekitError, RecipeError
from fusekit.methods.registry import find
from fusekit.recipe.parameters import read_level
from fusekit.recipe.schema import Recipe, load_recipe

Array = np.ndarray[Any, np.dtype[Any]]
Model = TypeVar("Model")

START, CONTINUE, FINISH = "opcm.start", "opcm.continue", "opcm.finish"

_NOT_FOR_WHOLE_MODELS = (
    "slices",
    "modules",
    "layer_scaling",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)


@dataclass(frozen=True)
class History:
    """What a running update holds: the base, the models in order, their task vectors' norms."""

    base: str
    models: tuple[str, ...]
    norms: tuple[float, ...]

    def to_json(self) -> str:
        return json.dumps({"count": len(self.models), **asdict(self)})

    def with_models(self, models: Sequence[str], norms: Sequence[float]) -> History:
        """The history after further models."""
        return replace(self, models=(*self.models, *models), norms=(*self.norms, *norms))


def state_folder(out: Path) -> Path:
    """Where the running update of a checkpoint lies."""
    return out.with_name(out.name + ".continual")


def merge(recipe: Recipe, out: Path, *, overwrite: bool = False, **options: Any) -> run.MergeReport:
    """Merge all models of a recipe in order, and keep what is needed to go on.

    Arguments as of `fusekit.merge`.
    """
    base, models = _models(recipe)
    check_target(out, overwrite)
    state = state_folder(out)
    check_target(state, overwrite)
    norms = _norms(base, models, options.get("stream", False))
    history = History(base, tuple(models), tuple(norms))
    content = _stage(recipe, START, [base, *models], history)
    first = run.merge(content, state, overwrite=overwrite, **options)
    return _added(first, _publish(recipe, out, history, overwrite=overwrite, **options))


def extend(recipe: Recipe, out: Path, **options: Any) -> run.MergeReport:
    """Add a recipe's models, one after another, to a checkpoint made by continual merging.

    Memory and time do not depend on how many models it holds already. A model that an interrupted
    run has added to the running update is not added again.

    Raises:
        FusekitError: `out` was not made by continual merging.
        RecipeError: another base_model.
    """
    base, models = _models(recipe)
    state = state_folder(out)
    history = read_history(state)
    stream = options.get("stream", False)
    if _identity(base, stream) != _identity(history.base, stream):
        raise RecipeError(
            f"base_model: found {base!r}, but {out} was merged on {history.base!r}; models are "
            "added on the same base"
        )
    pending = list(history.models[len(read_history(out).models) :])
    if pending != models[: len(pending)]:
        raise FusekitError(
            f"{state}: already holds {pending[0]!r}, which {out} does not yet; add it first "
            "with a recipe that lists it"
        )
    report: run.MergeReport | None = None
    for model in models[len(pending) :]:
        history = history.with_models([model], _norms(base, [model], stream))
        content = _stage(recipe, CONTINUE, [str(state), base, model], history)
        step = run.merge(content, state, overwrite=True, **options)
        report = step if report is None else _added(report, step)
    last = _publish(recipe, out, history, overwrite=True, **options)
    return last if report is None else _added(report, last)


def merge_arrays(
    models: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any],
    parameters: Mapping[str, Any],
    *,
    seed: int = 0,
    out_dtype: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """As `merge`, of state dicts in memory and without keeping the update."""
    models = _ordered(models, _order(parameters), seed)
    update = run.merge_state_dicts(
        [base, *models],
        method=START,
        parameters={**parameters, "history": ""},
        out_dtype="float32",
        **options,
    )
    origin = MemorySource(base)
    norms = [difference_norm(MemorySource(model), origin) for model in models]
    return run.merge_state_dicts(
        [base, update],
        method=FINISH,
        parameters={"scale": _scale(norms, MemorySource(update)), "history": ""},
        out_dtype=out_dtype,
    )


def read_history(folder: Path) -> History:
    """What a running update or a checkpoint made from it holds, by its manifest.

    Raises:
        FusekitError: the folder does not come from continual merging.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        content = json.loads(manifest["recipe"]["parameters"]["history"])
        return History(content["base"], tuple(content["models"]), tuple(content["norms"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise FusekitError(
            f"{folder}: not made by continual merging; begin with merge_method: opcm, and keep "
            "the folder that ends in .continual beside its checkpoint"
        ) from None


def difference_norm(source: TensorSource, origin: TensorSource | None = None) -> float:
    """L2 norm over all floating-point tensors of a model, or of its difference from another.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    space, total = Workspace(BLOCK_ELEMENTS), 0.0
    for name, info in source.tensors.items():
        if not info.dtype.is_float:
            continue
        if origin is not None and (
            name not in origin.tensors or origin.tensors[name].shape != info.shape
        ):
            raise CheckpointError(
                f"{source.where(name)}: tensor {name!r} has no counterpart of shape "
                f"{list(info.shape)} in {origin.label}"
            )
        for start in range(0, info.size, BLOCK_ELEMENTS):
            stop = min(start + BLOCK_ELEMENTS, info.size)
            row = _read(space, source, name, start, stop, "row").astype(np.float64)
            if origin is not None:
                row -= _read(space, origin, name, start, stop, "origin")
            total += float(np.dot(row, row))
    return math.sqrt(total)


def _read(
    space: Workspace, source: TensorSource, name: str, start: int, stop: int, place: str
) -> Array:
    dtype = source.tensors[name].dtype
    raw = space.scratch("raw", ((stop - start) * dtype.itemsize,), np.uint8)
    space.read(source, name, start, stop, raw)
    wide = np.float64 if dtype.name == "F64" else np.float32
    row = space.scratch(place, (stop - start,), wide)
    space.decode(raw, dtype, row)
    return row


def _scale(norms: Sequence[float], update: TensorSource) -> float:
    """mean_i ||tau_i|| / ||N||, or 0 where nothing has changed."""
    norm = difference_norm(update)
    return sum(norms) / len(norms) / norm if norm > 0 else 0.0


def _models(recipe: Recipe) -> tuple[str, list[str]]:
    """The base and the models, of a recipe as simple as continual merging needs it."""
    order = _checked_order(recipe)
    for key in _NOT_FOR_WHOLE_MODELS:
        if getattr(recipe, key) is not None:
            raise RecipeError(f"{key}: {recipe.merge_method} adds whole models; remove it")
    if recipe.missing != "error":
        raise RecipeError(
            f"missing: found {recipe.missing!r}, but {recipe.merge_method} adds whole models; "
            "remove it"
        )
    if recipe.stages:
        raise RecipeError(
            f"{recipe.merge_method} takes a recipe of one document; merge the others first"
        )
    if recipe.base_model is None:
        raise RecipeError(
            f"base_model is missing: {recipe.merge_method} merges differences from it"
        )
    base = _located(recipe.base_model, recipe.folder)
    models = [_located(entry.model, recipe.folder) for entry in recipe.models or []]
    chosen = [model for model in models if model != base]
    if not chosen:
        raise RecipeError(f"models: {recipe.merge_method} found none beside the base, expected one")
    return base, _ordered(chosen, order, recipe.seed)


def _checked_order(recipe: Recipe) -> str:
    """The order of arrival; refuses parameters by the names that the method has for users."""
    method = find(recipe.merge_method)
    order = _order(recipe.parameters)
    for i, entry in enumerate(recipe.models or ()):
        place = f"models[{i}].parameters"
        for name in read_level(entry.parameters, method, place):
            raise RecipeError(f"{place}.{name}: belongs to the whole merge, under parameters")
    return order


def _order(parameters: Mapping[str, Any]) -> str:
    level = read_level(parameters, find("opcm"), "parameters")
    if "order" not in level:
        return "given"
    if not level["order"].is_constant:
        raise RecipeError("parameters.order: holds for the whole merge, expected a single value")
    order: str = level["order"].value("", 0.0)[1]
    return order


def _ordered(models: Sequence[Model], order: str, seed: int) -> list[Model]:
    if order == "given":
        return list(models)
    shuffled = np.random.Generator(np.random.Philox(seed)).permutation(len(models))
    return [models[i] for i in shuffled]


def _located(reference: str, folder: Path | None) -> str:
    """A reference, such as `model+adapter`, that means the same from anywhere: absolute paths."""
    return "+".join(_absolute(part, folder) for part in reference.split("+"))


def _absolute(part: str, folder: Path | None) -> str:
    for path in (Path(part), *([folder / part] if folder else [])):
        if path.exists():
            return str(path.resolve())
    return part


def _norms(base: str, models: Sequence[str], stream: bool) -> list[float]:
    """The norms of the models' task vectors."""
    with contextlib.ExitStack() as stack:
        origin, *sources = [
            open_checkpoint(reference, stream=stream).source for reference in (base, *models)
        ]
        for source in (origin, *sources):
            stack.callback(source.close)
        return [difference_norm(source, origin) for source in sources]


def _identity(reference: str, stream: bool) -> Any:
    source = open_checkpoint(reference, stream=stream).source
    try:
        return source.identity()
    finally:
        source.close()


def _stage(recipe: Recipe, method: str, models: Sequence[str], history: History) -> Recipe:
    """The recipe of a step on the running update."""
    return load_recipe(
        {
            "merge_method": method,
            "models": [{"model": model} for model in models],
            "parameters": {**recipe.parameters, "history": history.to_json()},
            "out_dtype": "float32",
        }
    )


def _publish(recipe: Recipe, out: Path, history: History, **options: Any) -> run.MergeReport:
    """The checkpoint of a running update: base + scale * N."""
    state = state_folder(out)
    update = open_checkpoint(str(state)).source
    try:
        scale = _scale(history.norms, update)
    finally:
        update.close()
    content = {
        "merge_method": FINISH,
        "models": [{"model": history.base}, {"model": str(state)}],
        "parameters": {"scale": scale, "history": history.to_json()},
        "dtype": recipe.dtype,
        "out_dtype": recipe.out_dtype,
    }
    options.pop("device", None)
    return run.merge(load_recipe(content), out, **options)


def _added(first: run.MergeReport, last: run.MergeReport) -> run.MergeReport:
    """Two steps' reports as one, about the output of the last."""
    return replace(
        last,
        bytes_read=first.bytes_read + last.bytes_read,
        bytes_written=first.bytes_written + last.bytes_written,
        seconds=first.seconds + last.seconds,
        cpu_seconds=first.cpu_seconds + last.cpu_seconds,
        nonfinite=first.nonfinite,
        warnings=(*first.warnings, *last.warnings),
    )
