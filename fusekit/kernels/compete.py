"""Scores of parameters that compete for a place in the merge, and their score-weighted mean.

The exponential and the hyperbolic tangent are polynomials (relative error below 1e-6), so that they
vectorise and give the same bits on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fusekit.kernels import direct, order
from fusekit.kernels.floats import MAGNITUDE, as_bits, from_bf16, to_bf16

Array = np.ndarray[Any, np.dtype[Any]]

TILE = 2048
"""Elements that are worked on together: scores are the same wherever a run begins at a multiple."""

_SIGN = np.uint32(0x80000000)

RAW, NORMALISED, PAIRWISE = 0, 1, 2
"""What a task vector is compared with: the raw sum, the sum of normalised vectors, or each one."""

_SMALL = np.float32(0.02)
_SMALL_BITS = _SMALL.view(np.uint32)
"""Up to this magnitude x - x^3 / 3 is the hyperbolic tangent, to a relative 1e-7."""

_EXP = (
    0.008297647149978436,
    0.04191543138945447,
    0.16667575103164387,
    0.49998894413999606,
    0.9999996918038498,
    1.000000071696903,
)
"""The best polynomial of degree 5 for exp between -ln(2) / 2 and ln(2) / 2: relative 7.5e-8."""


def _exponential(typingctx: Any, x: Any) -> Any:
    """exp(x) for x <= 0, to a relative 1e-6; below -87 as at -87."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, word = arguments[0].type, ir.IntType(32)
        lowest = kind(-87.0)
        x = builder.select(builder.fcmp_ordered("<", arguments[0], lowest), lowest, arguments[0])
        # Adding 1.5 * 2^mantissa leaves the nearest integer in the lowest bits, here with the
        # bias of the exponent, to which they are moved.
        wide = kind == ir.DoubleType()
        rounder = kind((1.5 * 2.0**52 if wide else 1.5 * 2.0**23) + 127.0)
        shifted = builder.fma(x, kind(1.4426950408889634), rounder)
        power = builder.fsub(shifted, rounder)
        r = builder.fma(power, kind(-0.6931471805599453), x)
        series = kind(_EXP[0])
        for coefficient in _EXP[1:]:
            series = builder.fma(series, r, kind(coefficient))
        bits = builder.bitcast(shifted, ir.IntType(64) if wide else word)
        bits = builder.shl(builder.trunc(bits, word) if wide else bits, word(23))
        scale = builder.bitcast(bits, ir.FloatType())
        return builder.fmul(series, context.cast(builder, scale, types.float32, signature.args[0]))

    return x(x), build


def _small_tangent(typingctx: Any, x: Any) -> Any:
    """x - x^3 / 3: tanh(x) of a small x."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        kind = value.type
        bend = builder.fma(builder.fmul(value, value), kind(-1.0 / 3.0), kind(1.0))
        return builder.fmul(value, bend)

    return x(x), build


def _multiply_subtract(typingctx: Any, x: Any, y: Any, z: Any) -> Any:
    """x y - z, rounded once."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(arguments[0], arguments[1], builder.fneg(arguments[2]))

    return x(x, x, x), build


exponential: Any = intrinsic(_exponential)
small_tangent: Any = intrinsic(_small_tangent)
multiply_subtract: Any = intrinsic(_multiply_subtract)


@njit(nogil=True, cache=True)
def tangent(x: Array) -> None:
    """x = tanh(x), in place."""
    kind = x.dtype.type
    one, two = kind(1.0), kind(2.0)
    c3, c5, c7, c9 = kind(-1 / 3), kind(2 / 15), kind(-17 / 315), kind(62 / 2835)
    small, tiny = kind(0.25), kind(_SMALL)
    large, medium = 0, 0
    for i in range(x.size):
        large += abs(x[i]) > small
        medium += abs(x[i]) > tiny
    if medium == 0:
        for i in range(x.size):
            x[i] = small_tangent(x[i])
    elif large:
        for i in range(x.size):
            v = x[i]
            decay = exponential(-two * abs(v))
            square = min(v * v, one)
            near = v * (one + square * (c3 + square * (c5 + square * (c7 + square * c9))))
            far = (one - decay) / (one + decay)
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
def _scored(x: Any, agreement: Any, low: Any, high: Any, scale: Any, count: Any) -> Any:
    """agreement * exp(count (N^2 - 1)) with N = scale * (clip(|x|, low, high) - low)."""
    size = (min(max(abs(x), low), high) - low) * scale
    return agreement * exponential(multiply_subtract(count, size * size, count))


@njit(nogil=True, cache=True)
def _scale(low: Any, high: Any) -> Any:
    """1 / (high - low), or 0 where they are the same."""
    span = high - low
    return (span / span) / span if span > 0 else span - span


@njit(nogil=True, cache=True)
def _weigh_by_size(row: Array, low: Any, high: Any, models: int, out: Array) -> None:
    """out *= exp(models (N^2 - 1)) with N = (clip(|x|, low, high) - low) / (high - low)."""
    scale, count = _scale(low, high), row.dtype.type(models)
    for i in range(row.size):
        out[i] = _scored(row[i], out[i], low, high, scale, count)


@njit(nogil=True, cache=True)
def _score(
    deltas: Array,
    start: int,
    stop: int,
    low: Array,
    high: Array,
    comparison: int,
    work: Array,
    out: Array,
) -> None:
    """`scores` of a tile; `work` is (n + 1, TILE) of the type of the deltas."""
    n, size = deltas.shape[0], stop - start
    total = work[n, :size]
    total[:] = 0
    for r in range(n):
        row = deltas[r, start:stop]
        if comparison != RAW:
            row = work[r, :size]
            _normalise(deltas[r, start:stop], low[r], high[r], row)
        for i in range(size):
            total[i] += row[i]
    if comparison == PAIRWISE:
        out[:, start:stop] = 0
        for r in range(n):
            first, mine = work[r, :size], out[r, start:stop]
            for s in range(r, n):
                second, theirs = work[s, :size], out[s, start:stop]
                for i in range(size):
                    total[i] = first[i] * second[i]
                tangent(total)
                for i in range(size):
                    mine[i] += total[i]
                if s > r:
                    for i in range(size):
                        theirs[i] += total[i]
    else:
        for r in range(n):
            row, target = deltas[r, start:stop], out[r, start:stop]
            for i in range(size):
                target[i] = row[i] * total[i]
            tangent(target)
    for r in range(n):
        _weigh_by_size(deltas[r, start:stop], low[r], high[r], n, out[r, start:stop])


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
    work = np.empty((n + 1, TILE), deltas.dtype)
    for start in range(0, size, TILE):
        stop = min(start + TILE, size)
        _score(deltas, start, stop, low, high, comparison, work, out)


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
    sums = np.empty(TILE, np.float64)
    divisors = np.empty(TILE, np.float64)
    for start in range(0, size, TILE):
        stop = min(start + TILE, size)
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


@njit(nogil=True, cache=True)
def _add_task_vector(model: Array, base: Array, total: Array) -> None:
    """total += model - base."""
    for i in range(total.size):
        total[i] += from_bf16(model[i]) - from_bf16(base[i])


@njit(nogil=True, cache=True)
def _small_keys(
    model: Array, base: Array, total: Array, low: Any, high: Any, models: int, keys: Array
) -> bool:
    """Keys of a row's RAW scores where products are small; whether they all are."""
    scale, count, zero = _scale(low, high), np.float32(models), np.float32(0)
    largest = np.uint32(0)
    for i in range(keys.size):
        x = from_bf16(model[i]) - from_bf16(base[i])
        product = x * total[i]
        largest = max(largest, np.uint32(as_bits(product) & MAGNITUDE))
        agreement = small_tangent(product)
        score = _scored(x, agreement, low, high, scale, count)
        key = as_bits(score + zero)  # -0 and 0 are equal
        keys[i] = key ^ np.uint32(_SIGN | np.uint32(np.int32(key) >> np.int32(31)))
    return bool(largest <= _SMALL_BITS)


@njit(nogil=True, cache=True)
def score_keys(
    bits: Array,
    start: int,
    size: int,
    low: Array,
    high: Array,
    comparison: int,
    keys: Array,
    at: int,
) -> None:
    """Keys that order like the `scores` of bfloat16 task vectors, to keys[:, at : at + size].

    Args:
        bits: (operands, any) of finite numbers, the base last; the wanted elements begin at
            `start`, in the tensor at a multiple of a tile.
        low, high, comparison: as for `scores`.
    """
    n = low.size
    deltas, score = np.empty((n, TILE), np.float32), np.empty((n, TILE), np.float32)
    work = np.empty((n + 1, TILE), np.float32)
    for begin in range(0, size, TILE):
        length = min(TILE, size - begin)
        first, stop = start + begin, start + begin + length
        base, total = bits[n, first:stop], work[n, :length]
        small = comparison == RAW
        if small:
            total[:] = 0
            for r in range(n):
                _add_task_vector(bits[r, first:stop], base, total)
            for r in range(n):
                target = keys[r, at + begin : at + begin + length]
                small &= _small_keys(bits[r, first:stop], base, total, low[r], high[r], n, target)
        if small:
            continue
        direct.task_vectors(bits, first, length, deltas)
        _score(deltas, 0, length, low, high, comparison, work, score)
        for r in range(n):
            target = keys[r, at + begin : at + begin + length]
            order.signed_keys(score[r, :length].view(np.uint32), _SIGN, target)


@njit(nogil=True, cache=True)
def count_scores(
    bits: Array,
    start: int,
    size: int,
    low: Array,
    high: Array,
    comparison: int,
    brackets: Array,
    bins: Array,
    above: Array,
    largest: Array,
) -> None:
    """`order.count_brackets` of `score_keys`, and the rows' largest keys with their numbers.

    `largest` is (n, 2) of int64: key and how often it occurs; updated.
    """
    n = low.size
    memory = np.empty(n * TILE, np.uint32)
    for begin in range(0, size, TILE):
        length = min(TILE, size - begin)
        keys = memory[: n * length].reshape((n, length))
        score_keys(bits, start + begin, length, low, high, comparison, keys, 0)
        order.count_brackets(keys, brackets, bins, above)
        for r in range(n):
            _track_largest(keys[r], largest[r])


@njit(nogil=True, cache=True)
def _track_largest(keys: Array, seen: Array) -> None:
    """Update (largest key so far, how often it occurs)."""
    largest = np.uint32(0)
    for i in range(keys.size):
        largest = max(largest, keys[i])
    if np.int64(largest) < seen[0]:
        return
    times = 0
    for i in range(keys.size):
        times += keys[i] == largest
    if np.int64(largest) > seen[0]:
        seen[0], seen[1] = np.int64(largest), 0
    seen[1] += times


@njit(nogil=True, cache=True)
def _part(
    x: np.float32,
    score: np.float32,
    low: np.float32,
    high: np.float32,
    threshold: np.float32,
    factor: np.float32,
    weight: np.float32,
) -> tuple[np.float32, np.float32]:
    """What an entry adds to numerator and denominator of `scored_mean`."""
    zero = np.float32(0)
    share = max(score - threshold, zero) * factor
    part = weight * (min(max(abs(x), low), high) * share)
    return (part if x > zero else (-part if x < zero else zero)), share


@njit(nogil=True, cache=True)
def _add_small(
    model: Array,
    base: Array,
    total: Array,
    low: np.float32,
    high: np.float32,
    models: int,
    threshold: np.float32,
    factor: np.float32,
    weight: np.float32,
    sums: Array,
    divisors: Array,
) -> bool:
    """Add a model's parts by RAW scores where products are small; whether they all are."""
    scale, count = _scale(low, high), np.float32(models)
    largest = np.uint32(0)
    for i in range(total.size):
        x = from_bf16(model[i]) - from_bf16(base[i])
        product = x * total[i]
        largest = max(largest, np.uint32(as_bits(product) & MAGNITUDE))
        agreement = small_tangent(product)
        score = _scored(x, agreement, low, high, scale, count)
        part, share = _part(x, score, low, high, threshold, factor, weight)
        sums[i] += part
        divisors[i] += share
    return bool(largest <= _SMALL_BITS)


@njit(nogil=True, cache=True)
def _add_scored(
    row: Array,
    score: Array,
    low: np.float32,
    high: np.float32,
    threshold: np.float32,
    factor: np.float32,
    weight: np.float32,
    sums: Array,
    divisors: Array,
) -> None:
    """Add a model's parts by scores already known."""
    for i in range(row.size):
        part, share = _part(row[i], score[i], low, high, threshold, factor, weight)
        sums[i] += part
        divisors[i] += share


@njit(nogil=True, cache=True, error_model="numpy")
def merge_scored(
    bits: Array,
    start: int,
    low: Array,
    high: Array,
    comparison: int,
    threshold: Array,
    factor: Array,
    weights: Array,
    out: Array,
) -> bool:
    """`scored_mean` of bfloat16 models with the scores of their task vectors, encoded.

    Sums are taken in float32. Arguments as for `score_keys` and, in float32, `scored_mean`; `out`
    is (elements,) uint16. Returns whether all values are finite; `out` is else not to be used.
    """
    n = low.size
    deltas, score = np.empty((n, TILE), np.float32), np.empty((n, TILE), np.float32)
    work = np.empty((n + 1, TILE), np.float32)
    memory = np.empty((2, TILE), np.float32)
    least = np.float32(1e-12)
    for begin in range(0, out.size, TILE):
        part = out[begin : begin + TILE]
        at, length = start + begin, part.size
        stop = at + length
        if not direct.all_finite(bits, at, stop):
            return False
        base, total = bits[n, at:stop], work[n, :length]
        sums, divisors = memory[0, :length], memory[1, :length]
        memory[:] = 0
        small = comparison == RAW
        if small:
            total[:] = 0
            for r in range(n):
                _add_task_vector(bits[r, at:stop], base, total)
            for r in range(n):
                small &= _add_small(
                    bits[r, at:stop], base, total, low[r], high[r], n, threshold[r], factor[r],
                    weights[r], sums, divisors,
                )  # fmt: skip
        if not small:
            memory[:] = 0
            direct.task_vectors(bits, at, length, deltas)
            _score(deltas, 0, length, low, high, comparison, work, score)
            for r in range(n):
                _add_scored(
                    deltas[r, :length], score[r, :length], low[r], high[r], threshold[r],
                    factor[r], weights[r], sums, divisors,
                )  # fmt: skip
        largest = np.uint32(0)
        for i in range(length):
            value = from_bf16(base[i]) + sums[i] / max(divisors[i], least)
            part[i] = to_bf16(value)
            largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
        if largest >= direct.OVERFLOW:
            return False
    return True
