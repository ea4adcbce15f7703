"""Task vectors by how many models changed an entry: one, several or none.

A change is an entry of magnitude greater than an epsilon. bfloat16 operands are given as the bits
that were read, (models + 1, any) with the base last, and where in them the elements begin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusekit.kernels import direct
from fusekit.kernels.floats import MAGNITUDE, as_bits, from_bf16, to_bf16

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1024


@njit(nogil=True, cache=True)
def _count_run(deltas: Array, start: int, epsilon: float, count: Array, out: Array) -> None:
    """Add a run's entries to `count_overlap`; `count` is working memory of its length."""
    n, stop = deltas.shape[0], start + count.size
    count[:] = 0
    for r in range(n):
        row = deltas[r, start:stop]
        for i in range(count.size):
            count[i] += abs(row[i]) > epsilon
    for r in range(n):
        row = deltas[r, start:stop]
        alone, shared = np.int32(0), np.int32(0)
        for i in range(count.size):
            mine = abs(row[i]) > epsilon
            alone += mine & (count[i] == 1)
            shared += mine & (count[i] > 1)
        out[r] += alone
        out[n + r] += shared


@njit(nogil=True, cache=True)
def count_overlap(deltas: Array, epsilon: float, out: Array) -> None:
    """out[r] = entries that model r alone changed, out[n + r] = those it changed among others."""
    count = np.empty(_CHUNK, np.int32)
    out[:] = 0.0
    for start in range(0, deltas.shape[1], _CHUNK):
        length = min(_CHUNK, deltas.shape[1] - start)
        _count_run(deltas, start, epsilon, count[:length], out)


@njit(nogil=True, cache=True)
def _rounded_down(epsilon: float) -> np.float32:
    """The largest float32 that is not greater: what exceeds the one exceeds the other."""
    limit = np.float32(epsilon)
    return np.float32(np.nextafter(limit, np.float32(-1)) if limit > epsilon else limit)


@njit(nogil=True, cache=True)
def _count_three(bits: Array, start: int, stop: int, limit: np.float32, out: Array) -> None:
    """`_count_run` in registers."""
    first, second, third = bits[0, start:stop], bits[1, start:stop], bits[2, start:stop]
    base = bits[3, start:stop]
    a, b, c = np.int32(0), np.int32(0), np.int32(0)
    only_a, only_b, only_c = np.int32(0), np.int32(0), np.int32(0)
    for i in range(base.size):
        origin = from_bf16(base[i])
        p = np.int32(abs(from_bf16(first[i]) - origin) > limit)
        q = np.int32(abs(from_bf16(second[i]) - origin) > limit)
        r = np.int32(abs(from_bf16(third[i]) - origin) > limit)
        alone = np.int32(p + q + r == 1)
        a += p
        b += q
        c += r
        only_a += p & alone
        only_b += q & alone
        only_c += r & alone
    out[0] += only_a
    out[1] += only_b
    out[2] += only_c
    out[3] += a - only_a
    out[4] += b - only_b
    out[5] += c - only_c


@njit(nogil=True, cache=True)
def count_overlap_of_bits(bits: Array, start: int, size: int, epsilon: float, out: Array) -> bool:
    """`count_overlap` of bfloat16 models; False where a value is not finite."""
    count = np.empty(_CHUNK, np.int32)
    deltas = np.empty((bits.shape[0] - 1, _CHUNK), np.float32)
    limit = _rounded_down(epsilon)
    out[:] = 0.0
    for begin in range(start, start + size, _CHUNK):
        length = min(_CHUNK, start + size - begin)
        if not direct.all_finite(bits, begin, begin + length):
            return False
        if bits.shape[0] == 4:
            _count_three(bits, begin, begin + length, limit, out)
            continue
        direct.task_vectors(bits, begin, length, deltas)
        _count_run(deltas, 0, epsilon, count[:length], out)
    return True


@njit(nogil=True, cache=True, error_model="numpy")
def _reinforce_run(
    deltas: Array, start: int, epsilon: float, boosts: Array, boosted: bool, work: Array, out: Array
) -> None:
    """What a run adds to the base in `reinforce`, in float64; `work` is (2, elements at least)."""
    stop = start + out.size
    count, strong = work[0, : out.size], work[1, : out.size]
    count[:] = 0.0
    strong[:] = 0.0
    out[:] = 0.0
    for r in range(deltas.shape[0]):
        row, boost = deltas[r, start:stop], boosts[r]
        if boosted:
            for i in range(out.size):
                x = np.float64(row[i]) if abs(row[i]) > epsilon else 0.0
                count[i] += 1.0 if x != 0.0 else 0.0
                out[i] += x
                strong[i] += boost * x
        else:
            for i in range(out.size):
                x = np.float64(row[i]) if abs(row[i]) > epsilon else 0.0
                count[i] += 1.0 if x != 0.0 else 0.0
                out[i] += x
    for i in range(out.size):
        mean = out[i] / max(count[i], 1.0)
        out[i] = strong[i] if boosted and count[i] == 1.0 else mean


@njit(nogil=True, cache=True)
def reinforce(deltas: Array, epsilon: float, boosts: Array, base: Array, out: Array) -> None:
    """out = base + the mean of changes, or boosts[r] * the change where only model r made one."""
    boosted = bool((boosts != 1.0).any())
    work, changes = np.empty((2, _CHUNK), np.float64), np.empty(_CHUNK, np.float64)
    for start in range(0, out.size, _CHUNK):
        target, origin = out[start : start + _CHUNK], base[start : start + _CHUNK]
        change = changes[: target.size]
        _reinforce_run(deltas, start, epsilon, boosts, boosted, work, change)
        for i in range(target.size):
            target[i] = np.float64(origin[i]) + change[i]


@njit(nogil=True, cache=True)
def _reinforce_three(
    bits: Array, start: int, limit: np.float32, boosts: Array, boosted: bool, out: Array
) -> bool:
    """A run of `reinforce_bits` in registers; whether all results are finite."""
    stop = start + out.size
    first, second, third = bits[0, start:stop], bits[1, start:stop], bits[2, start:stop]
    base, largest, zero = bits[3, start:stop], np.uint32(0), np.float32(0)
    u, v, w = boosts[0], boosts[1], boosts[2]
    for i in range(out.size):
        origin = from_bf16(base[i])
        x, y = from_bf16(first[i]) - origin, from_bf16(second[i]) - origin
        z = from_bf16(third[i]) - origin
        p, q, r = abs(x) > limit, abs(y) > limit, abs(z) > limit
        count = np.int32(p) + np.int32(q) + np.int32(r)
        a, b = np.float64(x if p else zero), np.float64(y if q else zero)
        c = np.float64(z if r else zero)
        change = ((a + b) + c) * (1.0 if count < 2 else (0.5 if count == 2 else 1.0 / 3))
        if boosted:
            change = (u * a + v * b) + w * c if count == 1 else change
        value = np.float32(np.float64(origin) + change)
        out[i] = to_bf16(value)
        largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
    return bool(largest < direct.OVERFLOW)


@njit(nogil=True, cache=True)
def reinforce_bits(bits: Array, start: int, epsilon: float, boosts: Array, out: Array) -> bool:
    """`reinforce` of bfloat16 models, encoded; False where a value is not finite."""
    n, boosted = boosts.size, bool((boosts != 1.0).any())
    work, changes = np.empty((2, _CHUNK), np.float64), np.empty(_CHUNK, np.float64)
    deltas = np.empty((n, _CHUNK), np.float32)
    limit = _rounded_down(epsilon)
    for begin in range(0, out.size, _CHUNK):
        part, at = out[begin : begin + _CHUNK], start + begin
        if not direct.all_finite(bits, at, at + part.size):  # small changes would not show
            return False
        if n == 3:
            if not _reinforce_three(bits, at, limit, boosts, boosted, part):
                return False
            continue
        direct.task_vectors(bits, at, part.size, deltas)
        change = changes[: part.size]
        _reinforce_run(deltas, 0, epsilon, boosts, boosted, work, change)
        if not direct.add_to_base(change, bits[n, at : at + part.size], part):
            return False
    return True
