"""Inner products along one axis: a Gram matrix per column or per row of a matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]


@njit(nogil=True, cache=True)
def add_column_gram(rows: Array, start: int, state: Array) -> None:
    """Add the products of the elements [start, start + m) to state (pairs, columns)."""
    n, size = rows.shape
    columns = state.shape[1]
    i = 0
    while i < size:
        first = (start + i) % columns
        run = min(size - i, columns - first)
        pair = 0
        for r in range(n):
            left = rows[r, i : i + run]
            for s in range(r, n):
                right = rows[s, i : i + run]
                sums = state[pair, first : first + run]
                for j in range(run):
                    sums[j] += np.float64(left[j]) * np.float64(right[j])
                pair += 1
        i += run


@njit(nogil=True, cache=True)
def add_row_gram(rows: Array, start: int, length: int, state: Array) -> None:
    """Write the products of whole rows of `length` elements to state (pairs, rows)."""
    n, size = rows.shape
    lanes = np.empty(64, np.float64)
    for row in range(size // length):
        begin, end = row * length, (row + 1) * length
        target = start // length + row
        pair = 0
        for r in range(n):
            for s in range(r, n):
                lanes[:] = 0.0
                for at in range(begin, end, 64):
                    stop = min(at + 64, end)
                    left, right = rows[r, at:stop], rows[s, at:stop]
                    for j in range(stop - at):
                        lanes[j] += np.float64(left[j]) * np.float64(right[j])
                total = 0.0
                for j in range(64):
                    total += lanes[j]
                state[pair, target] = total
                pair += 1
