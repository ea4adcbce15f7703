"""How summaries are measured: scans over blocks whose results do not depend on how work is split.

An accumulator belongs to the tensors that share a summary: one tensor, a layer, or the model. It
says which spans to scan, takes their blocks in any order from any thread, and after each scan
either asks for another one or is finished. Floating-point sums are kept per grain and added in
order; everything else is counted in integers.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusekit.engine.blocks import BlockReader
from fusekit.engine.plan import PlannedTensor
from fusekit.kernels import gram, order
from fusekit.methods.base import (
    Additive,
    Block,
    Cumulative,
    OrderStatistics,
    OrderValue,
    Request,
    Sequential,
    ShareOfNonzero,
)

Array = np.ndarray[Any, np.dtype[Any]]

DIRECT_ELEMENTS = 1 << 17
"""Up to this many values an order statistic is selected from the values themselves."""

FEWEST_PIECES, MOST_PIECES, PIECE_ELEMENTS = 16, 1024, 4096
"""How a first guess of an order statistic is sampled: evenly spaced short runs."""

SAMPLED_PIECES = 256
"""Runs of a sample whose order statistics are taken as they are: a million values."""

ELEMENTS_PER_PIECE = 1 << 20
"""Large groups are sampled by more runs (0.4 percent), so that one count usually settles them."""

MAX_BINS = 1 << 21


@dataclass(frozen=True)
class Span:
    """Elements `[start, stop)` of an accumulator's member."""

    member: int
    start: int
    stop: int


Member = tuple[PlannedTensor, Any]


class Accumulator(ABC):
    """Measures one summary over its members (tensor plan and that tensor's own request)."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members

    @property
    def covers_everything(self) -> bool:
        """Whether the coming scan reads every element of every member."""
        return True

    def divisible(self, member: int) -> bool:
        """Whether a member's blocks may be measured by several threads at once."""
        planned, summary = self.members[member]
        return is_divisible(summary, planned)

    def spans(self) -> list[Span]:
        """What the coming scan has to cover."""
        return [Span(i, 0, planned.size) for i, (planned, _) in enumerate(self.members)]

    @abstractmethod
    def measure(self, span: Span, reader: BlockReader) -> None:
        """Take in a span. Thread-safe."""

    @abstractmethod
    def advance(self) -> bool:
        """Close the scan; False asks for another one."""

    @abstractmethod
    def result(self, member: int) -> Any:
        """What the member's rule receives."""


def accumulator(members: Sequence[Member]) -> Accumulator:
    """The accumulator for the kind of summary the members ask for."""
    summary = members[0][1]
    if isinstance(summary, Additive):
        return _Sums(members)
    if isinstance(summary, OrderStatistics):
        return _Order(members)
    if isinstance(summary, Sequential):
        return _State(members)
    raise TypeError(f"unknown kind of summary: {type(summary).__name__}")


def is_divisible(request: Request, planned: PlannedTensor) -> bool:
    """Whether several workers may share a tensor's blocks."""
    return request.unit(planned.shape) == 1


class _Sums(Accumulator):
    """Additive summaries: partial sums per grain, added in order of position and tensor."""

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__(members)
        self._partials = [
            np.zeros(
                (-(-planned.size // summary.grain(planned.shape)), summary.width(planned.tensor))
            )
            for planned, summary in members
        ]
        self._total = np.zeros(self._partials[0].shape[1])
        self._before: list[Array] = []

    def measure(self, span: Span, reader: BlockReader) -> None:
        planned, summary = self.members[span.member]
        size = summary.grain(planned.shape)
        partials = self._partials[span.member]
        for block in reader.blocks(summary, span.start, span.stop):
            first = block.start // size
            count = -(-block.size // size)
            summary.measure(block, partials[first : first + count])

    def advance(self) -> bool:
        for (_, summary), partials in zip(self.members, self._partials, strict=True):
            if isinstance(summary, Cumulative):
                before = np.empty_like(partials)
                gram.running_sums(partials, self._total, before)
                self._before.append(before)
            else:
                gram.add_rows(partials, self._total)
        return True

    def result(self, member: int) -> Any:
        summary = self.members[member][1]
        if isinstance(summary, Cumulative):
            return summary.result(self._before[member])
        return summary.result(self._total.copy())


class _State(Accumulator):
    """Sequential summaries: one worker, first element to last."""

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__(members)
        ((planned, summary),) = members
        self._state = summary.begin(planned.tensor)

    def divisible(self, member: int) -> bool:
        return False

    def measure(self, span: Span, reader: BlockReader) -> None:
        summary = self.members[0][1]
        for block in reader.blocks(summary, span.start, span.stop):
            summary.update(self._state, block)

    def advance(self) -> bool:
        return True

    def result(self, member: int) -> Any:
        return self.members[0][1].result(self._state)


@dataclass
class _Target:
    """One wanted rank of one row, and the bracket of keys it is known to lie in.

    Where it is a share of the values that are not zero, it is 0 until these are counted. It stays
    0 where nothing is wanted but the count of what lies in the bracket and above it.
    """

    row: int
    rank: int
    low: int
    high: int
    share: float | None = None
    shift: int = 0
    found: OrderValue | None = None

    @property
    def bins(self) -> int:
        """How many counters its bracket takes."""
        return ((self.high - self.low) >> self.shift) + 1

    def know(self, nonzero: int) -> None:
        """Take the rank that a share comes to; nothing is found where it is 0."""
        if self.share is not None and self.rank == 0:
            self.rank = int(self.share * nonzero)
            if self.rank == 0:
                self.found = OrderValue(math.inf, 0, 0, 0)

    def narrow(self, low: int, high: int) -> None:
        """Look between two keys, in as few keys per bin as the bins allow."""
        self.low, self.high = low, high
        self.shift = max(0, (high - low).bit_length() - (MAX_BINS - 1).bit_length())


@dataclass
class _Largest:
    """The largest key of a row so far, and how often it occurs."""

    key: int = 0
    times: int = 0

    def add(self, key: int, times: int) -> None:
        if key > self.key:
            self.key, self.times = key, times
        elif key == self.key:
            self.times += times


class _Pool:
    """Counters that are used again: the pages of new ones cost more than the counting."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Array] = []

    def take(self, count: int, dtype: Any) -> Array:
        """So many counters, all zero."""
        with self._lock:
            self._idle.sort(key=lambda memory: memory.nbytes)
            memory = self._idle.pop() if self._idle else np.empty(0, np.uint8)
        nbytes = count * np.dtype(dtype).itemsize
        if memory.nbytes < nbytes:
            return np.zeros(count, dtype)
        counters: Array = memory[:nbytes].view(dtype)
        counters[:] = 0
        return counters

    def give(self, counters: Array) -> None:
        """Counters that are not needed any more."""
        memory = counters if counters.base is None else counters.base
        with self._lock:
            self._idle.append(memory.view(np.uint8))


_pool = _Pool()


class _Counts:
    """What one worker has counted: keys in and above the brackets, and the rows' largest keys.

    A largest value is tracked instead of bracketed.
    """

    def __init__(self, targets: Sequence[_Target], key: np.dtype[Any], size: int) -> None:
        bracketed = [target for target in targets if target.rank != 1]
        self._first = np.cumsum([0, *(target.bins for target in bracketed)]).tolist()
        self.brackets = np.array(
            [
                (target.row, target.low, target.high, target.shift, first)
                for target, first in zip(bracketed, self._first, strict=False)
            ],
            key,
        ).reshape(-1, 5)
        self.bins = _pool.take(self._first[-1], np.int64 if size >= 1 << 31 else np.int32)
        self.above = np.zeros(len(bracketed), np.int64)
        self.largest = {target.row: _Largest() for target in targets if target.rank == 1}

    def of(self, number: int) -> Array:
        """The counters of one bracket."""
        return self.bins[self._first[number] : self._first[number + 1]]

    def add(self, other: _Counts) -> None:
        """Take in what another worker has counted."""
        self.bins += other.bins
        self.above += other.above
        for row, seen in other.largest.items():
            self.largest[row].add(seen.key, seen.times)


class _Order(Accumulator):
    """Order statistics: select directly where few, else bracket by a sample and count keys."""

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__(members)
        summary: OrderStatistics = members[0][1]
        self._absolute = summary.absolute
        self._sampled = summary.sampled
        self._size = sum(planned.size for planned, _ in members)
        self._offsets = np.cumsum([0, *(planned.size for planned, _ in members)]).tolist()
        self._compute = np.dtype(members[0][0].compute)
        self._key = np.dtype(np.uint32 if self._compute.itemsize == 4 else np.uint64)
        self._sign = self._key.type(1 << (8 * self._key.itemsize - 1))
        self._below_sign = self._key.type(int(self._sign) - 1)
        self._top = int(self._below_sign) if self._absolute else int(~self._key.type(0))
        self._targets = [
            _Target(row, 0, 1, self._top, rank.share)
            if isinstance(rank, ShareOfNonzero)
            else _Target(row, rank, 0, self._top)
            for row, ranks in enumerate(summary.ranks)
            for rank in ranks
        ]
        # What lies above a bracket that holds the key 0 alone is not zero.
        shared = sorted({target.row for target in self._targets if target.share is not None})
        self._zeros = [_Target(row, 0, 0, 0) for row in shared]
        assert not shared or (self._absolute and not self._sampled)
        self._rows = len(summary.ranks)
        self._lock = threading.Lock()
        self._idle: list[_Counts] = []
        if self._size <= (SAMPLED_PIECES * PIECE_ELEMENTS if self._sampled else DIRECT_ELEMENTS):
            self._scan = "direct"
            self._collected = np.empty((self._rows, self._size), self._key)
        else:
            self._scan = "sample"
            self._pieces = self._sample_pieces()
            lengths = [span.stop - span.start for span in self._pieces]
            self._collected = np.empty((self._rows, sum(lengths)), self._key)
            starts = np.cumsum([0, *lengths]).tolist()
            self._piece_offsets = dict(zip(self._pieces, starts, strict=False))

    @property
    def covers_everything(self) -> bool:
        return self._scan != "sample"

    def spans(self) -> list[Span]:
        return self._pieces if self._scan == "sample" else super().spans()

    def measure(self, span: Span, reader: BlockReader) -> None:
        _, summary = self.members[span.member]
        if self._scan == "count":
            with self._borrowed_counts() as counts:
                for block in reader.blocks(summary, span.start, span.stop):
                    self._count(summary, block, counts)
            return
        for block in reader.blocks(summary, span.start, span.stop):
            at = self._place(span, block.start)
            # A scan of everything must decode: it counts NaN and Inf as well.
            if self.covers_everything or not summary.collect(block, self._collected, at):
                self._collected[:, at : at + block.size] = self._keys(summary, block)

    def advance(self) -> bool:
        if self._scan == "direct":
            self._select()
            return True
        if self._scan == "sample" and self._sampled:
            self._estimate()
            return True
        if self._scan == "sample":
            self._bracket()
            self._scan = "count"
            return False
        self._locate()
        return all(target.found is not None for target in self._targets)

    def result(self, member: int) -> tuple[tuple[OrderValue, ...], ...]:
        rows: list[list[OrderValue]] = [[] for _ in range(self._rows)]
        for target in self._targets:
            assert target.found is not None
            rows[target.row].append(target.found)
        return tuple(map(tuple, rows))

    # -- keys ------------------------------------------------------------------------------------

    def _keys(self, summary: OrderStatistics, block: Block) -> Array:
        values = summary.values(block)
        keys = block.scratch("keys", values.shape, self._key)
        for row in range(len(values)):
            bits = values[row].view(self._key)
            if self._absolute:
                order.magnitude_keys(bits, self._below_sign, keys[row])
            else:
                order.signed_keys(bits, self._sign, keys[row])
        return keys

    def _value(self, key: int) -> float:
        bits = self._key.type(key)
        if not self._absolute:
            bits = bits ^ self._sign if bits & self._sign else ~bits
        return float(np.array([bits], self._key).view(self._compute)[0])

    # -- few values ------------------------------------------------------------------------------

    def _place(self, span: Span, start: int) -> int:
        if self._scan == "direct":
            return int(self._offsets[span.member]) + start
        return int(self._piece_offsets[span]) + start - span.start

    def _select(self) -> None:
        for target in self._targets:
            keys = self._collected[target.row]
            target.know(int(np.count_nonzero(keys)))
            if target.found is not None:
                continue
            at = self._size - target.rank
            key = np.partition(keys, at)[at]
            target.found = OrderValue(
                self._value(int(key)),
                int(np.count_nonzero(keys > key)),
                int(np.count_nonzero(keys == key)),
                target.rank,
            )

    # -- many values -----------------------------------------------------------------------------

    def _sample_pieces(self) -> list[Span]:
        """Evenly spaced whole runs over all members, each starting on a granule."""
        pieces = []
        member = 0
        fewest = SAMPLED_PIECES if self._sampled else FEWEST_PIECES
        count = min(max(self._size // ELEMENTS_PER_PIECE, fewest), MOST_PIECES)
        for piece in range(count):
            position = self._size * piece // count
            while position >= self._offsets[member + 1]:
                member += 1
            planned, summary = self.members[member]
            unit = summary.unit(planned.shape)
            align = summary.grain(planned.shape)
            start = (position - self._offsets[member]) // align * align
            stop = min(start + -(-PIECE_ELEMENTS // unit) * unit, planned.size)
            pieces.append(Span(member, start, stop))
        return list(dict.fromkeys(pieces))

    def _estimate(self) -> None:
        """Take the sample's order statistics for those of the group."""
        taken = self._collected.shape[1]
        for target in self._targets:
            keys, rank = self._collected[target.row], target.rank
            at = min((self._size - rank) * taken // self._size, taken - 1)
            key = int(np.partition(keys, at)[at])
            target.found = OrderValue(self._value(key), rank - 1, 1, rank)

    def _bracket(self) -> None:
        """Keys between which a rank probably lies: 2.6 standard errors of independent values.

        Values of one run are alike, so part of the error shrinks with the number of runs only. A
        wider bracket would be missed less often, but counting in it costs more than the rare
        second scan.
        """
        taken = self._collected.shape[1]
        errors = 2.6 / taken**0.5 + 0.004 * (FEWEST_PIECES / len(self._pieces)) ** 0.5
        ends, work = np.empty(2, self._key), np.empty(taken, self._key)
        for target in self._targets:
            keys, zeros = self._collected[target.row], 0
            if target.share is None:
                share = (self._size - target.rank) / self._size
            else:
                zeros = taken - int(np.count_nonzero(keys))
                share = 1.0 - target.share * (taken - zeros) / taken
            margin = errors * (share * (1.0 - share)) ** 0.5 + 2.0 / taken
            first = max(0, int((share - margin) * taken))
            last = min(taken - 1, int((share + margin) * taken) + 1)
            order.select(keys, np.array([first, last]), work, ends)
            target.narrow(
                int(ends[0]) if first > zeros else target.low,
                int(ends[1]) if last < taken - 1 else target.high,
            )
        self._collected = self._collected[:, :0].copy()

    @contextmanager
    def _borrowed_counts(self) -> Iterator[_Counts]:
        with self._lock:
            counts = self._idle.pop() if self._idle else None
        if counts is None:
            counts = _Counts(self._open(), self._key, self._size)
        try:
            yield counts
        finally:
            with self._lock:
                self._idle.append(counts)

    def _open(self) -> list[_Target]:
        return [target for target in (*self._zeros, *self._targets) if target.found is None]

    def _count(self, summary: OrderStatistics, block: Block, counts: _Counts) -> None:
        bracketed = counts.brackets, counts.bins, counts.above
        if not counts.largest and summary.tally(block, *bracketed):
            return
        peaks = np.zeros((self._rows, 2), np.int64)
        if counts.largest and summary.tally_largest(block, *bracketed, peaks):
            for row, seen in counts.largest.items():
                seen.add(*peaks[row].tolist())
            return
        keys = self._keys(summary, block)
        order.count_brackets(keys, *bracketed)
        for row, seen in counts.largest.items():
            largest = int(keys[row].max())
            if largest >= seen.key:
                seen.add(largest, int(np.count_nonzero(keys[row] == largest)))

    def _locate(self) -> None:
        """Find each rank's bin; settle it where a bin is a single key, else look closer."""
        (counts, *others), self._idle = self._idle, []
        for more in others:
            counts.add(more)
            _pool.give(more.bins)
        number, nonzero = 0, dict.fromkeys(range(self._rows), 0)
        for target in self._open():
            if target.rank == 1:
                seen = counts.largest[target.row]
                target.found = OrderValue(self._value(seen.key), 0, seen.times, 1)
                continue
            bins, over = counts.of(number), int(counts.above[number])
            number += 1
            if target.share is None and target.rank == 0:
                nonzero[target.row] = over
                target.found = OrderValue(0.0, over, int(bins[0]), over + 1)
                continue
            target.know(nonzero[target.row])
            if target.found is None:
                self._settle(target, bins, over)
        _pool.give(counts.bins)

    def _settle(self, target: _Target, bins: Array, over: int) -> None:
        if target.rank <= over:
            target.narrow(target.high + 1, self._top)
            return
        chosen, greater = order.find_rank(bins, target.rank - over)
        if chosen < 0:
            target.narrow(0, target.low - 1)
            return
        low = target.low + (chosen << target.shift)
        if target.shift:
            target.narrow(low, min(low + (1 << target.shift) - 1, target.high))
            return
        equal = int(bins[chosen])
        target.found = OrderValue(self._value(low), over + greater, equal, target.rank)
