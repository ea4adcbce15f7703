"""Merging from a recipe to a finished folder, and merging state dicts in memory."""

from __future__ import annotations

import contextlib
import functools
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusekit.adapters.recipe import merge_recipe as merge_adapter_recipe
from fusekit.adapters.recipe import merges_adapters
from fusekit.checkpoint.folder import Checkpoint, open_checkpoint
from fusekit.checkpoint.layout import DEFAULT_SHARD_BYTES, parse_size
from fusekit.checkpoint.memory import MemorySource, array_bytes, is_torch, to_torch
from fusekit.checkpoint.safetensors import SafetensorsFile
from fusekit.checkpoint.writer import CheckpointWriter, PartialFolder, check_target
from fusekit.engine.companions import as_json, companions
from fusekit.engine.executor import (
    Execution,
    NonFinite,
    available_cpus,
    check_threads,
    with_tensors,
)
from fusekit.engine.journal import JOURNAL, Journal, damaged_tensors, finished_tensors, inputs
from fusekit.engine.manifest import MANIFEST, manifest
from fusekit.engine.matrices import check_device, execute
from fusekit.engine.model_card import CARD, model_card
from fusekit.engine.operands import choose_operands
from fusekit.engine.plan import Plan
from fusekit.engine.planner import plan_checkpoints, plan_recipe
from fusekit.engine.remote_output import merge_to_url
from fusekit.engine.stages import is_made, stages_folder
from fusekit.errors import FusekitError, RecipeError
from fusekit.memory import peak_memory
from fusekit.methods.base import Granularity
from fusekit.methods.registry import available, find
from fusekit.progress import Progress
from fusekit.recipe.schema import Recipe, load_recipe

SYNC_SECONDS = 5.0
"""How often finished tensors are forced to the disk and noted in the journal."""

_DAMAGED = "merged again what an interrupted run had finished, as the bytes had changed since"


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: bytes are those of tensors, times in seconds, memory in bytes."""

    out: Path | str
    tensors: int
    resumed: int
    bytes_read: int
    bytes_written: int
    seconds: float
    cpu_seconds: float
    peak_rss: int
    nonfinite: tuple[NonFinite, ...] = ()
    overflows: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def merge(
    recipe: Any,
    out: str | Path | None = None,
    *,
    into: str | Path | None = None,
    threads: int | None = None,
    device: str = "cpu",
    out_shard_size: int | str = DEFAULT_SHARD_BYTES,
    resume: bool = True,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_compile: Callable[[], None] | None = None,
    on_upload: Callable[[str], None] | None = None,
    work: str | Path | None = None,
    stream: bool = False,
) -> MergeReport:
    """Merge models into a new checkpoint folder, or adapters into a new adapter folder.

    Results that other documents of the recipe are made from go to `<out>.stages` and are kept. A
    recipe whose models are LoRA adapters gives an adapter, in one weight file.

    Where `out` is a URL the output is made in a working folder on this machine, which needs room
    for it, and then uploaded: the weights first and `manifest.json` last. Object stores have no
    rename, so the manifest is the sign that an output is complete.

    Args:
        recipe: path of a YAML recipe, a mapping, or a `Recipe`.
        out: the folder to create. Until it is complete it is called `<out>.partial`. Or a URL as a
            string (`s3://bucket/model`), of any file system of fsspec that can be written to.
        into: instead of `out`, a checkpoint made by continual merging that the recipe's models are
            added to.
        threads: worker threads; default all processors. Does not change the result of methods that
            merge in blocks.
        device: where methods that merge whole matrices compute: `cpu`, `cuda`, `cuda:1`.
        out_shard_size: largest size of a weight file, in bytes or as a text such as `5GB` (a larger
            tensor gets its own file).
        resume: continue a merge that was interrupted; False starts over.
        overwrite: replace `out` if it exists, once the merge is complete.
        allow_nonfinite: let NaN and Inf through and report them, instead of refusing them.
        on_progress: called a few times a second from the calling thread, or after every module of
            adapters.
        on_compile: called once if kernels must be compiled, which only the first use needs.
        on_upload: called with the name of every file before it is sent to a URL.
        work: the working folder of an output to a URL; default one in the user's cache folder.
        stream: read models of the hub by byte range, without storing them.

    Returns:
        What was read, written and found.

    Raises:
        RecipeError, CheckpointError, FusekitError: bad input, before anything is written; or NaN
            and Inf in a tensor, unreadable files, a full disk while writing.

    Example:
        >>> import fusekit
        >>> fusekit.merge("recipe.yml", "merged")  # doctest: +SKIP
    """
    loaded = load_recipe(recipe)
    if merges_adapters(loaded):
        _refuse_for_adapters(into=into, device=device, allow_nonfinite=allow_nonfinite)
    options: dict[str, Any] = {
        "threads": threads,
        "device": device,
        "out_shard_size": parse_size(out_shard_size),
        "resume": resume,
        "allow_nonfinite": allow_nonfinite,
        "on_progress": on_progress,
        "on_compile": on_compile,
        "stream": stream,
    }
    if isinstance(out, str) and "://" in out and not out.startswith("file://"):
        if into is not None or find(loaded.merge_method).continual:
            raise FusekitError(
                f"{out}: continual merging keeps its update beside the output, expected a folder "
                "on this machine"
            )
        return merge_to_url(
            functools.partial(_merge_locally, loaded, overwrite=True, reuse=resume, **options),
            out,
            work=None if work is None else Path(work).resolve(),
            resume=resume,
            overwrite=overwrite,
            on_upload=on_upload,
        )
    if work is not None:
        raise FusekitError("work: only outputs to a URL have a working folder; leave it out")
    if into is not None or (not merges_adapters(loaded) and find(loaded.merge_method).continual):
        return _merge_continually(loaded, out, into, overwrite, options)
    return _merge_locally(loaded, _target(out), overwrite=overwrite, **options)


def _merge_locally(
    recipe: Recipe,
    target: Path,
    *,
    overwrite: bool,
    reuse: bool = False,
    threads: int | None,
    out_shard_size: int,
    stream: bool,
    **options: Any,
) -> MergeReport:
    """Merge into a folder on this machine; with `reuse`, keep it if it is what would be made."""
    if merges_adapters(recipe):
        chosen = {name: options[name] for name in ("resume", "on_progress")}
        return merge_adapter_recipe(recipe, target, threads=threads, overwrite=overwrite, **chosen)
    check_target(target, overwrite)

    def run(plan: Plan, folder: Path, overwrite: bool = True) -> MergeReport:
        return run_plan(plan, folder, threads=threads, overwrite=overwrite, **options)

    planned = functools.partial(plan_recipe, shard_bytes=out_shard_size, stream=stream)
    stages = _make_stages(recipe, stages_folder(target), planned, run) if recipe.stages else {}
    with contextlib.closing(planned(recipe, stages=stages)) as plan:
        if overwrite and recipe.merge_method in available():  # no step of continual merging
            _refuse_inputs_in(target, plan)
        if reuse and is_made(target, plan):
            return MergeReport(
                out=target,
                tensors=len(plan.tensors),
                resumed=len(plan.tensors),
                bytes_read=0,
                bytes_written=0,
                seconds=0.0,
                cpu_seconds=0.0,
                peak_rss=peak_memory(),
                warnings=plan.warnings,
            )
        return run(plan, target, overwrite)


def _target(out: str | Path | None) -> Path:
    if out is None or out == "":
        raise FusekitError("out is missing: the folder to create")
    path = Path(out.removeprefix("file://") if isinstance(out, str) else out)
    return path.expanduser().resolve()


def _refuse_inputs_in(target: Path, plan: Plan) -> None:
    for _, identity in inputs(plan):
        for path in _paths(identity):
            if Path(path).is_relative_to(target):
                raise FusekitError(
                    f"{target}: holds {path}, which this merge reads; choose another output"
                )


def _paths(identity: Any) -> Iterator[str]:
    """Every file in an input's identity, whatever the input is made of."""
    if isinstance(identity, Mapping):
        if isinstance(identity.get("path"), str):
            yield identity["path"]
        identity = list(identity.values())
    if isinstance(identity, list):
        for part in identity:
            yield from _paths(part)


def _refuse_for_adapters(into: str | Path | None, device: str, allow_nonfinite: bool) -> None:
    if into is not None:
        raise FusekitError("into: adapters are merged into a new folder, expected out")
    if device != "cpu":
        raise FusekitError(f"device: found {device!r}, but adapters are merged on the cpu")
    if allow_nonfinite:
        raise FusekitError("allow_nonfinite: NaN and Inf in adapters are always refused")


def _make_stages(
    recipe: Recipe,
    folder: Path,
    planned: Callable[..., Plan],
    run: Callable[..., MergeReport],
) -> dict[str, Checkpoint]:
    """The results that a recipe's other documents ask for, by name; those that exist are reused."""
    planned(recipe).close()  # nothing is made before everything is known to work
    made: dict[str, Checkpoint] = {}
    for stage in recipe.stages:
        assert stage.name is not None
        with contextlib.closing(planned(stage, stages=made)) as plan:
            if not is_made(folder / stage.name, plan):
                run(plan, folder / stage.name)
        made[stage.name] = open_checkpoint(str(folder / stage.name))
    return made


def _merge_continually(
    recipe: Recipe,
    out: str | Path | None,
    into: str | Path | None,
    overwrite: bool,
    options: dict[str, Any],
) -> MergeReport:
    from fusekit.engine import continual

    if (out is None) == (into is None):
        raise FusekitError("expected either the folder to create (out) or to add to (into)")
    if not find(recipe.merge_method).continual:
        raise RecipeError(
            f"merge_method: {recipe.merge_method!r} cannot add to a checkpoint, expected 'opcm'"
        )
    if into is not None:
        return continual.extend(recipe, _target(into), **options)
    return continual.merge(recipe, _target(out), overwrite=overwrite, **options)


def run_plan(
    plan: Plan,
    target: Path,
    *,
    threads: int | None = None,
    device: str = "cpu",
    resume: bool = True,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_compile: Callable[[], None] | None = None,
) -> MergeReport:
    """Carry out a plan into a new folder; arguments as of `merge`."""
    begun, cpu = time.monotonic(), time.process_time()
    check_threads(threads)
    check_device(plan, device)
    writer, journal, remarks = _open_output(plan, target, resume, overwrite, threads)
    resumed = len(journal.checksums)
    try:
        with _noticing_compilation(on_compile):
            execution = _execute(
                plan, writer, journal, threads, device, allow_nonfinite, on_progress
            )
        _check_inputs_unchanged(plan, writer.folder)
        _finish(plan, writer, journal)
    finally:
        journal.close()
        writer.close()
    return MergeReport(
        out=target,
        tensors=len(plan.tensors),
        resumed=resumed,
        bytes_read=execution.bytes_read,
        bytes_written=execution.bytes_written,
        seconds=time.monotonic() - begun,
        cpu_seconds=time.process_time() - cpu,
        peak_rss=peak_memory(),
        nonfinite=tuple(execution.nonfinite),
        overflows=execution.overflows,
        warnings=(*plan.warnings, *remarks, *execution.remarks),
    )


def _open_output(
    plan: Plan, target: Path, resume: bool, overwrite: bool, threads: int | None
) -> tuple[CheckpointWriter, Journal, tuple[str, ...]]:
    """The output's files, what of it is finished, and what to say of that."""
    partial = PartialFolder(target, overwrite=overwrite)
    try:
        finished = finished_tensors(partial.path, plan) if resume else {}
    except BaseException:
        partial.close()
        raise
    writer = CheckpointWriter(partial, plan.layout, keep=bool(finished))
    try:
        damaged = damaged_tensors(writer, plan, finished, threads or available_cpus())
        for name in damaged:
            del finished[name]
        remarks = with_tensors((_DAMAGED, name) for name in damaged)
        return writer, Journal(writer, plan, finished), remarks
    except BaseException:
        writer.close()
        raise


class _FileSink:
    def __init__(self, writer: CheckpointWriter, journal: Journal) -> None:
        self.write = writer.write
        self.finished = journal.finished


def _execute(
    plan: Plan,
    writer: CheckpointWriter,
    journal: Journal,
    threads: int | None,
    device: str,
    allow_nonfinite: bool,
    on_progress: Callable[[Progress], None] | None,
) -> Execution:
    begun = synced = time.monotonic()
    already = sum(p.size * p.dtype.itemsize for p in plan.tensors if p.name in journal.checksums)
    total = sum(p.size * p.dtype.itemsize for p in plan.tensors)

    def progress(written: int) -> None:
        nonlocal synced
        now = time.monotonic()
        if now - synced > SYNC_SECONDS:
            journal.sync()
            synced = now
        if on_progress is not None:
            on_progress(Progress(already + written, total, now - begun))

    try:
        return execute(
            plan,
            _FileSink(writer, journal),
            threads=threads,
            device=device,
            allow_nonfinite=allow_nonfinite,
            written=frozenset(journal.checksums),
            on_progress=progress,
        )
    except BaseException:
        journal.sync()
        raise


def _check_inputs_unchanged(plan: Plan, folder: Path) -> None:
    before = json.loads((folder / JOURNAL).open(encoding="utf-8").readline())["inputs"]
    for old, (label, identity) in zip(before, inputs(plan), strict=True):
        if old != json.loads(json.dumps(identity)):
            raise FusekitError(
                f"{label}: changed while it was being read; the unfinished output is in "
                f"{folder}, start over with --no-resume"
            )


def _finish(plan: Plan, writer: CheckpointWriter, journal: Journal) -> None:
    """Everything beside the weights, then the rename that makes the output exist."""
    files = companions(plan)
    files |= {name: index.encode() for name, index in plan.layout.indexes().items()}
    for name, content in files.items():
        writer.add_file(name, content)
    writer.add_file(CARD, model_card(plan).encode(errors="backslashreplace"))
    with contextlib.ExitStack() as stack:
        side = None
        if plan.layout.side is not None:
            side = SafetensorsFile(writer.folder / plan.layout.side.file_name)
            stack.callback(side.close)
        writer.add_file(MANIFEST, as_json(manifest(plan, journal.checksums, files, side)))
    journal.sync()
    writer.discard_file(JOURNAL)
    writer.publish()


def value_remarks(nonfinite: Iterable[NonFinite], overflows: Mapping[str, int]) -> list[str]:
    """What to tell of values that were let through, or are beyond the output's type."""
    return [
        f"{found.model}: tensor {found.tensor!r} has {found.count} NaN or infinite values"
        for found in nonfinite
    ] + [
        f"tensor {tensor!r}: {count} merged values are beyond the range of its dtype"
        for tensor, count in overflows.items()
    ]


@contextlib.contextmanager
def _noticing_compilation(callback: Callable[[], None] | None) -> Iterator[None]:
    """Call back once if a kernel is compiled rather than loaded from the cache."""
    from numba.core import event

    class Listener(event.Listener):
        told = False

        def on_start(self, _event: Any) -> None:
            if callback is not None and not self.told:
                self.told = True
                callback()

        def on_end(self, _event: Any) -> None:
            """Nothing to do: only the beginning is announced."""

    listener = Listener()
    event.register("numba:compile", listener)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        event.unregister("numba:compile", listener)  # type: ignore[no-untyped-call]


class _MemorySink:
    """Merged tensors as NumPy arrays; what a method writes beside them is left to folders."""

    def __init__(self, plan: Plan) -> None:
        self.arrays = {
            planned.name: np.empty(planned.shape, planned.dtype.numpy) for planned in plan.tensors
        }
        self._bytes = {
            name: array.reshape(-1).view(np.uint8).data for name, array in self.arrays.items()
        }

    def write(self, name: str, offset: int, data: memoryview) -> None:
        if name in self._bytes:
            self._bytes[name][offset : offset + len(data)] = data

    def finished(self, name: str, checksum: str) -> None:
        """Nothing to do: the array is the result."""


def merge_state_dicts(
    models: Sequence[Mapping[str, Any]],
    *,
    method: str,
    base: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
    model_parameters: Sequence[Mapping[str, Any] | None] | None = None,
    granularity: Granularity = "tensor",
    layer_scaling: Mapping[str, Any] | None = None,
    seed: int = 0,
    out_dtype: str | None = None,
    masks: Sequence[Mapping[str, Any] | None] | None = None,
    threads: int | None = None,
    device: str = "cpu",
    allow_nonfinite: bool = False,
) -> dict[str, Any]:
    """Merge state dicts in memory, with the kernels and the result of the file path.

    Args:
        models: one `{name: array}` per model; NumPy arrays (ml_dtypes allowed) or torch tensors,
            all with the same names and shapes.
        method: a name from `fusekit.methods.available()`.
        base: the common ancestor (task-vector methods), or the first of the models (SLERP).
        parameters: global parameters: scalars, gradients or filter lists, as in a recipe.
        model_parameters: one mapping (or None) per model.
        granularity: over what summaries are taken: `tensor`, `module` (the tensors of one submodule
            of a layer), `layer` or `model`.
        layer_scaling: scale the update by depth, as in a recipe: `{"alpha": 0.3, "beta": 0.7}`.
        seed: of random methods.
        out_dtype: element type of the result, such as `bfloat16`; default the base's (or first's).
        masks: explicit keep masks per model for random methods (0 or 1, the tensors' shapes).
        threads: worker threads; does not change the result of methods that merge in blocks.
        device: where methods that merge whole matrices compute.
        allow_nonfinite: let NaN and Inf through instead of refusing them.

    Warns:
        UserWarning: what the method has to say of the models, such as a task that is lost; values
            beyond the range of the result's type; NaN and Inf that were let through.

    Returns:
        The merged `{name: array}`, arrays of the kind of the inputs.

    Raises:
        RecipeError, CheckpointError: unknown method or parameter, values out of range, tensors that
            do not match.

    Example:
        >>> import numpy as np, fusekit
        >>> a, b = {"w": np.zeros(2, "f4")}, {"w": np.ones(2, "f4")}
        >>> fusekit.merge_state_dicts([a, b], method="linear", parameters={"weight": 1.0})
        {'w': array([0.5, 0.5], dtype=float32)}
    """
    models = _state_dicts(models)
    check_threads(threads)
    if base is not None:
        _check_mapping("base", base)
    _check_mapping("parameters", parameters or {})
    each = [own or {} for own in model_parameters or []] or [{} for _ in models]
    for i, own in enumerate(each):
        _check_mapping(f"model_parameters[{i}]", own)
    if len(each) != len(models):
        raise FusekitError(
            f"model_parameters: found {len(each)} mappings, expected one for each of the "
            f"{len(models)} models"
        )
    if find(method).continual and base is not None:
        from fusekit.engine.continual import merge_arrays

        given = {"layer_scaling": layer_scaling, "masks": masks}
        given["model_parameters"] = next(filter(None, each), None)
        for name, value in given.items():
            if value is not None:
                raise FusekitError(f"{name}: {method} adds whole models, one by one; leave it out")
        own = {"threads": threads, "device": device, "allow_nonfinite": allow_nonfinite}
        return merge_arrays(models, base, parameters or {}, seed=seed, out_dtype=out_dtype, **own)
    is_model = any(arrays is base for arrays in models)
    if base is not None and not is_model and find(method).base is None:
        raise RecipeError(f"base: {method} has none; leave it out, or list it among the models")
    labels = ["base" if arrays is base else f"model {i}" for i, arrays in enumerate(models)]
    content: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": label, "parameters": dict(own)}
            for label, own in zip(labels, each, strict=True)
        ],
        "parameters": dict(parameters or {}),
        "granularity": granularity,
        "seed": seed,
    }
    if base is not None:
        content["base_model"] = "base"
    if layer_scaling is not None:
        content["layer_scaling"] = dict(layer_scaling)
    if out_dtype is not None:
        content["out_dtype"] = out_dtype
    recipe: Recipe = load_recipe(content)
    merging = find(recipe.merge_method)
    operands = choose_operands(recipe, merging)
    checkpoints = [Checkpoint("base", MemorySource(base, "base"))] if base is not None else []
    checkpoints += [
        Checkpoint(label, MemorySource(arrays, label))
        for label, arrays in zip(labels, models, strict=True)
        if arrays is not base
    ]
    plan = plan_checkpoints(
        recipe, merging, operands, checkpoints, masks=_flat_masks(masks, models)
    )
    sink = _MemorySink(plan)
    done = execute(plan, sink, threads=threads, device=device, allow_nonfinite=allow_nonfinite)
    told = (*plan.warnings, *done.remarks, *value_remarks(done.nonfinite, done.overflows))
    for remark in told:
        warnings.warn(remark, stacklevel=2)
    if any(is_torch(arrays) for arrays in models):
        return {name: to_torch(array) for name, array in sink.arrays.items()}
    return dict(sink.arrays)


def _state_dicts(models: Any) -> list[Mapping[str, Any]]:
    if isinstance(models, Mapping) or not isinstance(models, Iterable):
        raise FusekitError(f"models: found {type(models).__name__}, expected a list of state dicts")
    listed = list(models)
    if not listed:
        raise FusekitError("models: found an empty list, expected at least one state dict")
    for i, each in enumerate(listed):
        _check_mapping(f"models[{i}]", each)
    return listed


def _check_mapping(place: str, found: Any) -> None:
    if not isinstance(found, Mapping):
        raise FusekitError(f"{place}: found {type(found).__name__}, expected a mapping by name")
    for name in found:
        if not isinstance(name, str):
            raise FusekitError(f"{place}: found the name {name!r}, expected a text")


def _flat_masks(
    masks: Sequence[Mapping[str, Any] | None] | None, models: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any] | None]:
    """Masks as flat float rows, checked against the tensors they belong to."""
    if masks is None:
        return []
    if len(masks) != len(models):
        raise FusekitError(
            f"masks: found {len(masks)}, expected one (or None) for each of {len(models)} models"
        )
    flat: list[dict[str, Any] | None] = []
    for i, (own, arrays) in enumerate(zip(masks, models, strict=True)):
        if own is None:
            flat.append(None)
            continue
        rows = {}
        for name, mask in own.items():
            values = np.asarray(mask)
            shape = array_bytes(arrays[name])[1] if name in arrays else None
            if shape != values.shape:
                raise FusekitError(
                    f"masks[{i}][{name!r}]: found shape {list(values.shape)}, expected "
                    + (f"{list(shape)}" if shape is not None else "a tensor of that name")
                )
            if not np.isin(values, (0, 1)).all():
                raise FusekitError(f"masks[{i}][{name!r}]: found values other than 0 and 1")
            rows[name] = values.reshape(-1).astype(np.float32)
        flat.append(rows)
    return flat
