"""Rebuilding one task's expert from a merge that kept masks: base + scale * mask * update."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusekit import kernels
from fusekit.checkpoint.folder import Checkpoint, open_checkpoint
from fusekit.checkpoint.layout import DEFAULT_SHARD_BYTES, SIDE_FILE
from fusekit.checkpoint.safetensors import SafetensorsFile
from fusekit.checkpoint.source import TensorSource
from fusekit.checkpoint.writer import check_target
from fusekit.engine.manifest import MANIFEST
from fusekit.engine.operands import choose_operands
from fusekit.engine.planner import plan_checkpoints
from fusekit.engine.run import MergeReport, run_plan
from fusekit.errors import CheckpointError, FusekitError
from fusekit.methods.base import Block, Combine, Method, Parameter, Summary, Tensor
from fusekit.methods.task_masks import mask_bytes
from fusekit.progress import Progress
from fusekit.recipe.schema import load_recipe

Array = np.ndarray[Any, np.dtype[Any]]


def reconstruct(
    merged: str | Path,
    task: str,
    out: str | Path | None = None,
    *,
    base: str | None = None,
    threads: int | None = None,
    out_shard_size: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> MergeReport:
    """Rebuild one expert from the output of `emr` or `tall_masks`.

    theta_k = base + r_k * M_k * (merged - base), elementwise; r_k is 1 where the method has no
    scales. Tensors without masks (integers) are the base's.

    Args:
        merged: the folder that the merge wrote.
        task: the expert's task: the name of its model's folder unless the recipe said otherwise.
        out: the folder to create; default `<merged>-<task>`.
        base: the base model; default the one the merge read, which must not have changed.
        threads: worker threads; default all processors.
        out_shard_size: largest size of a weight file in bytes.
        overwrite: replace `out` if it exists, once the reconstruction is complete.
        on_progress: called a few times a second from the calling thread.

    Raises:
        FusekitError: no such task, or `out` exists.
        CheckpointError: the folder has no masks, or a base that changed or does not fit.

    References:
        Huang et al., EMR-Merging, NeurIPS 2024, arXiv 2405.17461; Wang et al., Localizing Task
        Information for Improved Model Merging and Compression, ICML 2024, arXiv 2405.07813

    Example:
        >>> import fusekit
        >>> fusekit.reconstruct("merged", "svhn", "svhn-expert")  # doctest: +SKIP
    """
    folder = Path(merged)
    with contextlib.ExitStack() as stack:
        side = _open_side(folder)
        stack.callback(side.close)
        index = _task_index(side, task)
        suffix = re.sub(r"[^\w.-]+", "_", task)
        target = folder.with_name(f"{folder.name}-{suffix}") if out is None else Path(out)
        check_target(target, overwrite)
        unified = open_checkpoint(str(folder))
        stack.callback(unified.source.close)
        origin = _open_base(folder) if base is None else open_checkpoint(base)
        stack.callback(origin.source.close)
        _check_masks(side, origin.source)
        method = _reconstruction(side, index)
        recipe = load_recipe(
            {
                "merge_method": method.name,
                "models": [{"model": unified.reference}],
                "base_model": origin.reference,
                "parameters": {"task": task},
            }
        )
        operands = choose_operands(recipe, method)
        plan = plan_checkpoints(recipe, method, operands, [origin, unified], out_shard_size)
        return run_plan(plan, target, threads=threads, overwrite=overwrite, on_progress=on_progress)


def tasks_of(merged: str | Path) -> list[str]:
    """The tasks whose experts a merged folder can rebuild."""
    with contextlib.closing(_open_side(Path(merged))) as side:
        return _tasks(side)


def _open_side(folder: Path) -> SafetensorsFile:
    path = folder / SIDE_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path}: not found, expected a folder written by a method that keeps masks "
            "(emr, tall_masks)"
        )
    return SafetensorsFile(path)


def _tasks(side: SafetensorsFile) -> list[str]:
    try:
        tasks = json.loads(side.metadata["tasks"])
    except (KeyError, ValueError):
        tasks = None
    if not isinstance(tasks, list) or not all(isinstance(name, str) for name in tasks):
        raise CheckpointError(f"{side.label}: its metadata does not list the tasks")
    return tasks


def _task_index(side: SafetensorsFile, task: str) -> int:
    tasks = _tasks(side)
    if task not in tasks:
        raise FusekitError(
            f"{side.label}: found no task {task!r}, expected one of {', '.join(map(repr, tasks))}"
        )
    return tasks.index(task)


def _open_base(folder: Path) -> Checkpoint:
    """The base that a merge read, refused if it is not the same any more."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        reference = content["recipe"]["base_model"]
        recorded = next(dict(i) for i in content["inputs"] if i["reference"] == reference)
        del recorded["reference"]
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        raise CheckpointError(
            f"{path}: does not name the base model of the merge; pass it with --base"
        ) from None
    files = [recorded.get("path")] + [file.get("path") for file in recorded.get("files", [])]
    known = next((Path(file) for file in files if file is not None), None)
    if not Path(reference).expanduser().exists() and known is not None:
        reference = str(known if reference.endswith(known.suffix) else known.parent)
    base = open_checkpoint(reference)
    if json.loads(json.dumps(base.source.identity())) != recorded:
        base.source.close()
        raise CheckpointError(
            f"{reference}: the base model has changed since {folder} was merged; pass the right "
            "one with --base"
        )
    return base


def _check_masks(side: SafetensorsFile, base: TensorSource) -> None:
    """Refuse masks that do not fit the base's tensors, before anything is read."""
    tasks = len(_tasks(side))
    for name, info in side.tensors.items():
        kind, _, tensor = name.partition(".")
        size = base.tensors[tensor].size if tensor in base.tensors else 0
        expected = {
            "masks": ("U8", (tasks, mask_bytes(size))),
            "scales": ("F64", (tasks,)),
        }.get(kind)
        if size == 0 or (info.dtype.name, info.shape) != expected:
            raise CheckpointError(
                f"{side.label}: {name!r} is {info.dtype.name} {list(info.shape)}, which fits no "
                f"tensor of {base.label} with {tasks} tasks"
            )


def _reconstruction(side: SafetensorsFile, task: int) -> Method:
    """The method whose only model is the unified one and whose masks lie in `side`."""

    def rule(tensor: Tensor) -> Generator[Summary, Any, Combine]:
        yield from ()
        scale = np.ones(1)
        if f"scales.{tensor.name}" in side.tensors:
            side.read_into(f"scales.{tensor.name}", task, task + 1, scale.view(np.uint8).data)
        return _Masked(side, task, float(scale[0]))

    return Method(
        name="reconstruct",
        title="Reconstruction of one expert",
        summary="Rebuilds one task's expert from a merged model and its masks.",
        formula="y = base + r M (x - base)",
        references=(),
        parameters=(Parameter("task", "text", "The expert's task."),),
        rule=rule,
        base="origin",
        base_required=True,
        max_models=1,
        integers="first",
    )


@dataclass(frozen=True, eq=False)
class _Masked(Combine):
    """base + scale * (model - base) where the task's bit is set."""

    side_file: SafetensorsFile
    task: int
    scale: float

    def apply(self, block: Block, out: Array) -> None:
        bits = block.scratch("task bits", (mask_bytes(out.size),), np.uint8)
        start = self.task * mask_bytes(block.tensor.size) + block.start // 8
        name = f"masks.{block.tensor.name}"
        self.side_file.read_into(name, start, start + bits.size, bits.data)
        kernels.masks.add_masked(block.rows[0], bits, self.scale, block.base, out)
