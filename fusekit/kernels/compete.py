"""Scores of parameters that compete for a place in the merge, and their score-weighted mean.

The exponential and the hyperbolic tangent are polynomials (relative error below 1e-6), so that they
vectorise and give the same bits on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1024

RAW, NORMALISED, PAIRWISE = 0, 1, 2
"""What a task vector is compared with: the raw sum, the sum of normalised vectors, or each one."""


@njit(nogil=True, cache=True)
def exponential(x: Array, powers: Array) -> None:
    """x = exp(x), in place, for x <= 0; below -87 as at -87. `powers` is int32 scratch."""
    kind = x.dtype.type
    two_to = powers.view(np.float32)
    log2e, ln2_high, ln2_low = kind(1.4426950408889634), kind(0.693359375), kind(-2.12194440e-4)
    half, lowest = kind(0.5), kind(-87.0)
    c6, c5, c4, c3 = kind(1 / 720), kind(1 / 120), kind(1 / 24), kind(1 / 6)
    one = kind(1.0)
    for i in range(x.size):
        v = max(x[i], lowest)
        k = np.int32(v * log2e - half)
        powers[i] = (k + np.int32(127)) << np.int32(23)
        part = kind(k)
        x[i] = (v - part * ln2_high) - part * ln2_low
    for i in range(x.size):
        r = x[i]
        series = ((((c6 * r + c5) * r + c4) * r + c3) * r + half) * r + one
        x[i] = (series * r + one) * kind(two_to[i])


@njit(nogil=True, cache=True)
def tangent(x: Array, work: Array, powers: Array) -> None:
    """x = tanh(x), in place; `work` and `powers` (int32) are scratch of the same length."""
    kind = x.dtype.type
    one, two = kind(1.0), kind(2.0)
    c3, c5, c7, c9 = kind(-1 / 3), kind(2 / 15), kind(-17 / 315), kind(62 / 2835)
    small = kind(0.25)
    tiny = kind(0.02)
    large, medium = 0, 0
    for i in range(x.size):
        large += abs(x[i]) > small
        medium += abs(x[i]) > tiny
    if medium == 0:
        for i in range(x.size):
            v = x[i]
            x[i] = v * (one + v * v * c3)
    elif large:
        for i in range(x.size):
            work[i] = -two * abs(x[i])
        exponential(work, powers)
        for i in range(x.size):
            v = x[i]
            square = min(v * v, one)
            near = v * (one + square * (c3 + square * (c5 + square * (c7 + square * c9))))
            far = (one - work[i]) / (one + work[i])
            x[i] = near if abs(v) < small else (far if v > 0 else -far)
    else:
        for i in range(x.size):
            v = x[i]
            square = v * v
            x[i] = v * (one + square * (c3 + square * (c5 + square * (c7 + square * c9))))


@njit(nogil=True, cache=True)
def _normalise(row: Array, low: Any, high: Any, out: Array) -> None:
    """out = sign(x) (clip(|x|, low, high) - low) / (high - low); 0 where low == high."""
    zero = row.dtype.type(0)
    span = high - low
    scale = row.dtype.type(1) / span if span > 0 else zero
    for i in range(row.size):
        x = row[i]
        size = (min(max(abs(x), low), high) - low) * scale
        out[i] = size if x > 0 else (-size if x < 0 else zero)


@njit(nogil=True, cache=True)
def scores(deltas: Array, low: Array, high: Array, comparison: int, out: Array) -> None:
    """out = exp(n (N^2 - 1)) * agreement: how much every entry of every task vector matters.

    N is the magnitude clipped to [low, high] and scaled to [0, 1]. The agreement of model i is
    tanh(x_i sum_j x_j) (RAW), tanh(x_i sum_j sign(x_j) N_j) (NORMALISED) or
    sum_j tanh(sign(x_i x_j) N_i N_j) (PAIRWISE).

    Args:
        deltas: (n, m) task vectors.
        low, high: (n,) of the same dtype.
        out: (n, m); must not overlap `deltas`.
    """
    n, size = deltas.shape
    kind = deltas.dtype.type
    models = kind(n)
    signed = np.empty((n, _CHUNK), deltas.dtype)
    buffers = np.empty((2, _CHUNK), deltas.dtype)
    totals = np.empty(_CHUNK, np.float64)
    integers = np.empty(_CHUNK, np.int32)
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        length = stop - start
        total, value, work = totals[:length], buffers[0, :length], buffers[1, :length]
        powers = integers[:length]
        total[:] = 0.0
        for r in range(n):
            row = deltas[r, start:stop]
            normal = signed[r, :length]
            _normalise(row, low[r], high[r], normal)
            summand = row if comparison == RAW else normal
            for i in range(length):
                total[i] += np.float64(summand[i])
        if comparison == PAIRWISE:
            out[:, start:stop] = 0
            for r in range(n):
                first, mine = signed[r, :length], out[r, start:stop]
                for s in range(r, n):
                    second, theirs = signed[s, :length], out[s, start:stop]
                    for i in range(length):
                        value[i] = first[i] * second[i]
                    tangent(value, work, powers)
                    for i in range(length):
                        mine[i] += value[i]
                    if s > r:
                        for i in range(length):
                            theirs[i] += value[i]
        else:
            for r in range(n):
                row, target = deltas[r, start:stop], out[r, start:stop]
                for i in range(length):
                    value[i] = row[i] * kind(total[i])
                tangent(value, work, powers)
                target[:] = value
        for r in range(n):
            normal, target = signed[r, :length], out[r, start:stop]
            for i in range(length):
                value[i] = models * (normal[i] * normal[i] - kind(1))
            exponential(value, powers)
            for i in range(length):
                target[i] *= value[i]


@njit(nogil=True, cache=True)
def scored_mean(
    deltas: Array,
    score: Array,
    low: Array,
    high: Array,
    threshold: Array,
    factor: Array,
    weights: Array,
    base: Array,
    out: Array,
) -> None:
    """out = base + sum_i weights[i] c_i s_i / sum_i s_i, with s_i = (score_i - threshold_i)_+.

    c_i is the task vector with its magnitudes clipped to [low, high]; s_i is multiplied by factor_i
    and where nothing is left (sum below 1e-12) the base stays.
    """
    n, size = deltas.shape
    sums = np.empty(_CHUNK, np.float64)
    divisors = np.empty(_CHUNK, np.float64)
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        total, divisor = sums[: stop - start], divisors[: stop - start]
        total[:] = 0.0
        divisor[:] = 0.0
        for r in range(n):
            row, own = deltas[r, start:stop], score[r, start:stop]
            least, most = low[r], high[r]
            weight, cut, scale = weights[r], threshold[r], factor[r]
            for i in range(total.size):
                x = row[i]
                share = max(np.float64(own[i]) - cut, 0.0) * scale
                clipped = np.float64(min(max(abs(x), least), most))
                kept = share if x > 0 else (-share if x < 0 else 0.0)
                total[i] += weight * clipped * kept
                divisor[i] += share
        origin, target = base[start:stop], out[start:stop]
        for i in range(total.size):
            target[i] = np.float64(origin[i]) + total[i] / max(divisor[i], 1e-12)
