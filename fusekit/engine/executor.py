"""Runs a plan on threads: scans for summaries, then combined blocks at their places.

Workers take units of work from a queue; the last unit of a scan lets the tensor's rule go on. What
is written depends on the plan alone, never on the number of threads, the block size or the order in
which units finish.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from fusekit.engine.blocks import (
    BLOCK_ELEMENTS,
    BlockReader,
    Fetch,
    Resident,
    Streaming,
    Workspace,
    nonfinite_error,
)
from fusekit.engine.checksum import CHUNK_ELEMENTS, ChunkDigests
from fusekit.engine.passes import Accumulator, Span, accumulator, is_divisible
from fusekit.engine.plan import Plan, PlannedTensor
from fusekit.engine.rules import differing
from fusekit.errors import CheckpointError, FusekitError
from fusekit.kernels import GRANULE, codecs
from fusekit.kernels.packed import KINDS
from fusekit.methods.base import Block, Combine, Copy, Remark, Summary

Array = np.ndarray[Any, np.dtype[Any]]

RESIDENT_BYTES = 48 << 20
"""A tensor whose operands fit is read once by one worker, however many scans its method needs."""


class Sink(Protocol):
    """Where merged tensors go."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Bytes of a tensor, `offset` bytes into it. Called from any thread."""

    def finished(self, name: str, checksum: str) -> None:
        """Every byte of a tensor has been written. Called under a lock."""


@dataclass(frozen=True)
class NonFinite:
    """NaN and infinite entries found in one operand of one tensor."""

    tensor: str
    model: str
    count: int


@dataclass
class Execution:
    """What a run did."""

    bytes_read: int = 0
    bytes_written: int = 0
    nonfinite: list[NonFinite] = field(default_factory=list)
    overflows: dict[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    """What methods had to say, with the tensors it is about."""


class _Job:
    """One output tensor on its way: where its rule stands and what has been written."""

    def __init__(self, planned: PlannedTensor, index: int, written: bool, resident: bool) -> None:
        self.planned = planned
        self.index = index
        self.written = written
        self.request: Summary | None = None
        self.combine: Combine | None = None
        self.scanned = False
        self.nonfinite = dict.fromkeys(planned.operand_indices(), 0)
        self.overflows = 0
        self.pending = 0
        self.remarks: list[str] = []
        self.digests = ChunkDigests(planned.size)
        tensor = replace(planned.tensor, in_order=True) if resident else planned.tensor
        self.resident = resident
        self._steps = planned.method.rule(tensor) if planned.kind == "merge" else None

    def advance(self, result: Any = None) -> None:
        """Let the rule go on until it asks for a summary or returns a combine."""
        self.request = None
        if self._steps is None:
            self.combine = Copy(-1 if self.planned.base else 0)
            return
        try:
            request = self._steps.send(result)
            while isinstance(request, Remark):
                self.remarks.append(request.text)
                request = self._steps.send(None)
            self.request = request
        except StopIteration as stop:
            self.combine = stop.value

    def forget(self) -> None:
        """Let go of what the rule held (thresholds, masks): the tensor is written."""
        self.combine = None
        self._steps = None

    @property
    def copies_bytes(self) -> bool:
        """Whether the result is an operand's bytes as they are."""
        combine = self.combine
        return (
            isinstance(combine, Copy)
            and self.planned.operand(combine.model).dtype == self.planned.dtype
        )


Task = Callable[[Workspace], None]

_MODEL = "model"


class Executor:
    """Executes the tensors of a plan that are not written yet."""

    def __init__(
        self,
        plan: Plan,
        sink: Sink,
        *,
        threads: int | None = None,
        block_elements: int = BLOCK_ELEMENTS,
        resident_bytes: int = RESIDENT_BYTES,
        allow_nonfinite: bool = False,
        written: Collection[str] = (),
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self._plan = plan
        self._sources = plan.sources
        self._sink = sink
        check_threads(threads)
        self._threads = threads or available_cpus()
        self._block_elements = max(GRANULE, block_elements // GRANULE * GRANULE)
        self._resident_bytes = resident_bytes
        self._allow_nonfinite = allow_nonfinite
        self._on_progress = on_progress or (lambda written: None)
        # Tensors written by an earlier run still count where others share summaries with them.
        self._jobs = [
            _Job(planned, index, planned.name in written, self._is_resident(planned))
            for index, planned in enumerate(plan.tensors)
            if plan.shares_summaries or planned.name not in written
        ]
        self._undecided = Counter(
            scope for job in self._jobs for scope in {job.planned.group, _MODEL}
        )
        self._waiting: dict[str, list[_Job]] = {}
        self._queue: deque[Task] = deque()
        self._urgent: deque[Task] = deque()
        self._condition = threading.Condition()
        self._failure: BaseException | None = None
        self._unfinished = len(self._jobs)
        self.execution = Execution()

    def _is_resident(self, planned: PlannedTensor) -> bool:
        """Whether one worker reads the tensor once and does all that is to be done with it."""
        return not self._plan.shares_summaries and planned.input_bytes <= self._resident_bytes

    # -- threads ---------------------------------------------------------------------------------

    def run(self) -> Execution:
        """Do all the work; raises the first error any task met."""
        for job in self._jobs:
            job.advance()
        with self._condition:
            self._dispatch(self._jobs, self._queue)
        workers = [
            threading.Thread(target=self._work, name=f"fusekit-{i}", daemon=True)
            for i in range(self._threads)
        ]
        for worker in workers:
            worker.start()
        try:
            self._watch()
        except BaseException as interruption:
            self._fail(interruption)
        for worker in workers:
            worker.join()
        if self._failure is not None:
            raise self._failure
        self._on_progress(self.execution.bytes_written)
        self.execution.nonfinite.sort(key=lambda found: (found.tensor, found.model))
        self.execution.remarks = with_tensors(
            (text, job.planned.name) for job in self._jobs for text in job.remarks
        )
        return self.execution

    def _watch(self) -> None:
        while True:
            with self._condition:
                if not self._unfinished or self._failure is not None:
                    return
                self._condition.wait(timeout=0.1)
                written = self.execution.bytes_written
            self._on_progress(written)

    def _work(self) -> None:
        space = Workspace(self._block_elements)
        while True:
            with self._condition:
                while not (self._urgent or self._queue or self._failure or not self._unfinished):
                    self._condition.wait()
                if self._failure is not None or not self._unfinished:
                    return
                task = (self._urgent or self._queue).popleft()
            try:
                task(space)
            except BaseException as error:
                self._fail(error)
                return
            with self._condition:
                self.execution.bytes_read += space.bytes_read
            space.bytes_read = 0

    def _fail(self, error: BaseException) -> None:
        with self._condition:
            if self._failure is None:
                self._failure = error
            self._condition.notify_all()

    # -- what to do next (called under the lock) ---------------------------------------------------

    def _dispatch(self, jobs: Iterable[_Job], queue: deque[Task]) -> None:
        """Queue the next work of jobs whose rule has just advanced; small ones share a task."""
        batch: list[Task] = []
        elements = 0
        for job in jobs:
            tasks = self._next_tasks(job)
            if job.planned.size >= CHUNK_ELEMENTS:
                queue.extend(tasks)
                continue
            batch.extend(tasks)
            elements += job.planned.size
            if elements >= CHUNK_ELEMENTS:
                queue.append(_in_turn(batch))
                batch, elements = [], 0
        if batch:
            queue.append(_in_turn(batch))
        self._condition.notify_all()

    def _next_tasks(self, job: _Job) -> list[Task]:
        planned = job.planned
        if job.combine is not None:
            self._decided(job)
            if job.written:
                self._end(job)
                return []
            return self._combine_tasks(job)
        assert job.request is not None
        scope = {"tensor": None, "group": planned.group, "model": _MODEL}[job.request.scope]
        if scope is not None and (scope == _MODEL or self._plan.granularity != "tensor"):
            self._waiting.setdefault(scope, []).append(job)
            self._start_if_complete(scope)
            return []
        if job.resident:
            return [lambda space: self._run_resident(job, space)]
        return self._scan_tasks([job], accumulator([(planned, job.request)]))

    def _decided(self, job: _Job) -> None:
        """A rule has ended: nobody needs to wait for it any more."""
        for scope in {job.planned.group, _MODEL}:
            self._undecided[scope] -= 1
            self._start_if_complete(scope)

    def _start_if_complete(self, scope: str) -> None:
        """Scan for a shared summary once every undecided tensor of the scope asks for it."""
        waiting = self._waiting.get(scope, [])
        if waiting and len(waiting) == self._undecided[scope]:
            del self._waiting[scope]
            waiting.sort(key=lambda job: job.index)
            _check_same_request(waiting)
            shared = accumulator([(job.planned, job.request) for job in waiting])
            self._urgent.extend(self._scan_tasks(waiting, shared))
            self._condition.notify_all()

    def _end(self, job: _Job) -> None:
        job.forget()
        self._unfinished -= 1
        if not self._unfinished:
            self._condition.notify_all()

    # -- scans -----------------------------------------------------------------------------------

    def _scan_tasks(self, jobs: list[_Job], shared: Accumulator) -> list[Task]:
        """One task per piece of a scan; the one that ends last closes the scan."""
        pieces = [
            piece
            for span in shared.spans()
            for piece in (_split(span) if shared.divisible(span.member) else [span])
        ]
        left = _Countdown(len(pieces))

        def scan(piece: Span) -> Task:
            def task(space: Workspace) -> None:
                job = jobs[piece.member]
                self._prefetch(job.planned, piece)
                reader = self._reader(job, space, Streaming)
                shared.measure(piece, reader)
                self._count_nonfinite(job, reader, shared)
                if left.step():
                    self._close_scan(jobs, shared)

            return task

        return [scan(piece) for piece in pieces]

    def _close_scan(self, jobs: list[_Job], shared: Accumulator) -> None:
        if shared.covers_everything:
            for job in jobs:
                self._check_finite(job)
        if shared.advance():
            for member, job in enumerate(jobs):
                job.advance(shared.result(member))
            with self._condition:
                self._dispatch(jobs, self._urgent)
        else:
            with self._condition:
                self._urgent.extend(self._scan_tasks(jobs, shared))
                self._condition.notify_all()

    def _run_resident(self, job: _Job, space: Workspace) -> None:
        """All scans of a tensor and its combine, reading it once."""
        reader = self._reader(job, space, Resident)
        while job.request is not None:
            own = accumulator([(job.planned, job.request)])
            while True:
                for span in own.spans():
                    own.measure(span, reader)
                self._count_nonfinite(job, reader, own)
                if own.covers_everything:
                    self._check_finite(job)
                if own.advance():
                    break
            job.advance(own.result(0))
        if job.copies_bytes:
            with self._condition:
                self._dispatch([job], self._urgent)
            return
        with self._condition:
            self._decided(job)
            job.pending = 1
        self._combine(job, 0, job.planned.size, space, reader)

    def _prefetch(self, planned: PlannedTensor, piece: Span) -> None:
        """Have the system fetch a task's bytes while its first blocks are being computed."""
        for index in planned.operand_indices():
            ref = planned.operand(index)
            self._sources[ref.source].prefetch(ref.name, piece.start, piece.stop)

    def _reader(self, job: _Job, space: Workspace, how: Callable[..., Fetch]) -> BlockReader:
        return BlockReader(job.planned, space, how(job.planned, self._sources, space))

    # -- NaN and Inf -----------------------------------------------------------------------------

    def _count_nonfinite(self, job: _Job, reader: BlockReader, shared: Accumulator | None) -> None:
        """Add a reader's counts, once per element however often the tensor is scanned."""
        if not job.scanned and (shared is None or shared.covers_everything):
            with self._condition:
                for index, count in reader.nonfinite.items():
                    job.nonfinite[index] += count
        reader.reset_counts()

    def _check_finite(self, job: _Job) -> None:
        """Refuse NaN and Inf, or note them, once a tensor has been read from end to end."""
        if job.scanned:
            return
        job.scanned = True
        for index, count in job.nonfinite.items():
            if not count:
                continue
            ref = job.planned.operand(index)
            model = self._plan.checkpoints[ref.source].reference
            if not (self._allow_nonfinite or job.planned.method.keeps_nonfinite):
                raise nonfinite_error(self._sources[ref.source].where(ref.name), ref.name, count)
            with self._condition:
                self.execution.nonfinite.append(NonFinite(job.planned.name, model, count))

    # -- combining -------------------------------------------------------------------------------

    def _combine_tasks(self, job: _Job) -> list[Task]:
        planned, combine = job.planned, job.combine
        assert combine is not None
        whole = Span(0, 0, planned.size)
        divisible = job.copies_bytes or is_divisible(combine, planned)
        pieces = _split(whole) if divisible else [whole]
        job.pending = len(pieces)

        def write(piece: Span) -> Task:
            def task(space: Workspace) -> None:
                self._prefetch(planned, piece)
                if job.copies_bytes:
                    self._copy(job, piece.start, piece.stop, space)
                else:
                    reader = self._reader(job, space, Streaming)
                    self._combine(job, piece.start, piece.stop, space, reader)

            return task

        return [write(piece) for piece in pieces]

    def _combine(
        self, job: _Job, start: int, stop: int, space: Workspace, reader: BlockReader
    ) -> None:
        planned, combine = job.planned, job.combine
        assert combine is not None
        overflows = 0
        digest = job.digests.from_chunk(start)
        for block in reader.blocks(combine, start, stop):
            encoded, beyond = self._merged(combine, block, reader)
            overflows += beyond
            digest.update(encoded, planned.dtype.itemsize)
            self._sink.write(planned.name, block.start * planned.dtype.itemsize, encoded.data)
            for name, offset, part in combine.side(block):
                self._sink.write(name, offset, part.view(np.uint8).data)
        digest.close()
        self._count_nonfinite(job, reader, None)
        self._written(job, (stop - start) * planned.dtype.itemsize, overflows)

    def _merged(self, combine: Combine, block: Block, reader: BlockReader) -> tuple[Array, int]:
        """A block's merged bytes, and how many values left the finite range of their type."""
        planned, space = reader.planned, reader.space
        if block.packed is not None and block.packed.kind == KINDS.get(planned.dtype.name):
            bits = space.scratch("encoded", (block.size,), np.uint16)
            if combine.encode(block, bits):
                return bits.view(np.uint8), 0
        out = space.scratch("out", (block.size,), np.dtype(planned.compute))
        combine.apply(block, out)
        # Of finite operands, some results may be beyond the type that is computed in.
        infinite = int(codecs.count_nonfinite(out)) if reader.block_is_finite else 0
        encoded, beyond = space.encode(out, planned.dtype)
        return encoded, infinite + beyond

    def _copy(self, job: _Job, start: int, stop: int, space: Workspace) -> None:
        """Bytes as they are; operands of an integer tensor must all agree."""
        planned, combine = job.planned, job.combine
        assert isinstance(combine, Copy)
        fetch = Streaming(planned, self._sources, space)
        width = planned.dtype.itemsize
        others = planned.operand_indices() if planned.kind == "same" else []
        nonfinite = 0
        digest = job.digests.from_chunk(start)
        for begin in range(start, stop, self._block_elements):
            end = min(begin + self._block_elements, stop)
            raw = fetch.raw(combine.model, begin, end)
            for index in others:
                if index != combine.model:
                    self._check_equal(
                        planned, combine.model, index, raw, fetch.raw(index, begin, end)
                    )
            if planned.kind == "merge":
                row = space.scratch("copied", (end - begin,), np.dtype(planned.compute))
                nonfinite += space.decode(raw, planned.dtype, row)
            digest.update(raw, width)
            self._sink.write(planned.name, begin * width, raw.data)
        digest.close()
        with self._condition:
            job.nonfinite[combine.model] += nonfinite
        self._written(job, (stop - start) * width, 0)

    def _check_equal(
        self, planned: PlannedTensor, kept: int, other: int, raw: Array, raw_other: Array
    ) -> None:
        if not np.array_equal(raw, raw_other):
            first, second = planned.operand(kept), planned.operand(other)
            raise CheckpointError(
                f"{self._sources[second.source].where(second.name)}: tensor {second.name!r} "
                f"({second.dtype.torch_name}) differs from that of "
                f"{self._plan.checkpoints[first.source].reference}; integer and boolean tensors "
                "are copied and must be equal in all models"
            )

    def _written(self, job: _Job, nbytes: int, overflows: int) -> None:
        with self._condition:
            job.pending -= 1
            job.overflows += overflows
            self.execution.bytes_written += nbytes
            if job.pending:
                return
        self._check_finite(job)
        with self._condition:
            if job.overflows:
                self.execution.overflows[job.planned.name] = job.overflows
            self._sink.finished(job.planned.name, job.digests.hexdigest())
            self._end(job)


def with_tensors(remarks: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Each remark once, with the tensors it was made on, from remarks with one tensor each."""
    tensors: dict[str, list[str]] = {}
    for text, name in remarks:
        tensors.setdefault(text, []).append(name)
    return tuple(
        f"{text} (tensor {names[0]!r}" + (f" and {len(names) - 1} more)" if len(names) > 1 else ")")
        for text, names in tensors.items()
    )


class _Countdown:
    """Tells the last of several threads that it is the last."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._lock = threading.Lock()

    def step(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left == 0


def _in_turn(tasks: Sequence[Task]) -> Task:
    def run(space: Workspace) -> None:
        for task in tasks:
            task(space)

    return run


def _split(span: Span) -> list[Span]:
    return [
        Span(span.member, start, min(start + CHUNK_ELEMENTS, span.stop))
        for start in range(span.start, span.stop, CHUNK_ELEMENTS)
    ] or [span]


def _check_same_request(jobs: Sequence[_Job]) -> None:
    first = jobs[0]
    assert first.request is not None
    for job in jobs[1:]:
        assert job.request is not None
        if job.request.group_key() != first.request.group_key():
            raise differing(first.planned, job.planned)


def check_threads(threads: Any) -> None:
    """Refuse what is no number of worker threads; None takes all processors."""
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise FusekitError(f"threads: found {threads!r}, expected at least 1")


def available_cpus() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_estimate(plan: Plan, threads: int) -> int:
    """Bytes of buffers a run holds at most; counters of order statistics come on top."""
    per_worker = 0
    for planned in plan.tensors:
        if planned.is_whole:
            continue
        operands = len(planned.operand_indices())
        block = min(planned.size, BLOCK_ELEMENTS)
        held = min(planned.input_bytes, RESIDENT_BYTES)
        decoded = block * (operands + 2) * np.dtype(planned.compute).itemsize
        per_worker = max(per_worker, decoded + block * operands * 4 + held)
    return max(threads * per_worker, plan.whole_bytes)
