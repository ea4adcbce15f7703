"""What is taken over from a second model: bounded moves, and entries of outstanding importance."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1024
_LANES = 64
_LOG2_E = 1.4426950408889634
_LN2_HIGH = 6.93147180369123816490e-01
_LN2_LOW = 1.90821492927058770002e-10
_ROUNDER = 6755399441055744.0
"""1.5 * 2^52: adding it leaves a number's nearest integer in the lowest bits."""

_EXPONENT_BIAS = np.int64(1023)


@njit(nogil=True, cache=True)
def move_at_most(start: Array, goal: Array, slope: float, limit: float, out: Array) -> None:
    """out = start + clip(slope * (goal - start), -limit, limit)."""
    for i in range(out.size):
        origin = np.float64(start[i])
        step = slope * (np.float64(goal[i]) - origin)
        out[i] = origin + min(max(step, -limit), limit)


@njit(nogil=True, cache=True)
def _exponentials(row: Array, out: Array, scratch: Array) -> float:
    """out = exp(row - max(row)); returns their sum. Accurate to a few units in the last place."""
    lanes = np.full(_LANES, np.float64(row[0]))
    for start in range(0, row.size, _LANES):
        run = row[start : start + _LANES]
        for i in range(run.size):
            lanes[i] = run[i] if run[i] > lanes[i] else lanes[i]
    largest = lanes.max()
    lanes[:] = 0.0
    integers = scratch.view(np.int64)
    for start in range(0, row.size, _CHUNK):
        stop = min(start + _CHUNK, row.size)
        part, target = row[start:stop], out[start:stop]
        for i in range(target.size):
            x = np.float64(part[i]) - largest
            x = x if x > -700.0 else -700.0
            shifted = x * _LOG2_E + _ROUNDER
            n = shifted - _ROUNDER
            scratch[i] = shifted
            r = (x - n * _LN2_HIGH) - n * _LN2_LOW
            # Taylor to degree 11, in pairs to shorten the chain: |r| <= ln(2) / 2, the rest is
            # below 1e-14.
            r2 = r * r
            r4 = r2 * r2
            low = (1.0 + r) + r2 * (0.5 + r * (1.0 / 6.0))
            middle = (1.0 / 24.0 + r * (1.0 / 120.0)) + r2 * (1.0 / 720.0 + r * (1.0 / 5040.0))
            high = (1.0 / 40320.0 + r * (1.0 / 362880.0)) + r2 * (
                1.0 / 3628800.0 + r * (1.0 / 39916800.0)
            )
            target[i] = low + r4 * (middle + r4 * high)
        for i in range(target.size):
            integers[i] = (integers[i] + _EXPONENT_BIAS) << np.int64(52)
        for i in range(target.size):
            target[i] *= scratch[i]
        for begin in range(0, target.size, _LANES):
            run = target[begin : begin + _LANES]
            for i in range(run.size):
                lanes[i] += run[i]
    total = 0.0
    for i in range(_LANES):
        total += lanes[i]
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def _divergence(p: Array, q: Array, p_total: float, q_total: float, epsilon: float) -> float:
    """sum P log(P / Q) with P = p / p_total + epsilon and Q likewise."""
    p_scale, q_scale = 1.0 / p_total, 1.0 / q_total
    lanes = np.zeros(_LANES, np.float64)
    for start in range(0, p.size, _LANES):
        ps, qs = p[start : start + _LANES], q[start : start + _LANES]
        apart = 0
        for i in range(ps.size):
            x, y = ps[i] * p_scale + epsilon, qs[i] * q_scale + epsilon
            apart += (x > 1.4 * y) | (y > 1.4 * x)
        if apart:
            for i in range(ps.size):
                x, y = ps[i] * p_scale + epsilon, qs[i] * q_scale + epsilon
                lanes[i] += x * np.log(x / y)
            continue
        for i in range(ps.size):
            x, y = ps[i] * p_scale + epsilon, qs[i] * q_scale + epsilon
            # log(x / y) = 2 artanh f; |f| <= 1/6, the rest of the series is below 1e-13.
            f = (x - y) / (x + y)
            s = f * f
            s2 = s * s
            low = (1.0 + s * (1.0 / 3.0)) + s2 * (1.0 / 5.0 + s * (1.0 / 7.0))
            high = (1.0 / 9.0 + s * (1.0 / 11.0)) + s2 * (1.0 / 13.0 + s * (1.0 / 15.0))
            series = low + (s2 * s2) * high
            lanes[i] += 2.0 * x * f * series
    total = 0.0
    for i in range(_LANES):
        total += lanes[i]
    return total


@njit(nogil=True, cache=True)
def softmax_divergences(
    first: Array, second: Array, length: int, epsilon: float, out: Array
) -> None:
    """out[r] = sum P log(P / Q) over the r-th `length` entries.

    P is the softmax of `second` plus epsilon, Q that of `first`.
    """
    p = np.empty(length, np.float64)
    q = np.empty(length, np.float64)
    scratch = np.empty(_CHUNK, np.float64)
    for r in range(out.size):
        begin, end = r * length, (r + 1) * length
        p_total = _exponentials(second[begin:end], p, scratch)
        q_total = _exponentials(first[begin:end], q, scratch)
        out[r] = _divergence(p, q, p_total, q_total, epsilon)


@njit(nogil=True, cache=True)
def importance(
    first: Array, second: Array, factors: Array, start: int, length: int, out: Array
) -> None:
    """out[i] = |second - first| * factors[(start + i) // length]."""
    i = 0
    while i < out.size:
        row = (start + i) // length
        stop = min(out.size, (row + 1) * length - start)
        factor = factors[row]
        a, b, target = first[i:stop], second[i:stop], out[i:stop]
        for j in range(target.size):
            target[j] = abs(np.float64(b[j]) - np.float64(a[j])) * factor
        i = stop


@njit(nogil=True, cache=True)
def choose(first: Array, second: Array, scores: Array, threshold: float, out: Array) -> None:
    """out = second where the score reaches the threshold, else first."""
    for i in range(out.size):
        out[i] = second[i] if scores[i] >= threshold else first[i]
