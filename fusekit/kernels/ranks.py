"""Ranks of magnitudes within rows, and random drops whose probability grows with the rank.

Whether an entry is kept is decided by comparing its random number with the probability of its rank.
A histogram of the row bounds every rank; exact ranks are found only for the few entries that the
bounds leave open, so the result is that of a stable sort at a fraction of its cost.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusekit.kernels.random import uniform_bits

Array = np.ndarray[Any, np.dtype[Any]]

_GRANULE = 8192
_LANES = 64
_MIN_BINS = 64
_MAX_BINS = 1 << 20
_OCTAVES = 32
"""Magnitudes this many powers of two below the row's largest share the lowest bin."""

_SCAN_LIMIT = 64
"""Up to this many open entries of a row are ranked by counting; beyond, the row is sorted."""

_INSERTION = 24
_CHUNK = 1024
_EVERY_BYTE = np.uint64(0x0101010101010101)
_DIAGONAL = np.uint64(0x8040201008040201)


@njit(nogil=True, cache=True)
def _lay_out_bins(keys: Array, mantissa: int, bins: Array, starts: Array) -> int:
    """Bin of every key, and where each bin starts in sorted order; returns the number of bins.

    Bin 0 holds the zeros. `starts` has one more entry than there are bins.
    """
    top, lowest = keys[0], keys[0]
    for i in range(keys.size):
        top = max(top, keys[i])
    lowest = top
    for i in range(keys.size):
        lowest = min(lowest, keys[i] if keys[i] > 0 else top)
    origin = max(np.int64(lowest), np.int64(top) - (_OCTAVES << mantissa))
    wanted = _MIN_BINS
    while wanted < keys.size // 2 and wanted < _MAX_BINS:
        wanted *= 2
    shift = 0
    while ((np.int64(top) - origin) >> shift) >= wanted:
        shift += 1
    count = int((np.int64(top) - origin) >> shift) + 2
    for i in range(keys.size):
        above = np.int64(keys[i]) - origin
        place = 1 + ((above if above > 0 else np.int64(0)) >> shift)
        bins[i] = np.uint32(0 if keys[i] == 0 else place)
    starts[: count + 1] = 0
    for i in range(keys.size):
        starts[bins[i] + 1] += 1
    for b in range(count):
        starts[b + 1] += starts[b]
    return count


@njit(nogil=True, cache=True)
def _sort_bins(keys: Array, bins: Array, starts: Array, count: int, order: Array) -> None:
    """Positions of the keys in ascending order, equal keys by position."""
    following = starts[:count].copy()
    for i in range(keys.size):
        b = bins[i]
        order[following[b]] = i
        following[b] += 1
    for b in range(1, count):
        members = order[starts[b] : starts[b + 1]]
        if members.size <= _INSERTION:
            for i in range(1, members.size):
                moved = members[i]
                key = keys[moved]
                j = i
                while j > 0 and keys[members[j - 1]] > key:
                    members[j] = members[j - 1]
                    j -= 1
                members[j] = moved
            continue
        own = keys[members]
        if not (own[1:] >= own[:-1]).all():
            members[:] = members[np.argsort(own, kind="mergesort")]


@njit(nogil=True, cache=True)
def _rank(keys: Array, position: int) -> int:
    """How many keys come before the one at `position` in a stable ascending sort."""
    key = keys[position]
    before, after = keys[:position], keys[position:]
    rank = 0
    for i in range(before.size):
        rank += before[i] <= key
    for i in range(after.size):
        rank += after[i] < key
    return rank


@njit(nogil=True, cache=True)
def _keep_row(
    keys: Array,
    bits: Array,
    low: float,
    slope: float,
    mantissa: int,
    bins: Array,
    starts: Array,
    limits: Array,
    marks: Array,
    keep: Array,
) -> None:
    """keep[i] = bits[i] < low + slope * rank(i). The fate of zeros is left open."""
    size = keys.size
    count = _lay_out_bins(keys, mantissa, bins, starts)
    for b in range(count + 1):
        limits[b] = np.uint32(min(np.ceil(low + slope * starts[b]), 4294967295.0))
    limits[0] = limits[1]
    for i in range(size):
        b = bins[i]
        surely = bits[i] < limits[b]
        keep[i] = surely
        marks[i] = surely ^ (bits[i] < limits[b + 1])
    # Few entries are open: eight marks are looked at at once.
    eights = marks.view(np.uint64)
    left = 0
    for eight in range(eights.size):
        if eights[eight]:
            for i in range(8 * eight, 8 * eight + 8):
                left += marks[i]
    if left > _SCAN_LIMIT:
        order = np.empty(size, np.int32)
        _sort_bins(keys, bins, starts, count, order)
        for rank in range(size):
            if marks[order[rank]]:
                keep[order[rank]] = np.float64(bits[order[rank]]) < low + slope * rank
        return
    for eight in range(eights.size):
        if eights[eight]:
            for i in range(8 * eight, 8 * eight + 8):
                if marks[i]:
                    keep[i] = np.float64(bits[i]) < low + slope * _rank(keys, i)


@njit(nogil=True, cache=True)
def keep_by_rank(
    values: Array,
    magnitude: Any,
    mantissa: int,
    key: np.uint64,
    start: int,
    length: int,
    stride: int,
    low: float,
    slope: float,
    keep: Array,
) -> None:
    """keep[i] = whether entry i survives: probability low + slope * (rank within its row).

    Args:
        values: the bits of floating-point values as signed integers; whole groups of
            length * stride elements, each made of `stride` interleaved rows of `length`.
        magnitude: the mask that removes the sign.
        mantissa: the type's number of mantissa bits.
        key: the 64-bit random key; element i uses position start + i.
        low, slope: the probability of rank 0 and its growth per rank; slope 0 needs no ranks.
        keep: uint8, one per element; entries that are zero may be kept or not.
    """
    bits = np.empty(values.size, np.uint32)
    uniform_bits(key, start, bits)
    low, slope = low * 4294967296.0, slope * 4294967296.0
    if slope == 0.0:
        always = np.uint32(min(np.ceil(low), 4294967295.0))
        for i in range(values.size):
            keep[i] = bits[i] < always
        return
    keys = np.empty(length, values.dtype)
    bins = np.empty(length, np.uint32)
    starts = np.empty(max(2 * length, 2 * _MIN_BINS) + 4, np.int32)
    limits = np.empty(starts.size, np.uint32)
    marks = np.zeros(-(-length // 8) * 8, np.uint8)
    own_bits = np.empty(length, np.uint32)
    own_keep = np.empty(length, np.uint8)
    for begin in range(0, values.size, length * stride):
        for offset in range(stride):
            first = begin + offset
            if stride == 1:
                stop = first + length
                row = values[first:stop]
                for i in range(length):
                    keys[i] = row[i] & magnitude
                _keep_row(
                    keys,
                    bits[first:stop],
                    low,
                    slope,
                    mantissa,
                    bins,
                    starts,
                    limits,
                    marks,
                    keep[first:stop],
                )
                continue
            for i in range(length):
                keys[i] = values[first + i * stride] & magnitude
                own_bits[i] = bits[first + i * stride]
            _keep_row(keys, own_bits, low, slope, mantissa, bins, starts, limits, marks, own_keep)
            for i in range(length):
                keep[first + i * stride] = own_keep[i]


@njit(nogil=True, cache=True)
def ranks(
    values: Array, magnitude: Any, mantissa: int, length: int, stride: int, out: Array
) -> None:
    """out[i] = the rank of |value i| within its row, 0 the smallest, equal ones by position."""
    keys = np.empty(length, values.dtype)
    bins = np.empty(length, np.uint32)
    starts = np.empty(max(2 * length, 2 * _MIN_BINS) + 4, np.int32)
    order = np.empty(length, np.int32)
    for begin in range(0, values.size, length * stride):
        for offset in range(stride):
            first = begin + offset
            for i in range(length):
                keys[i] = values[first + i * stride] & magnitude
            count = _lay_out_bins(keys, mantissa, bins, starts)
            _sort_bins(keys, bins, starts, count, order)
            for rank in range(length):
                out[first + order[rank] * stride] = rank


@njit(nogil=True, cache=True)
def scale_inverse(row: Array, own_ranks: Array, low: float, slope: float) -> None:
    """row[i] /= low + slope * rank."""
    for i in range(row.size):
        row[i] /= low + slope * own_ranks[i]


@njit(nogil=True, cache=True)
def add_kept_sums(row: Array, keep: Array, grain: int, totals: Array) -> None:
    """totals[0] += sum |row|, totals[1] += the same over kept entries; partial sums per grain."""
    lanes = np.empty((2, _LANES), np.float64)
    for begin in range(0, row.size, grain):
        end = min(begin + grain, row.size)
        lanes[:] = 0.0
        for start in range(begin, end, _LANES):
            stop = min(start + _LANES, end)
            part, kept = row[start:stop], keep[start:stop]
            whole, left = lanes[0], lanes[1]
            for i in range(stop - start):
                size = abs(np.float64(part[i]))
                whole[i] += size
                left[i] += size if kept[i] else 0.0
        for which in range(2):
            total = 0.0
            for i in range(_LANES):
                total += lanes[which, i]
            totals[which] += total


@njit(nogil=True, cache=True)
def pack(keep: Array, start: int, packed: Array) -> None:
    """Store flags 0 or 1 of elements start, start + 1, ... as bits, lowest bit first."""
    head = min((8 - start % 8) % 8, keep.size)
    for i in range(head):
        packed[(start + i) >> 3] |= np.uint8(keep[i] << ((start + i) & 7))
    whole = (keep.size - head) // 8
    target = packed[(start + head) >> 3 : ((start + head) >> 3) + whole]
    for g in range(whole):
        flags = keep[head + 8 * g : head + 8 * g + 8]
        byte = np.uint8(0)
        for j in range(8):
            byte |= np.uint8(flags[j] << j)
        target[g] = byte
    for i in range(head + 8 * whole, keep.size):
        packed[(start + i) >> 3] |= np.uint8(keep[i] << ((start + i) & 7))


@njit(nogil=True, cache=True)
def keep_packed(row: Array, start: int, packed: Array) -> None:
    """Zero the entries whose bit is not set; `row` holds elements start, start + 1, ..."""
    zero = row.dtype.type(0)
    head = min((8 - start % 8) % 8, row.size)
    for i in range(head):
        if not (packed[(start + i) >> 3] >> ((start + i) & 7)) & 1:
            row[i] = zero
    whole = (row.size - head) // 8
    flags = np.empty(_CHUNK, np.uint8)
    eights = flags.view(np.uint64)
    for begin in range(0, whole, eights.size):
        first = head + 8 * begin
        part = row[first : min(first + _CHUNK, head + 8 * whole)]
        source = packed[(start + first) >> 3 : (start + first + part.size) >> 3]
        for g in range(source.size):
            # Bit j of the byte stays in byte j alone.
            eights[g] = (np.uint64(source[g]) * _EVERY_BYTE) & _DIAGONAL
        for i in range(part.size):
            part[i] = part[i] if flags[i] else zero
    for i in range(head + 8 * whole, row.size):
        if not (packed[(start + i) >> 3] >> ((start + i) & 7)) & 1:
            row[i] = zero
