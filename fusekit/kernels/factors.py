"""Magnitudes near a threshold, and elected means, of rows in memory (LoRA factors, updates)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusekit.kernels.floats import MAGNITUDE

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1024
_SWEEP = 64
_HALF = np.uint32(16)


@njit(nogil=True, cache=True)
def collect(bits: Array, upper: int, found: Array) -> int:
    """Write the float32 magnitudes whose bits have that upper half to `found`; return how many.

    Few have it: a vectorised sweep over 64 at a time tells where to look.
    """
    half, count = np.uint32(upper), 0
    for start in range(0, bits.size, _SWEEP):
        part = bits[start : start + _SWEEP]
        inside = np.uint32(0)
        for i in range(part.size):
            inside += np.uint32((part[i] & MAGNITUDE) >> _HALF == half)
        if inside > 0:
            for i in range(part.size):
                if (part[i] & MAGNITUDE) >> _HALF == half:
                    found[count] = part[i] & MAGNITUDE
                    count += 1
    return count


@njit(nogil=True, cache=True)
def mean_of_agreeing(rows: Array, weights: Array, by_sign: bool, out: Array) -> None:
    """out = the weighted sum of the entries that have the elected sign, over their number.

    Elected is the sign of the entries' sum, or of the sum of their signs; plus where that is zero.

    Args:
        rows: (n, m) float32.
        weights: (n,) float32; they do not vote.
        by_sign: whether signs vote instead of values.
        out: (m,) float32.
    """
    zero, one = np.float32(0), np.float32(1)
    votes = np.empty(_CHUNK, np.float32)
    count = np.empty(_CHUNK, np.float32)
    for start in range(0, out.size, _CHUNK):
        target = out[start : start + _CHUNK]
        votes[:] = zero
        for r in range(rows.shape[0]):
            row = rows[r, start : start + _CHUNK]
            if by_sign:
                for i in range(target.size):
                    votes[i] += np.float32(row[i] > zero) - np.float32(row[i] < zero)
            else:
                for i in range(target.size):
                    votes[i] += row[i]
        for i in range(target.size):
            votes[i] = one if votes[i] >= zero else -one
        target[:] = zero
        count[:] = zero
        for r in range(rows.shape[0]):
            row, weight = rows[r, start : start + _CHUNK], weights[r]
            for i in range(target.size):
                agrees = row[i] * votes[i] > zero
                target[i] += weight * row[i] if agrees else zero
                count[i] += one if agrees else zero
        for i in range(target.size):
            target[i] = target[i] / max(count[i], one)
