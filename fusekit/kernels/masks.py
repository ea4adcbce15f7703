"""One bit per entry and task: electing a unified vector, who needs which entry, packing bits.

Masks under construction are (tasks, padded) arrays of 0 and 1, padded with zeros to whole bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusekit.kernels import elect

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1024
_LANES = 256
_GATHER = np.uint64(0x0102040810204080)
"""Multiplying eight bytes of 0 or 1 by it brings them, first one lowest, into the top byte."""


@njit(nogil=True, cache=True)
def unify(deltas: Array, update: Array, keep: Array) -> None:
    """update = s max{|d_i| : d_i s > 0} with s the sign of sum_i d_i (0 counts as -1).

    keep[i] says where task i agrees with s: d_i s > 0.
    """
    n, size = deltas.shape
    keep[:, size:] = 0
    signs = np.empty(_CHUNK, deltas.dtype)
    totals, ballots = np.empty(_CHUNK, np.float64), np.ones(n)
    one = deltas.dtype.type(1)
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        sign, total = signs[: stop - start], totals[: stop - start]
        best = update[start:stop]
        elect.votes(deltas, start, ballots, elect.MASS, total)
        for i in range(total.size):
            sign[i] = one if total[i] > 0.0 else -one
        best[:] = 0
        for r in range(n):
            row, kept = deltas[r, start:stop], keep[r, start:stop]
            for i in range(total.size):
                agreeing = row[i] * sign[i]
                kept[i] = agreeing > 0
                best[i] = agreeing if agreeing > best[i] else best[i]
        for i in range(total.size):
            best[i] *= sign[i]


@njit(nogil=True, cache=True)
def stand_out(deltas: Array, update: Array, ratios: Array, keep: Array) -> None:
    """keep[i] = |d_i| > ratios[i] |update - d_i|: the others disturb the entry little."""
    n, size = deltas.shape
    keep[:, size:] = 0
    for r in range(n):
        row, kept, ratio = deltas[r], keep[r, :size], ratios[r]
        for i in range(size):
            d = np.float64(row[i])
            kept[i] = abs(d) > ratio * abs(np.float64(update[i]) - d)


@njit(nogil=True, cache=True)
def pack(keep: Array, bits: Array) -> None:
    """bits[i, j] has the entries 8 j .. 8 j + 7 of keep[i], the first in its lowest bit."""
    for r in range(keep.shape[0]):
        words = keep[r].view(np.uint64)
        target = bits[r]
        for j in range(words.size):
            target[j] = np.uint8((words[j] * _GATHER) >> np.uint64(56))


@njit(nogil=True, cache=True)
def kept_sums(update: Array, keep: Array, grain: int, out: Array) -> None:
    """out[g, i] = sum of |update| where keep[i], over the g-th run of `grain` elements."""
    size = update.size
    lanes = np.empty(_LANES, np.float64)
    for g in range(out.shape[0]):
        begin, end = g * grain, min((g + 1) * grain, size)
        for r in range(keep.shape[0]):
            lanes[:] = 0.0
            for start in range(begin, end, _LANES):
                stop = min(start + _LANES, end)
                part, kept = update[start:stop], keep[r, start:stop]
                for i in range(part.size):
                    lanes[i] += abs(np.float64(part[i])) * np.float64(kept[i])
            total = 0.0
            for i in range(_LANES):
                total += lanes[i]
            out[g, r] = total


@njit(nogil=True, cache=True)
def add_needed(
    update: Array, keep: Array, tasks: int, scale: float, base: Array, out: Array
) -> None:
    """out = base + scale * update where at least `tasks` masks are set, else base."""
    n = keep.shape[0]
    counts = np.empty(_CHUNK, np.int32)
    for start in range(0, out.size, _CHUNK):
        stop = min(start + _CHUNK, out.size)
        count, part = counts[: stop - start], update[start:stop]
        origin, target = base[start:stop], out[start:stop]
        count[:] = 0
        for r in range(n):
            kept = keep[r, start:stop]
            for i in range(count.size):
                count[i] += kept[i]
        for i in range(count.size):
            change = scale * np.float64(part[i]) if count[i] >= tasks else 0.0
            target[i] = np.float64(origin[i]) + change


@njit(nogil=True, cache=True)
def add_masked(model: Array, bits: Array, scale: float, base: Array, out: Array) -> None:
    """out = base + scale * (model - base) where the packed bit is set, else base."""
    for i in range(out.size):
        origin = np.float64(base[i])
        kept = (bits[i >> 3] >> (i & 7)) & 1
        out[i] = origin + (scale * (np.float64(model[i]) - origin) if kept else 0.0)
