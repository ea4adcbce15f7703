"""Sums of squares, of magnitudes and of values, one partial sum per grain."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

LANES = 256

SQUARES, MAGNITUDES, VALUES = 0, 1, 2
"""What is added up."""


@njit(nogil=True, cache=True)
def sums(rows: Array, what: int, grain: int, out: Array) -> None:
    """out[g, i] = sum of row i over the g-th run of `grain` elements; float64, 256 fixed lanes."""
    n, size = rows.shape
    lanes = np.empty(LANES, np.float64)
    for g in range(out.shape[0]):
        begin, end = g * grain, min((g + 1) * grain, size)
        for r in range(n):
            lanes[:] = 0.0
            for start in range(begin, end, LANES):
                part = rows[r, start : min(start + LANES, end)]
                if what == SQUARES:
                    for i in range(part.size):
                        lanes[i] += np.float64(part[i]) * np.float64(part[i])
                elif what == MAGNITUDES:
                    for i in range(part.size):
                        lanes[i] += abs(np.float64(part[i]))
                else:
                    for i in range(part.size):
                        lanes[i] += np.float64(part[i])
            total = 0.0
            for i in range(LANES):
                total += lanes[i]
            out[g, r] = total


@njit(nogil=True, cache=True)
def mean_by_change(deltas: Array, what: int, base: Array, out: Array) -> None:
    """out = base + sum_i v_i d_i / sum_i v_i elementwise, v = d^2 (SQUARES) or |d|."""
    n, size = deltas.shape
    for i in range(size):
        total = 0.0
        change = 0.0
        for r in range(n):
            d = np.float64(deltas[r, i])
            v = d * d if what == SQUARES else abs(d)
            total += v
            change += v * d
        out[i] = np.float64(base[i]) + (change / total if total > 0.0 else 0.0)
