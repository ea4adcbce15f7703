"""What is taken over from a second model: bounded moves, and entries of outstanding importance."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusekit.kernels import order
from fusekit.kernels.floats import value_of

Array = np.ndarray[Any, np.dtype[Any]]

_TILE = 4096
_SIGN = np.uint32(0x80000000)


@njit(nogil=True, cache=True)
def move_at_most(start: Array, goal: Array, slope: float, limit: float, out: Array) -> None:
    """out = start + clip(slope * (goal - start), -limit, limit)."""
    for i in range(out.size):
        origin = np.float64(start[i])
        step = slope * (np.float64(goal[i]) - origin)
        out[i] = origin + min(max(step, -limit), limit)


@njit(nogil=True, cache=True)
def importance(
    first: Array, second: Array, factors: Array, start: int, length: int, out: Array
) -> None:
    """out[i] = |second - first| * factors[(start + i) // length], in the type of `out`.

    The operands are of that type or the bits of bfloat16 (uint16).
    """
    kind = out.dtype.type
    i = 0
    while i < out.size:
        row = (start + i) // length
        stop = min(out.size, (row + 1) * length - start)
        factor = kind(factors[row])
        a, b, target = first[i:stop], second[i:stop], out[i:stop]
        for j in range(target.size):
            target[j] = abs(kind(value_of(b[j])) - kind(value_of(a[j]))) * factor
        i = stop


@njit(nogil=True, cache=True)
def count_importances(
    first: Array,
    second: Array,
    factors: Array,
    start: int,
    length: int,
    brackets: Array,
    bins: Array,
    above: Array,
) -> None:
    """`order.count_brackets` of the keys of `importance` in float32."""
    scores = np.empty(_TILE, np.float32)
    keys = np.empty(_TILE, np.uint32)
    for begin in range(0, first.size, _TILE):
        stop = min(begin + _TILE, first.size)
        part, bits = scores[: stop - begin], keys[: stop - begin]
        importance(first[begin:stop], second[begin:stop], factors, start + begin, length, part)
        order.signed_keys(part.view(np.uint32), _SIGN, bits)
        order.count_brackets(bits.reshape((1, bits.size)), brackets, bins, above)


@njit(nogil=True, cache=True)
def choose(
    first: Array, second: Array, factors: Array, start: int, length: int, least: Array, out: Array
) -> None:
    """out = second where the importance is at least least[0], else first.

    Importances are taken in the type of `least`; the operands are of that type or the bits of
    bfloat16 (uint16), and `out` is of theirs.
    """
    kind = least.dtype.type
    limit = least[0]
    i = 0
    while i < out.size:
        row = (start + i) // length
        stop = min(out.size, (row + 1) * length - start)
        factor = kind(factors[row])
        a, b, target = first[i:stop], second[i:stop], out[i:stop]
        for j in range(target.size):
            score = abs(kind(value_of(b[j])) - kind(value_of(a[j]))) * factor
            target[j] = b[j] if score >= limit else a[j]
        i = stop
