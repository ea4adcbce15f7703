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
        bins[i] = 0 if keys[i] == 0 else 1 + ((above if above > 0 else np.int64(0)) >> shift)
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
    undecided: Array,
    keep: Array,
) -> None:
    """keep[i] = bits[i] < low + slope * rank(i). The fate of zeros is left open."""
    size = keys.size
    always = np.uint32(min(np.ceil(low), 4294967295.0))
    never = np.uint32(min(np.ceil(low + slope * (size - 1)), 4294967295.0))
    for i in range(size):
        keep[i] = bits[i] < always
    open_count = 0
    for i in range(size):
        undecided[open_count] = i
        open_count += (bits[i] >= always) & (bits[i] < never) & (keys[i] != 0)
    count = _lay_out_bins(keys, mantissa, bins, starts)
    left = 0
    for at in range(open_count):
        i = undecided[at]
        number = np.float64(bits[i])
        first, last = starts[bins[i]], starts[bins[i] + 1] - 1
        kept = number < low + slope * first
        keep[i] = kept
        undecided[left] = i
        left += (not kept) & (number < low + slope * last)
    if left <= _SCAN_LIMIT:
        for at in range(left):
            i = undecided[at]
            keep[i] = np.float64(bits[i]) < low + slope * _rank(keys, i)
        return
    order = np.empty(size, np.int32)
    _sort_bins(keys, bins, starts, count, order)
    for rank in range(size):
        i = order[rank]
        if bits[i] >= always and bits[i] < never:
            keep[i] = np.float64(bits[i]) < low + slope * rank


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
    bins = np.empty(length, np.int32)
    starts = np.empty(max(2 * length, 2 * _MIN_BINS) + 4, np.int32)
    undecided = np.empty(length + 1, np.int32)
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
                    undecided,
                    keep[first:stop],
                )
                continue
            for i in range(length):
                keys[i] = values[first + i * stride] & magnitude
                own_bits[i] = bits[first + i * stride]
            _keep_row(keys, own_bits, low, slope, mantissa, bins, starts, undecided, own_keep)
            for i in range(length):
                keep[first + i * stride] = own_keep[i]


@njit(nogil=True, cache=True)
def ranks(
    values: Array, magnitude: Any, mantissa: int, length: int, stride: int, out: Array
) -> None:
    """out[i] = the rank of |value i| within its row, 0 the smallest, equal ones by position."""
    keys = np.empty(length, values.dtype)
    bins = np.empty(length, np.int32)
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
    source = packed[(start + head) >> 3 : ((start + head) >> 3) + whole]
    for g in range(whole):
        byte = np.uint32(source[g])
        part = row[head + 8 * g : head + 8 * g + 8]
        for j in range(8):
            part[j] = part[j] if (byte >> np.uint32(j)) & np.uint32(1) else zero
    for i in range(head + 8 * whole, row.size):
        if not (packed[(start + i) >> 3] >> ((start + i) & 7)) & 1:
            row[i] = zero
