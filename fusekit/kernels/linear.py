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
def _few_rows(
    rows: Array, weights: Array, base: Array, base_weight: float, start: int, stop: int, out: Array
) -> None:
    """The weighted sum of at most four rows (and the base), from the registers to `out`."""
    n = rows.shape[0]
    with_base = base.size > 0
    origin = base[start:stop]
    first, a = rows[0, start:stop], weights[0]
    if n == 1:
        for i in range(out.size):
            total = a * np.float64(first[i])
            out[i] = total + base_weight * np.float64(origin[i]) if with_base else total
        return
    second, b = rows[1, start:stop], weights[1]
    if n == 2:
        for i in range(out.size):
            total = a * np.float64(first[i]) + b * np.float64(second[i])
            out[i] = total + base_weight * np.float64(origin[i]) if with_base else total
        return
    third, c = rows[2, start:stop], weights[2]
    if n == 3:
        for i in range(out.size):
            total = a * np.float64(first[i]) + b * np.float64(second[i])
            total += c * np.float64(third[i])
            out[i] = total + base_weight * np.float64(origin[i]) if with_base else total
        return
    fourth, d = rows[3, start:stop], weights[3]
    for i in range(out.size):
        total = a * np.float64(first[i]) + b * np.float64(second[i])
        total = (total + c * np.float64(third[i])) + d * np.float64(fourth[i])
        out[i] = total + base_weight * np.float64(origin[i]) if with_base else total


@njit(nogil=True, cache=True)
def _many_rows(
    rows: Array, weights: Array, base: Array, base_weight: float, start: int, stop: int, out: Array
) -> None:
    """The weighted sum of any number of rows (and the base), two rows a sweep."""
    n = rows.shape[0]
    total = np.zeros(stop - start, np.float64)
    done = 0
    while done + 1 < n:
        left, right = rows[done, start:stop], rows[done + 1, start:stop]
        a, b = weights[done], weights[done + 1]
        for i in range(total.size):
            total[i] = (total[i] + a * np.float64(left[i])) + b * np.float64(right[i])
        done += 2
    if done < n:
        part, a = rows[done, start:stop], weights[done]
        for i in range(total.size):
            total[i] += a * np.float64(part[i])
    if base.size:
        origin = base[start:stop]
        for i in range(total.size):
            total[i] += base_weight * np.float64(origin[i])
    for i in range(total.size):
        out[i] = total[i]


@njit(nogil=True, cache=True)
def weighted_chunk(
    rows: Array, weights: Array, base: Array, base_weight: float, start: int, stop: int, out: Array
) -> None:
    """`weighted_sum` of a few elements; `out` is theirs alone and may be wider than the rows."""
    if 0 < rows.shape[0] <= 4:
        _few_rows(rows, weights, base, base_weight, start, stop, out)
    else:
        _many_rows(rows, weights, base, base_weight, start, stop, out)


@njit(nogil=True, cache=True)
def weighted_sum(rows: Array, weights: Array, base: Array, base_weight: float, out: Array) -> None:
    """out = sum_i weights[i] * rows[i] + base_weight * base; `base` may be empty."""
    for start in range(0, out.size, _CHUNK):
        stop = min(start + _CHUNK, out.size)
        weighted_chunk(rows, weights, base, base_weight, start, stop, out[start:stop])


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
    accumulator = np.empty(_CHUNK, np.float64)
    i = 0
    while i < size:
        k = ((start + i) // repeat) % kinds
        limit = kinds - k if repeat == 1 else repeat - (start + i) % repeat
        run = min(size - i, limit, _CHUNK)
        total = accumulator[:run]
        total[:] = 0.0
        for r in range(n + 1 if base.size else n):
            part = base[i : i + run] if r == n else rows[r, i : i + run]
            if repeat == 1:
                each = weights[r, k : k + run]
                for j in range(run):
                    total[j] += each[j] * np.float64(part[j])
            else:
                weight = weights[r, k]
                for j in range(run):
                    total[j] += weight * np.float64(part[j])
        target = out[i : i + run]
        for j in range(run):
            target[j] = total[j]
        i += run


@njit(nogil=True, cache=True)
def rescale_update(base: Array, scale: float, out: Array) -> None:
    """out = base + scale * (out - base): scales what a merge changed."""
    for i in range(out.size):
        origin = np.float64(base[i])
        out[i] = origin + scale * (np.float64(out[i]) - origin)
