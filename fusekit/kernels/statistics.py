"""What inspection measures on rows of task vectors: signs, supports, moments, leading directions.

Sums are taken in float64 with a fixed association, so that results do not depend on vector width;
`products` and `power_step` let the compiler reassociate, which changes no digit that is shown.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

_LANES = 64
_CHUNK = 1024
_REASSOCIATE = {"reassoc", "contract", "nsz"}

CONTESTED, CONFLICTED, TOP_CONTESTED, TOP_CONFLICTED, MASS, NET = range(6)
"""Columns of the position counts of `sign_counts`."""


@njit(nogil=True, cache=True)
def powers(rows: Array, out: Array) -> None:
    """out[i] = (sum x, sum x^2, sum x^3, sum x^4) of rows[i]."""
    lanes = np.empty((4, _LANES), np.float64)
    for r in range(rows.shape[0]):
        row = rows[r]
        lanes[:] = 0.0
        for start in range(0, row.size, _LANES):
            part = row[start : start + _LANES]
            first, second, third, fourth = lanes[0], lanes[1], lanes[2], lanes[3]
            for i in range(part.size):
                x = np.float64(part[i])
                square = x * x
                first[i] += x
                second[i] += square
                third[i] += square * x
                fourth[i] += square * square
        for p in range(4):
            total = 0.0
            for i in range(_LANES):
                total += lanes[p, i]
            out[r, p] = total


@njit(nogil=True, cache=True)
def energy_above(row: Array, thresholds: Array, out: Array) -> None:
    """out[t] = sum of x^2 over the entries with |x| >= thresholds[t]."""
    lanes = np.empty(_LANES, np.float64)
    for t in range(thresholds.size):
        threshold = thresholds[t]
        lanes[:] = 0.0
        for start in range(0, row.size, _LANES):
            part = row[start : start + _LANES]
            for i in range(part.size):
                x = np.float64(part[i])
                lanes[i] += x * x if abs(x) >= threshold else 0.0
        out[t] = 0.0
        for i in range(_LANES):
            out[t] += lanes[i]


@njit(nogil=True, cache=True)
def _count_pairs(signs: Array, both: Array, opposed: Array) -> None:
    for r in range(signs.shape[0]):
        for s in range(r, signs.shape[0]):
            left, right = signs[r], signs[s]
            shared = np.int32(0)
            differing = np.int32(0)
            for i in range(left.size):
                product = left[i] * right[i]
                shared += np.int32(product != 0)
                differing += np.int32(product < 0)
            both[r, s] += shared
            opposed[r, s] += differing


@njit(nogil=True, cache=True)
def _count_positions(signs: Array) -> tuple[int, int]:
    n, size = signs.shape
    voters = np.zeros(size, np.int16)
    sums = np.zeros(size, np.int16)
    for r in range(n):
        row = signs[r]
        for i in range(size):
            voters[i] += abs(row[i])
            sums[i] += row[i]
    contested = np.int32(0)
    conflicted = np.int32(0)
    for i in range(size):
        contested += np.int32(voters[i] > 1)
        conflicted += np.int32(abs(sums[i]) < voters[i])
    return int(contested), int(conflicted)


@njit(nogil=True, cache=True)
def _masses(rows: Array) -> tuple[float, float]:
    n, size = rows.shape
    sums = np.zeros(size, np.float64)
    masses = np.zeros(size, np.float64)
    for r in range(n):
        row = rows[r]
        for i in range(size):
            x = np.float64(row[i])
            sums[i] += x
            masses[i] += abs(x)
    mass = net = 0.0
    for i in range(size):
        mass += masses[i]
        net += abs(sums[i])
    return mass, net


@njit(nogil=True, cache=True)
def sign_counts(
    rows: Array, thresholds: Array, both: Array, opposed: Array, positions: Array
) -> None:
    """Count agreement of signs, pair by pair and position by position.

    Args:
        rows: (n, m) task vectors.
        thresholds: (n,) magnitudes from which an entry is among its model's largest.
        both, opposed: (2, n, n), added to: positions where both entries of a pair are non-zero
            (plane 0) or among the largest of both (plane 1), and how many of them differ in sign.
        positions: (6,), added to: positions where two or more entries are non-zero and where both
            signs occur among them, the same among the largest, sum of |x|, sum of |column sum|.
    """
    n, size = rows.shape
    signs = np.empty((2, n, _CHUNK), np.int8)
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        for r in range(n):
            row, threshold = rows[r, start:stop], thresholds[r]
            sign, large = signs[0, r, : stop - start], signs[1, r, : stop - start]
            for i in range(row.size):
                sign[i] = np.int8(row[i] > 0) - np.int8(row[i] < 0)
                large[i] = sign[i] if abs(row[i]) >= threshold else np.int8(0)
        for plane in range(2):
            _count_pairs(signs[plane, :, : stop - start], both[plane], opposed[plane])
            contested, conflicted = _count_positions(signs[plane, :, : stop - start])
            positions[2 * plane] += contested
            positions[2 * plane + 1] += conflicted
        mass, net = _masses(rows[:, start:stop])
        positions[MASS] += mass
        positions[NET] += net


@njit(nogil=True, cache=True, fastmath=_REASSOCIATE)
def _dot(left: Array, right: Array) -> Any:
    total = left.dtype.type(0)
    for i in range(left.size):
        total += left[i] * right[i]
    return total


@njit(nogil=True, cache=True, fastmath=_REASSOCIATE)
def _two_products(left: Array, first: Array, second: Array) -> tuple[float, float]:
    """left @ first and left @ second in float64."""
    one = other = 0.0
    for i in range(left.size):
        x = np.float64(left[i])
        one += x * np.float64(first[i])
        other += x * np.float64(second[i])
    return one, other


@njit(nogil=True, cache=True)
def products(rows: Array, out: Array) -> None:
    """out += upper triangle of rows @ rows.T, row by row; out is (n (n + 1) / 2,)."""
    n, size = rows.shape
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        pair = 0
        for r in range(n):
            left = rows[r, start:stop]
            for s in range(r, n, 2):
                last = s + 1 == n
                second = left if last else rows[s + 1, start:stop]
                one, other = _two_products(left, rows[s, start:stop], second)
                out[pair] += one
                if not last:
                    out[pair + 1] += other
                pair += 1 if last else 2


@njit(nogil=True, cache=True)
def power_step(matrix: Array, vectors: Array, out: Array) -> None:
    """out[j] += matrix.T @ (matrix @ vectors[j]) for a run of whole rows of a matrix."""
    for r in range(matrix.shape[0]):
        row = matrix[r]
        for j in range(vectors.shape[0]):
            weight = _dot(row, vectors[j])
            target = out[j]
            for i in range(row.size):
                target[i] += weight * row[i]
