"""Inner products of rows in float64, one partial sum per granule.

Products of float32 entries are exact in float64. Within a granule, 256 lanes accumulate side by
side and are then added in order: the same association on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

_LANES = 256
_GRANULE = 8192


@njit(nogil=True, cache=True)
def gram(rows: Array, out: Array) -> None:
    """Upper triangle of rows @ rows.T per granule: out is (granules, n (n + 1) / 2), row by row."""
    n, size = rows.shape
    lanes = np.empty((out.shape[1], _LANES), np.float64)
    for granule in range(out.shape[0]):
        begin = granule * _GRANULE
        end = min(begin + _GRANULE, size)
        lanes[:] = 0.0
        for start in range(begin, end, _LANES):
            stop = min(start + _LANES, end)
            pair = 0
            for r in range(n):
                left = rows[r, start:stop]
                for s in range(r, n):
                    right = rows[s, start:stop]
                    lane = lanes[pair]
                    for i in range(stop - start):
                        lane[i] += np.float64(left[i]) * np.float64(right[i])
                    pair += 1
        for pair in range(out.shape[1]):
            total = 0.0
            for i in range(_LANES):
                total += lanes[pair, i]
            out[granule, pair] = total


@njit(nogil=True, cache=True)
def add_rows(rows: Array, total: Array) -> None:
    """total += rows[0]; total += rows[1]; ... strictly in order."""
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            total[j] += rows[i, j]


@njit(nogil=True, cache=True)
def running_sums(rows: Array, total: Array, before: Array) -> None:
    """before[i] = total + rows[0] + ... + rows[i - 1]; `total` ends as the sum of everything."""
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            before[i, j] = total[j]
            total[j] += rows[i, j]
