"""How much every column (or row) of a matrix changed, in size and in direction."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

_LANES = 64


@njit(nogil=True, cache=True)
def add_column_changes(rows: Array, base: Array, start: int, state: Array) -> None:
    """Add b^2, b d_i and d_i^2 (d_i = x_i - b) per column to state (2 n + 1, columns).

    Row 0 of the state belongs to the base, 1 + i to the products, 1 + n + i to the squares.
    """
    n, size = rows.shape
    columns = state.shape[1]
    i = 0
    while i < size:
        first = (start + i) % columns
        run = min(size - i, columns - first)
        origin = base[i : i + run]
        squares = state[0, first : first + run]
        for j in range(run):
            squares[j] += np.float64(origin[j]) * np.float64(origin[j])
        for r in range(n):
            row = rows[r, i : i + run]
            products = state[1 + r, first : first + run]
            changes = state[1 + n + r, first : first + run]
            for j in range(run):
                b = np.float64(origin[j])
                d = np.float64(row[j]) - b
                products[j] += b * d
                changes[j] += d * d
        i += run


@njit(nogil=True, cache=True)
def write_row_changes(rows: Array, base: Array, start: int, length: int, state: Array) -> None:
    """As `add_column_changes` per row: whole rows of `length` elements, state (2 n + 1, rows)."""
    n, size = rows.shape
    lanes = np.empty((3, _LANES), np.float64)
    squares, products, changes = lanes[0], lanes[1], lanes[2]
    for row in range(size // length):
        begin, end = row * length, (row + 1) * length
        target = start // length + row
        for r in range(n):
            lanes[:] = 0.0
            for at in range(begin, end, _LANES):
                stop = min(at + _LANES, end)
                origin, part = base[at:stop], rows[r, at:stop]
                for j in range(stop - at):
                    b = np.float64(origin[j])
                    d = np.float64(part[j]) - b
                    squares[j] += b * b
                    products[j] += b * d
                    changes[j] += d * d
            sums = np.zeros(3)
            for j in range(_LANES):
                sums[0] += squares[j]
                sums[1] += products[j]
                sums[2] += changes[j]
            state[0, target] = sums[0]
            state[1 + r, target] = sums[1]
            state[1 + n + r, target] = sums[2]


@njit(nogil=True, cache=True)
def soft_or_fixed(deltas: Array, thresholds: Array, fixed: float, base: Array, out: Array) -> None:
    """out = base + sum_i s_i d_i elementwise, s = softmax over models of |d|.

    Entries above their model's threshold get s_i = `fixed` instead.
    """
    n, size = deltas.shape
    for i in range(size):
        largest = 0.0
        for r in range(n):
            largest = max(largest, abs(np.float64(deltas[r, i])))
        total = 0.0
        for r in range(n):
            total += np.exp(abs(np.float64(deltas[r, i])) - largest)
        merged = np.float64(base[i])
        for r in range(n):
            d = np.float64(deltas[r, i])
            soft = np.exp(abs(d) - largest) / total
            merged += d * (fixed if abs(d) > thresholds[r] else soft)
        out[i] = merged
