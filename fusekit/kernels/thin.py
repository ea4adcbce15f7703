"""Keeping the positions where models differ most."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1024


@njit(nogil=True, cache=True)
def variance(rows: Array, out: Array) -> None:
    """Population variance over the rows at every position; exactly 0 where all rows are equal.

    mean(d^2) - mean(d)^2 with d the deviations from the first row. As one of the d is 0, their
    variance is at least max(d^2) / n^2 and little is lost to cancellation in float64.
    """
    n, size = rows.shape
    share = 1.0 / n
    sums = np.empty(_CHUNK, np.float64)
    squares = np.empty(_CHUNK, np.float64)
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        total = sums[: stop - start]
        square = squares[: stop - start]
        first = rows[0, start:stop]
        done = 1 + (n - 1) % 2
        if done == 1:
            total[:] = 0.0
            square[:] = 0.0
        else:
            part = rows[1, start:stop]
            for i in range(total.size):
                deviation = np.float64(part[i]) - np.float64(first[i])
                total[i] = deviation
                square[i] = deviation * deviation
        for r in range(done, n, 2):
            part, other = rows[r, start:stop], rows[r + 1, start:stop]
            for i in range(total.size):
                origin = np.float64(first[i])
                x, y = np.float64(part[i]) - origin, np.float64(other[i]) - origin
                total[i] = (total[i] + x) + y
                square[i] = (square[i] + x * x) + y * y
        target = out[start:stop]
        for i in range(total.size):
            mean = total[i] * share
            target[i] = square[i] * share - mean * mean


@njit(nogil=True, cache=True)
def keep_where(chosen: Array, rows: Array) -> None:
    """Zero all rows at the positions where `chosen` is zero."""
    zero = rows.dtype.type(0)
    for r in range(rows.shape[0]):
        row = rows[r]
        for i in range(chosen.size):
            row[i] = row[i] if chosen[i] != 0 else zero
