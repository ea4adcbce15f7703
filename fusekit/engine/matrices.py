"""Tensors that a method merges as a whole: read ahead by one, computed by torch, written in blocks.

While one tensor is computed, another thread reads and decodes the next one. At most two tensors'
operands are in memory, whatever the size of the models. The rest of the plan goes to the block
executor first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from fusekit.engine import survey
from fusekit.engine.blocks import BLOCK_ELEMENTS, Workspace, nonfinite_error
from fusekit.engine.checksum import ChunkDigests
from fusekit.engine.device import torch_device
from fusekit.engine.executor import (
    Execution,
    Executor,
    NonFinite,
    Sink,
    available_cpus,
    with_tensors,
)
from fusekit.engine.measurements import Measurements
from fusekit.engine.plan import Plan, PlannedTensor
from fusekit.errors import CheckpointError, FusekitError
from fusekit.methods.base import Measured, Remark, Tensor

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, np.dtype[Any]]


def execute(
    plan: Plan,
    sink: Sink,
    *,
    threads: int | None = None,
    device: str = "cpu",
    allow_nonfinite: bool = False,
    written: Collection[str] = (),
    on_progress: Callable[[int], None] | None = None,
) -> Execution:
    """Do all the work of a plan: blocks on worker threads, then whole tensors one by one.

    Args:
        device: where whole tensors are computed, such as `cpu` or `cuda:0`.

    Raises:
        MissingExtraError: whole tensors are asked for and torch is missing.
        FusekitError: the device does not exist, or the method does not compute on one.
        CheckpointError: NaN or Inf, unreadable tensors, missing statistics.
    """
    check_device(plan, device)
    whole = [p for p in plan.tensors if p.is_whole and p.name not in written]
    merger = WholeTensors(plan, sink, device, allow_nonfinite) if whole else None
    execution = Executor(
        plan,
        sink,
        threads=threads,
        allow_nonfinite=allow_nonfinite,
        written=frozenset(written) | {planned.name for planned in whole},
        on_progress=on_progress,
    ).run()
    if merger is not None:
        with contextlib.closing(merger):
            merger.run(whole, execution, threads or available_cpus(), on_progress)
    return execution


@dataclass(frozen=True)
class _Loaded:
    """One tensor's operands: task vectors (or models, without an origin) and statistics."""

    planned: PlannedTensor
    base: Array | None
    rows: list[Array]
    statistics: list[tuple[Array, float]]


class WholeTensors:
    """Merges whole tensors of a plan."""

    def __init__(self, plan: Plan, sink: Sink, device: str, allow_nonfinite: bool) -> None:
        self._plan = plan
        self._sources = plan.sources
        self._sink = sink
        self._allow_nonfinite = allow_nonfinite
        self._device = device
        self._reading = Workspace(BLOCK_ELEMENTS)
        self._writing = Workspace(BLOCK_ELEMENTS)
        self._nonfinite: list[NonFinite] = []
        self._remarks: list[tuple[str, str]] = []
        self._measurements = Measurements(plan)

    def close(self) -> None:
        """Close the files of statistics."""
        self._measurements.close()

    def run(
        self,
        tensors: Sequence[PlannedTensor],
        execution: Execution,
        threads: int,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        """Merge tensors in order, adding to what a run has done so far."""
        with threadpool_limits(threads, user_api="blas"), _torch_threads(threads):
            thresholds = survey.thresholds(self._plan, self._surveyed)
            self._nonfinite.clear()
            for loaded in self._read_ahead(tensors):
                planned = loaded.planned
                keys = [(planned.group, ref.source) for ref in planned.models]
                own = tuple(thresholds[key] for key in keys if key in thresholds)
                merged = self._merge(loaded, replace(planned.tensor, thresholds=own))
                self._write(planned, merged, execution)
                if on_progress is not None:
                    on_progress(execution.bytes_written)
        execution.bytes_read += self._reading.bytes_read
        execution.remarks = (*execution.remarks, *with_tensors(self._remarks))
        execution.nonfinite.extend(self._nonfinite)
        execution.nonfinite.sort(key=lambda found: (found.tensor, found.model))

    # -- reading ---------------------------------------------------------------------------------

    def _read_ahead(self, tensors: Sequence[PlannedTensor]) -> Iterator[_Loaded]:
        """Tensors in order, each read while the one before it is worked on."""
        with ThreadPoolExecutor(1, "fusekit-read") as reader:
            coming = [reader.submit(self._load, planned) for planned in tensors[:1]]
            for following in [*tensors[1:], None]:
                loaded = coming.pop().result()
                if following is not None:
                    coming.append(reader.submit(self._load, following))
                yield loaded

    def _surveyed(
        self, tensors: Sequence[PlannedTensor]
    ) -> Iterator[tuple[PlannedTensor, list[torch.Tensor]]]:
        """Tensors in order, with the values that their method's survey takes of them."""
        for loaded in self._read_ahead(tensors):
            planned = loaded.planned
            assert planned.method.survey is not None
            yield (
                planned,
                self._decomposed(
                    planned, planned.method.survey, planned.tensor, self._tensors(loaded)
                ),
            )

    def _load(self, planned: PlannedTensor) -> _Loaded:
        rows = [self._operand(planned, index) for index in planned.operand_indices()]
        base = rows.pop(0) if planned.base is not None else None
        if base is not None:
            for row in rows:
                np.subtract(row, base, out=row)
        return _Loaded(planned, base, rows, self._measurements.of(planned))

    def _operand(self, planned: PlannedTensor, index: int) -> Array:
        ref = planned.operand(index)
        source = self._sources[ref.source]
        row = np.empty(planned.size, planned.compute)
        bad = 0
        for start in range(0, planned.size, BLOCK_ELEMENTS):
            stop = min(start + BLOCK_ELEMENTS, planned.size)
            raw = self._reading.scratch("raw", ((stop - start) * ref.dtype.itemsize,), np.uint8)
            self._reading.read(source, ref.name, start, stop, raw)
            bad += self._reading.decode(raw, ref.dtype, row[start:stop])
        if bad:
            if not self._allow_nonfinite:
                raise nonfinite_error(source.where(ref.name), ref.name, bad)
            model = self._plan.checkpoints[ref.source].reference
            self._nonfinite.append(NonFinite(planned.name, model, bad))
        return row

    # -- computing -------------------------------------------------------------------------------

    def _merge(self, loaded: _Loaded, tensor: Tensor) -> Array:
        import torch

        planned = loaded.planned
        assert planned.method.matrix is not None
        measured = [
            Measured(torch.from_numpy(values).to(self._device), norm)
            for values, norm in loaded.statistics
        ]
        steps = planned.method.matrix(tensor, self._tensors(loaded), measured)
        merged = self._decomposed(planned, self._carried_out, planned.name, steps)
        result: Array = merged.cpu().contiguous().numpy().reshape(-1)
        if loaded.base is not None:
            return np.add(loaded.base, result, out=loaded.base)
        return result

    def _carried_out(self, name: str, steps: Generator[Remark, None, torch.Tensor]) -> torch.Tensor:
        """What a rule returns; what it has to say of the tensor is noted."""
        while True:
            try:
                remark = next(steps)
            except StopIteration as stop:
                merged: torch.Tensor = stop.value
                return merged
            self._remarks.append((remark.text, name))

    def _tensors(self, loaded: _Loaded) -> list[torch.Tensor]:
        import torch

        shape = loaded.planned.shape
        return [torch.from_numpy(row.reshape(shape)).to(self._device) for row in loaded.rows]

    def _decomposed(
        self, planned: PlannedTensor, function: Callable[..., Any], *arguments: Any
    ) -> Any:
        """What a method's function makes of a tensor; LAPACK's failures name the tensor."""
        import torch

        try:
            with torch.no_grad():
                return function(*arguments)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise CheckpointError(
                f"tensor {planned.name!r}: {planned.method.name} cannot decompose it: {error}"
            ) from None

    # -- writing ---------------------------------------------------------------------------------

    def _write(self, planned: PlannedTensor, merged: Array, execution: Execution) -> None:
        width, overflows = planned.dtype.itemsize, 0
        digests = ChunkDigests(planned.size)
        digest = digests.from_chunk(0)
        for start in range(0, planned.size, BLOCK_ELEMENTS):
            row = merged[start : start + BLOCK_ELEMENTS]
            encoded, beyond = self._writing.encode(row, planned.dtype)
            overflows += beyond
            digest.update(encoded, width)
            self._sink.write(planned.name, start * width, encoded.data)
        digest.close()
        if overflows:
            execution.overflows[planned.name] = overflows
        execution.bytes_written += planned.size * width
        self._sink.finished(planned.name, digests.hexdigest())


def check_device(plan: Plan, name: str) -> None:
    """Refuse a device that the plan has no use for, or that does not exist.

    Raises:
        MissingExtraError: whole tensors are asked for and torch is missing.
        FusekitError: there is no such device, or the method does not compute on one.
    """
    whole = next((planned for planned in plan.tensors if planned.is_whole), None)
    if whole is not None:
        torch_device(name, whole.method.name)
    elif name != "cpu":
        method = plan.tensors[0].method.name if plan.tensors else "this merge"
        raise FusekitError(f"device: found {name!r}, but {method} merges in blocks on the CPU")


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
