"""Ranks of magnitudes within rows, by a histogram and sorting within its bins."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

_MIN_BINS = 64
_MAX_BINS = 1 << 20
_OCTAVES = 32
"""Magnitudes this many powers of two below the row's largest share the lowest bin."""

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
def unpack(packed: Array, flags: Array) -> None:
    """flags[i] is not 0 where bit i of `packed` is set, lowest bit of a byte first.

    Both begin at a byte; the length of `flags` is a multiple of 8. What lies behind the last byte
    is left as it is.
    """
    eights = flags.view(np.uint64)
    for g in range(min(eights.size, packed.size)):
        # Bit j of the byte stays in byte j alone.
        eights[g] = (np.uint64(packed[g]) * _EVERY_BYTE) & _DIAGONAL


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
    for begin in range(0, whole, _CHUNK // 8):
        first = head + 8 * begin
        part = row[first : min(first + _CHUNK, head + 8 * whole)]
        unpack(packed[(start + first) >> 3 : (start + first + part.size) >> 3], flags)
        for i in range(part.size):
            part[i] = part[i] if flags[i] else zero
    for i in range(head + 8 * whole, row.size):
        if not (packed[(start + i) >> 3] >> ((start + i) & 7)) & 1:
            row[i] = zero
