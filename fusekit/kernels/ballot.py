"""bfloat16 updates of three models elected from and merged in registers.

Several kernels decide in their own ways which updates are kept and share what follows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from fusekit.kernels.elect import vote_of_three
from fusekit.kernels.floats import MAGNITUDE, as_bits, from_bf16, to_bf16

Array = np.ndarray[Any, np.dtype[Any]]


class Election(NamedTuple):
    """How three updates are merged: votes are summed as if in float64, what agrees in float32."""

    a: float
    b: float
    c: float
    """What multiplies the updates in the vote."""
    alike: bool
    """Whether that is 1 for all of them."""
    u: np.float32
    v: np.float32
    w: np.float32
    """Their weights."""
    divide: bool
    """Whether the sum is divided by the weights of what agrees."""
    scale: np.float32
    """Of the merged update."""


def election(ballots: Array, weights: Array, divide: bool, scale: float) -> Election:
    """An election by mass among three models, whose weights are rounded to float32."""
    a, b, c = ballots.tolist()
    u, v, w = weights.astype(np.float32)
    return Election(a, b, c, a == b == c == 1.0, u, v, w, divide, np.float32(scale))


@njit(nogil=True, cache=True)
def summed_sign(x: np.float32, y: np.float32, z: np.float32) -> np.float32:
    """-1 where x + y + z < 0, else 1: exact, in float32."""
    return np.float32(-1) if vote_of_three(x, y, z) < np.float32(0) else np.float32(1)


@njit(nogil=True, cache=True)
def voted_sign(x: np.float32, y: np.float32, z: np.float32, rule: Election) -> np.float32:
    """-1 where a x + b y + c z < 0, else 1."""
    vote = (rule.a * np.float64(x) + rule.b * np.float64(y)) + rule.c * np.float64(z)
    return np.float32(-1) if vote < 0.0 else np.float32(1)


@njit(nogil=True, cache=True, error_model="numpy")
def elected(
    origin: np.float32,
    x: np.float32,
    y: np.float32,
    z: np.float32,
    sign: np.float32,
    rule: Election,
) -> np.float32:
    """The merged weight: updates of the elected sign are summed."""
    one, zero = np.float32(1), np.float32(0)
    x, y, z = rule.u * x, rule.v * y, rule.w * z
    agrees, too, as_well = x * sign > zero, y * sign > zero, z * sign > zero
    merged = ((x if agrees else zero) + (y if too else zero)) + (z if as_well else zero)
    if rule.divide:
        kept = (rule.u if agrees else zero) + (rule.v if too else zero)
        kept = kept + (rule.w if as_well else zero)
        merged = merged / (kept if kept != zero else one)
    return np.float32(origin + rule.scale * merged)


@njit(nogil=True, cache=True, error_model="numpy")
def merge_kept(
    bits: Array, begin: int, kept: Array, factors: Array, rule: Election, out: Array
) -> np.uint32:
    """Merge and encode a run; the bits of the largest magnitude.

    Args:
        bits: (4, any) of bfloat16, the base last; the run starts at `begin`.
        kept: (3, elements at least) which updates take part: 0 or not, of uint8.
        factors: (3,) float32 by which updates are multiplied first.
        rule: the election.
        out: (elements,) uint16.
    """
    stop = begin + out.size
    first, second, third = bits[0, begin:stop], bits[1, begin:stop], bits[2, begin:stop]
    base, one, two, three = bits[3, begin:stop], kept[0], kept[1], kept[2]
    p, q, r = factors[0], factors[1], factors[2]
    zero, largest = np.float32(0), np.uint32(0)
    if rule.alike:
        for i in range(out.size):
            origin = from_bf16(base[i])
            x, y = p * (from_bf16(first[i]) - origin), q * (from_bf16(second[i]) - origin)
            z = r * (from_bf16(third[i]) - origin)
            x, y, z = x if one[i] else zero, y if two[i] else zero, z if three[i] else zero
            value = elected(origin, x, y, z, summed_sign(x, y, z), rule)
            out[i] = to_bf16(value)
            largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
        return largest
    for i in range(out.size):
        origin = from_bf16(base[i])
        x, y = p * (from_bf16(first[i]) - origin), q * (from_bf16(second[i]) - origin)
        z = r * (from_bf16(third[i]) - origin)
        x, y, z = x if one[i] else zero, y if two[i] else zero, z if three[i] else zero
        value = elected(origin, x, y, z, voted_sign(x, y, z, rule), rule)
        out[i] = to_bf16(value)
        largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
    return largest
