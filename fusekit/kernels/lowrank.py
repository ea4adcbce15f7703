"""Rows of a low-rank product, added to a flat range of a matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1024


@njit(nogil=True, cache=True)
def add_low_rank(left: Array, right: Array, scale: float, start: int, out: Array) -> None:
    """out += scale * (left @ right), elements `[start, start + out.size)` in row-major order.

    `left` is (matrices * rows, rank), `right` (matrices, rank, columns): a stack of matrices. The
    ranks are added in order, per element, so a value does not depend on how the range was cut.
    """
    matrices, rank, columns = right.shape
    rows = left.shape[0] // matrices
    accumulator = np.empty(_CHUNK, out.dtype)
    factor_scale = out.dtype.type(scale)
    position = 0
    while position < out.size:
        row = (start + position) // columns
        column = (start + position) - row * columns
        length = min(_CHUNK, columns - column, out.size - position)
        total = accumulator[:length]
        total[:] = 0
        matrix = right[row // rows]
        for k in range(rank):
            factor = left[row, k]
            part = matrix[k, column : column + length]
            for j in range(length):
                total[j] += factor * part[j]
        target = out[position : position + length]
        for j in range(length):
            target[j] += factor_scale * total[j]
        position += length
