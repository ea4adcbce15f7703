"""Linear combinations of rows, accumulated in float64 and rounded once to the row's type."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1024


@njit(nogil=True, cache=True)
def subtract(rows: Array, base: Array) -> None:
    """rows[i] -= base, in place: models become task vectors."""
    for r in range(rows.shape[0]):
        row = rows[r]
        for i in range(base.size):
            row[i] -= base[i]


@njit(nogil=True, cache=True)
def weighted_sum(rows: Array, weights: Array, base: Array, base_weight: float, out: Array) -> None:
    """out = base_weight * base + sum_i weights[i] * rows[i]; `base` may be empty."""
    n, size = rows.shape
    accumulator = np.empty(_CHUNK, np.float64)
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        total = accumulator[: stop - start]
        if base.size:
            part = base[start:stop]
            for i in range(total.size):
                total[i] = base_weight * np.float64(part[i])
        else:
            total[:] = 0.0
        for r in range(n):
            weight = weights[r]
            part = rows[r, start:stop]
            for i in range(total.size):
                total[i] += weight * np.float64(part[i])
        target = out[start:stop]
        for i in range(total.size):
            target[i] = total[i]


@njit(nogil=True, cache=True)
def indexed_sum(
    rows: Array,
    weights: Array,
    base: Array,
    start: int,
    repeat: int,
    out: Array,
) -> None:
    """out = base_part + sum_i weights[i, k] * rows[i] with k = (position // repeat) % K.

    `weights` is (n + 1, K); its last row weighs `base` (which may be empty). With repeat = 1 and
    K = columns every column has its own weights; with repeat = row length, every row.
    """
    n, size = rows.shape
    kinds = weights.shape[1]
    i = 0
    while i < size:
        k = ((start + i) // repeat) % kinds
        if repeat == 1:
            run = min(size - i, kinds - k)
        else:
            run = min(size - i, repeat - (start + i) % repeat)
        step = 1 if repeat == 1 else 0
        for j in range(run):
            column = k + step * j
            total = weights[n, column] * np.float64(base[i + j]) if base.size else 0.0
            for r in range(n):
                total += weights[r, column] * np.float64(rows[r, i + j])
            out[i + j] = total
        i += run


@njit(nogil=True, cache=True)
def rescale_update(base: Array, scale: float, out: Array) -> None:
    """out = base + scale * (out - base): scales what a merge changed."""
    for i in range(out.size):
        origin = np.float64(base[i])
        out[i] = origin + scale * (np.float64(out[i]) - origin)
