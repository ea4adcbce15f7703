"""How far apart the softmax distributions of two models' rows are."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fusekit.kernels import vectors

Array = np.ndarray[Any, np.dtype[Any]]

_tuple_of: Any = types.UniTuple

_CHUNK = 1024
_LANES = 64
_LOG2_E = 1.4426950408889634
_LN2_HIGH = 6.93147180369123816490e-01
_LN2_LOW = 1.90821492927058770002e-10
_ROUNDER = 6755399441055744.0
"""1.5 * 2^52: adding it leaves a number's nearest integer in the lowest bits."""

_EXPONENT_BIAS = np.int64(1023)

_EXP = tuple(1.0 / n for n in (5040, 720, 120, 24, 6, 2, 1, 1))
_EXP_BEYOND_ONE = tuple(1.0 / n for n in (120, 24, 6, 2))
"""Taylor coefficients of exp(x) and of (exp(x) - 1 - x) / x^2, the highest power's first."""

_LARGEST_WEIGHT = 1.5
_LARGEST_CHANGE = 0.0625
_EPSILON_SHARE = 5e-4
"""Up to these bounds a row is near: the series are accurate to float32, and those in epsilon, which
is at most this share of every probability, may end after the first term."""

_LEAST_SPREAD = 0.01
"""Smallest share of the changes' second moment that has to be variance for the sums to tell it."""


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


def _near_sums(typingctx: Any, first: Any, second: Any, start: Any, runs: Any) -> Any:
    """What `_near_divergence` needs of 16 `runs` elements: six sums, two largest magnitudes.

    With a and d the first model's entries and the changes, w = exp(a) and h = exp(d) - 1 - d:
    w, w d, w h, w d (d + h), d and h, each summed, and the largest |a| and |d|.
    """
    vectors.check_operand(first)
    vectors.check_operand(second)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums = [vectors.variable(builder, vectors.floats(0.0)) for _ in range(6)]
        peaks = [vectors.variable(builder, vectors.ints(0)) for _ in range(2)]
        with vectors.each_run(builder, arguments[3]) as loop:
            run = builder.mul(loop.index, loop.index.type(vectors.LANES))
            at = builder.add(arguments[2], run)
            a, b = (
                vectors.loaded(context, builder, signature.args[i], arguments[i], at)
                for i in range(2)
            )
            d = builder.fsub(b, a)
            # exp(a / 2)^2 reaches twice as far as the series alone.
            root = vectors.polynomial(builder, builder.fmul(a, vectors.floats(0.5)), _EXP)
            w = builder.fmul(root, root)
            series = vectors.polynomial(builder, d, _EXP_BEYOND_ONE)
            h = builder.fmul(builder.fmul(d, d), series)
            wd = builder.fmul(w, d)
            for place, x in ((0, w), (1, wd), (4, d), (5, h)):
                builder.store(builder.fadd(builder.load(sums[place]), x), sums[place])
            for place, x, y in ((2, w, h), (3, wd, builder.fadd(d, h))):
                before = builder.load(sums[place])
                builder.store(vectors.multiply_add(builder, x, y, before), sums[place])
            for peak, x in zip(peaks, (a, d), strict=True):
                bits = vectors.magnitude_bits(builder, x)
                builder.store(vectors.larger(builder, bits, builder.load(peak)), peak)
        results = [vectors.total(builder, builder.load(place)) for place in sums]
        for place in peaks:
            peak = vectors.folded(builder, builder.load(place), vectors.larger)
            results.append(builder.fpext(builder.bitcast(peak, ir.FloatType()), ir.DoubleType()))
        return context.make_tuple(builder, signature.return_type, results)

    return _tuple_of(types.float64, 8)(first, second, types.intp, types.intp), build


_near_sums_of: Any = intrinsic(_near_sums)


@njit(nogil=True, cache=True)
def _add_run(first: Array, second: Array, start: int, runs: int, sums: Array) -> bool:
    """Add to `_near_sums`; whether all entries are within the bounds."""
    found = _near_sums_of(first, second, start, runs)
    for i in range(6):
        sums[i] += found[i]
    for i in range(6, 8):
        sums[i] = max(sums[i], found[i])
    return bool(found[6] <= _LARGEST_WEIGHT and found[7] <= _LARGEST_CHANGE)


@njit(nogil=True, cache=True)
def _near_divergence(
    first: Array, second: Array, epsilon: float, sums: Array, rest: Array
) -> float:
    """sum P log(P / Q) of two rows that differ little; NaN where they are not near enough.

    With q the softmax of the first row and d the changes, the softmax of the second is
    p = q exp(d) / (1 + M), M = sum q (exp(d) - 1), and log(p / q) = d - log(1 + M): only one row is
    exponentiated, and no logarithm is taken. What is of first order in d cancels exactly, whatever
    the roundings of its sum; what remains is summed without cancellation. epsilon adds
    epsilon sum (1 + log(p / q) - p / q), to its first order.

    `sums` (8,) and `rest` (2, LANES) of the operands' type are working memory.
    """
    size = first.size
    sums[:] = 0.0
    for start in range(0, size, _CHUNK):
        runs = min(_CHUNK, size - start) // vectors.LANES
        if not _add_run(first, second, start, runs, sums):
            return np.nan
    tail = size % vectors.LANES
    if tail:
        rest[:] = 0
        rest[0, :tail], rest[1, :tail] = first[size - tail :], second[size - tail :]
        if not _add_run(rest[0], rest[1], 0, 1, sums):
            return np.nan
        sums[0] -= vectors.LANES - tail  # exp(0) where there is nothing
    if sums[7] == 0.0:
        return 0.0
    weight = sums[0]
    if epsilon * weight * np.exp(sums[6]) > _EPSILON_SHARE:
        return np.nan
    linear, beyond, square = sums[1] / weight, sums[2] / weight, sums[3] / weight
    growth = linear + beyond
    shift = np.log1p(growth)
    divergence = (linear + square) / (1.0 + growth) - shift
    if divergence < _LEAST_SPREAD * square:
        return np.nan
    ratios = (size + sums[4] + sums[5]) / (1.0 + growth)
    return float(divergence + epsilon * (sums[4] - size * shift + (size - ratios)))


@njit(nogil=True, cache=True)
def near(first: Array, second: Array, length: int, epsilon: float, out: Array) -> bool:
    """`softmax` in float32, to a relative 1e-6, of the rows that differ little; NaN for others.

    The operands are float32 or the bits of bfloat16 (uint16). Returns whether all rows are near.
    """
    everywhere = True
    sums = np.empty(8, np.float64)
    rest = np.empty((2, vectors.LANES), first.dtype)
    for r in range(out.size):
        begin, end = r * length, (r + 1) * length
        out[r] = _near_divergence(first[begin:end], second[begin:end], epsilon, sums, rest)
        everywhere &= out[r] == out[r]
    return everywhere


@njit(nogil=True, cache=True)
def softmax(first: Array, second: Array, length: int, epsilon: float, out: Array) -> None:
    """out[r] = sum P log(P / Q) over the r-th `length` entries, where it is NaN before.

    P is the softmax of `second` plus epsilon, Q that of `first`.
    """
    p = np.empty(length, np.float64)
    q = np.empty(length, np.float64)
    scratch = np.empty(_CHUNK, np.float64)
    for r in range(out.size):
        if out[r] == out[r]:
            continue
        begin, end = r * length, (r + 1) * length
        p_total = _exponentials(second[begin:end], p, scratch)
        q_total = _exponentials(first[begin:end], q, scratch)
        out[r] = _divergence(p, q, p_total, q_total, epsilon)
