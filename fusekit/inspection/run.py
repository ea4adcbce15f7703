"""`fusekit.inspect`: open models, measure their tensors on threads, draw conclusions."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from fusekit.checkpoint.folder import Checkpoint, open_checkpoint
from fusekit.checkpoint.memory import MemorySource
from fusekit.engine.executor import available_cpus
from fusekit.errors import FusekitError
from fusekit.inspection.advice import Situation, advise
from fusekit.inspection.findings import Evidence, find_all
from fusekit.inspection.low_rank import probe
from fusekit.inspection.measure import Measurement, Measurer
from fusekit.inspection.pairing import Comparison, pair
from fusekit.inspection.result import Finding, Group, Inspection, TensorReport
from fusekit.inspection.statistics import Statistics

Model = str | Path | Mapping[str, Any]
"""A checkpoint folder or file, or a state dict (NumPy incl. ml_dtypes, or torch)."""


def inspect(
    models: Model | Sequence[Model],
    base: Model | None = None,
    *,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Measure models against their base and each other, and say what follows for a merge.

    Reads every byte once (and a sample of it twice), in blocks: memory does not grow with the
    models. Norms, inner products, NaN/Inf and identical tensors are exact; signs, supports,
    moments and effective ranks of large tensors come from evenly spaced samples; stable ranks are
    upper bounds from one power step over all elements.

    Args:
        models: one model or a list of them.
        base: what the models were fine-tuned from; without it the models' own weights are compared.
        threads: worker threads; default all processors. Does not change the result.
        on_progress: called from any thread with the bytes read so far and in total.

    Raises:
        CheckpointError: a model cannot be opened or read.
        FusekitError: no models.

    Example:
        >>> import numpy as np, fusekit
        >>> base, model = {"w": np.ones((4, 4), "f4")}, {"w": np.eye(4, dtype="f4")}
        >>> fusekit.inspect([model], base=base).whole.statistics.norms
        array([3.46410162])
    """
    if isinstance(models, (str, os.PathLike, Mapping)):
        models = [models]
    if not models:
        raise FusekitError("models: found an empty list, expected at least one model")
    began, cpu = time.monotonic(), time.process_time()
    given = [*([] if base is None else [base]), *models]
    checkpoints: list[Checkpoint] = []
    try:
        for i, model in enumerate(given):
            checkpoints.append(
                _open(
                    model, "base" if i == 0 and base is not None else f"model {i + (base is None)}"
                )
            )
        names = _names([checkpoint.reference for checkpoint in checkpoints])
        # The matrices are small and the tensors already spread over threads: BLAS must not spawn.
        with threadpool_limits(1, user_api="blas"):
            measured, ranks, read = _measure_all(
                checkpoints, base is not None, threads or available_cpus(), on_progress
            )
    finally:
        for checkpoint in checkpoints:
            checkpoint.source.close()
    findings = find_all(Evidence(names, checkpoints, base is not None, measured, ranks))
    return _inspection(names, base is not None, measured, findings, began, cpu, read)


def _open(model: Model, label: str) -> Checkpoint:
    if isinstance(model, Mapping):
        return Checkpoint(label, MemorySource(model, label))
    return open_checkpoint(str(model))


def _names(references: Sequence[str]) -> tuple[str, ...]:
    """The shortest endings of the paths that tell the models apart."""
    paths = [Path(reference).parts for reference in references]
    deepest = max(map(len, paths))
    for depth in range(1, deepest + 1):
        short = tuple("/".join(path[-depth:]) for path in paths)
        if len(set(short)) == len(short):
            return short
    return tuple(f"{name} ({i})" for i, name in enumerate(references))


def _measure_all(
    checkpoints: Sequence[Checkpoint],
    has_base: bool,
    threads: int,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[list[Measurement], dict[int, list[int | None]], int]:
    sources = [checkpoint.source for checkpoint in checkpoints]
    comparisons = pair(sources, has_base)
    total = sum(comparison.nbytes for comparison in comparisons)
    own = threading.local()
    lock = threading.Lock()
    measurers: list[Measurer] = []
    done = 0

    def measure(comparison: Comparison) -> Measurement:
        nonlocal done
        if not hasattr(own, "measurer"):
            own.measurer = Measurer(sources, has_base)
            with lock:
                measurers.append(own.measurer)
        found: Measurement = own.measurer.measure(comparison)
        with lock:
            done += comparison.nbytes
        if on_progress is not None:
            on_progress(done, total)
        return found

    largest_first = sorted(comparisons, key=lambda comparison: -comparison.nbytes)
    with ThreadPoolExecutor(threads) as pool:
        measured = {found.comparison.name: found for found in pool.map(measure, largest_first)}
    in_order = [measured[comparison.name] for comparison in comparisons]
    last = Measurer(sources, has_base)
    ranks = probe(last, in_order)
    return in_order, ranks, sum(each.space.bytes_read for each in [*measurers, last])


def _inspection(
    names: tuple[str, ...],
    has_base: bool,
    measured: Sequence[Measurement],
    findings: tuple[Finding, ...],
    began: float,
    cpu: float,
    read: int,
) -> Inspection:
    models = names[int(has_base) :]
    tensors = tuple(_report(found) for found in measured)
    whole = _group("whole model", tensors)
    layers = _groups_by(tensors, lambda tensor: tensor.layer)
    kept = _mergeable(models, findings)
    situation = Situation(
        tuple(models[i] for i in kept),
        None if whole is None else whole.of(kept),
        [layer.of(kept) for layer in layers],
        findings,
        has_base,
    )
    return Inspection(
        models=models,
        base=names[0] if has_base else None,
        whole=whole,
        layers=layers,
        kinds=_groups_by(tensors, lambda tensor: tensor.kind),
        tensors=tensors,
        findings=findings,
        advice=advise(situation),
        bytes_read=read,
        seconds=time.monotonic() - began,
        cpu_seconds=time.process_time() - cpu,
    )


def _mergeable(models: Sequence[str], findings: Iterable[Finding]) -> list[int]:
    """Indices of the models that are neither strangers to the others nor copies of another one."""
    left_out = {
        finding.models[0]
        for finding in findings
        if finding.subject in ("disjoint", "unrelated", "duplicate_model")
    }
    return [i for i, name in enumerate(models) if name not in left_out]


def _report(found: Measurement) -> TensorReport:
    comparison, group = found.comparison, None
    if found.statistics is not None:
        unknown = np.full(found.statistics.models, np.nan)
        group = Group(
            comparison.name,
            1,
            found.statistics,
            unknown if found.stable_rank is None else found.stable_rank,
            unknown if found.effective_rank is None else found.effective_rank,
        )
    return TensorReport(
        comparison.name,
        comparison.shape,
        comparison.layer_name,
        comparison.layer.rank if comparison.layer else None,
        comparison.kind,
        group,
        found.sampled,
    )


def _groups_by(
    tensors: Iterable[TensorReport], key: Callable[[TensorReport], str]
) -> tuple[Group, ...]:
    members: dict[str, list[TensorReport]] = {}
    for tensor in tensors:
        members.setdefault(key(tensor), []).append(tensor)
    groups = (_group(name, each) for name, each in members.items())
    return tuple(group for group in groups if group is not None)


def _group(name: str, tensors: Sequence[TensorReport]) -> Group | None:
    """Statistics added up in the order of the tensors; ranks as medians over matrices."""
    groups = [tensor.group for tensor in tensors if tensor.group is not None]
    if not groups:
        return None
    total: Statistics = groups[0].statistics
    for group in groups[1:]:
        total = total + group.statistics
    return Group(
        name,
        len(groups),
        total,
        _median([group.stable_rank for group in groups]),
        _median([group.effective_rank for group in groups]),
    )


def _median(ranks: Sequence[np.ndarray[Any, np.dtype[np.float64]]]) -> Any:
    stacked = np.array(ranks)
    known = ~np.isnan(stacked).all(axis=0)
    result = np.full(stacked.shape[1], np.nan)
    result[known] = np.nanmedian(stacked[:, known], axis=0)
    return result
