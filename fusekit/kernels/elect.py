"""Sign election and disjoint merging of task vectors (TIES and its relatives)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusekit.kernels import linear

Array = np.ndarray[Any, np.dtype[Any]]

CHUNK = 1024
"""Elements that are worked on together."""

MASS, COUNT, SQUARE, LARGEST = 0, 1, 2, 3
"""How votes are cast: by value, by sign, by signed square, or by the largest square alone."""

_BEYOND_ROUNDING = 1.0 + 1e-12
"""Shares this close are equal, and the first model's counts: an only entry is 1 of any norm."""

MEAN, SUM, MAX = 0, 1, 2
"""What becomes of the entries that agree with the elected sign."""


@njit(nogil=True, cache=True)
def vote_of_three(x: Any, y: Any, z: Any) -> Any:
    """A number of the same sign as x + y + z, to which rounding does nothing."""
    both = x + y
    from_y = both - x
    # What was rounded off decides only where z cancels the sum; it is NaN where both overflow.
    rest = (x - (both - from_y)) + (y - from_y)
    total = both + z
    return total + rest if rest == rest else total


@njit(nogil=True, cache=True)
def _votes_of_three(deltas: Array, start: int, total: Array) -> None:
    """The votes by value of three models whose ballots are 1."""
    stop = start + total.size
    first, second, third = deltas[0, start:stop], deltas[1, start:stop], deltas[2, start:stop]
    for i in range(total.size):
        x, y, z = np.float64(first[i]), np.float64(second[i]), np.float64(third[i])
        total[i] = vote_of_three(x, y, z)


@njit(nogil=True, cache=True)
def votes(deltas: Array, start: int, ballots: Array, election: int, total: Array) -> None:
    """total = the sum whose sign is elected at positions start, ...; `ballots` weighs the votes."""
    n = deltas.shape[0]
    stop = start + total.size
    if election == MASS and n == 3 and (ballots == 1.0).all():
        _votes_of_three(deltas, start, total)
        return
    if election == MASS:
        linear.weighted_chunk(deltas, ballots, ballots[:0], 0.0, start, stop, total)
        return
    total[:] = 0.0
    if election == LARGEST:
        for i in range(total.size):
            best = 0.0
            for r in range(n):
                x = np.float64(deltas[r, start + i])
                share = abs(ballots[r]) * x * x
                if share > best * _BEYOND_ROUNDING:
                    best = share
                    total[i] = x if ballots[r] > 0.0 else -x
        return
    for r in range(n):
        ballot = ballots[r]
        row = deltas[r, start:stop]
        if election == COUNT:
            for i in range(total.size):
                total[i] += ballot * np.sign(np.float64(row[i]))
        else:
            for i in range(total.size):
                x = np.float64(row[i])
                total[i] += ballot * x * abs(x)


@njit(nogil=True, cache=True)
def sign_balance(deltas: Array, ballots: Array, election: int) -> int:
    """sum over positions of the elected sign (zero where the votes cancel)."""
    size = deltas.shape[1]
    scratch = np.empty(CHUNK, np.float64)
    balance = 0
    for start in range(0, size, CHUNK):
        stop = min(start + CHUNK, size)
        total = scratch[: stop - start]
        votes(deltas, start, ballots, election, total)
        for i in range(total.size):
            balance += (total[i] > 0) - np.int64(total[i] < 0)
    return balance


@njit(nogil=True, cache=True)
def _largest(deltas: Array, start: int, weights: Array, sign: Array, merged: Array) -> None:
    """merged = the weighted entry of the elected sign with the largest magnitude."""
    kind = merged.dtype.type
    merged[:] = kind(0)
    for r in range(deltas.shape[0]):
        weight, row = kind(weights[r]), deltas[r, start : start + sign.size]
        for i in range(sign.size):
            x = weight * kind(row[i])
            merged[i] = x if x * sign[i] > merged[i] * sign[i] else merged[i]


@njit(nogil=True, cache=True)
def _agreeing(
    deltas: Array, start: int, weights: Array, sign: Array, merged: Array, divisor: Array
) -> None:
    """merged, divisor = sums of the weighted entries of the elected sign and of their weights."""
    kind = merged.dtype.type
    zero = kind(0)
    n = deltas.shape[0]
    stop = start + sign.size
    done = 0
    if n >= 3:
        a, b, c = kind(weights[0]), kind(weights[1]), kind(weights[2])
        first, second = deltas[0, start:stop], deltas[1, start:stop]
        third = deltas[2, start:stop]
        for i in range(sign.size):
            x, y, z = a * kind(first[i]), b * kind(second[i]), c * kind(third[i])
            s = sign[i]
            agrees, too, as_well = x * s > zero, y * s > zero, z * s > zero
            entries = (x if agrees else zero) + (y if too else zero)
            merged[i] = entries + (z if as_well else zero)
            kept = (a if agrees else zero) + (b if too else zero)
            divisor[i] = kept + (c if as_well else zero)
        done = 3
    else:
        merged[:] = zero
        divisor[:] = zero
    for r in range(done, n):
        a, row = kind(weights[r]), deltas[r, start:stop]
        for i in range(sign.size):
            x = a * kind(row[i])
            agrees = x * sign[i] > zero
            merged[i] += x if agrees else zero
            divisor[i] += a if agrees else zero


@njit(nogil=True, cache=True, error_model="numpy")
def elect_and_merge(
    deltas: Array,
    ballots: Array,
    weights: Array,
    election: int,
    tie_sign: int,
    merge: int,
    base: Array,
    scale: float,
    work: Array,
    out: Array,
) -> None:
    """out = base + scale * (merge of the entries whose weighted sign is the elected one).

    Args:
        deltas: (n, m) pruned task vectors.
        ballots: (n,) weights of the votes.
        weights: (n,) weights of the merge; a negative weight flips the sign an entry counts with.
        election: MASS, COUNT, SQUARE or LARGEST.
        tie_sign: +1, -1 or 0, the sign where votes cancel; 0 keeps nothing there.
        work: (3, CHUNK) scratch; the merged sums are taken in its type (votes: in float64).
        merge: MEAN divides by the kept weights (by 1 where they sum to 0), SUM does not divide,
            MAX takes the largest kept magnitude.
    """
    kind = work.dtype.type
    one, zero, tie, factor = kind(1), kind(0), kind(tie_sign), kind(scale)
    totals = np.empty(CHUNK, np.float64)
    for start in range(0, out.size, CHUNK):
        stop = min(start + CHUNK, out.size)
        total = totals[: stop - start]
        sign, merged = work[0, : stop - start], work[1, : stop - start]
        divisor = work[2, : stop - start]
        votes(deltas, start, ballots, election, total)
        for i in range(total.size):
            sign[i] = one if total[i] > 0 else (-one if total[i] < 0 else tie)
        if merge == MAX:
            _largest(deltas, start, weights, sign, merged)
        else:
            _agreeing(deltas, start, weights, sign, merged, divisor)
        origin = base[start:stop]
        target = out[start:stop]
        if merge == MEAN:
            for i in range(total.size):
                kept_weight = divisor[i] if divisor[i] != zero else one
                target[i] = kind(origin[i]) + factor * (merged[i] / kept_weight)
        else:
            for i in range(total.size):
                target[i] = kind(origin[i]) + factor * merged[i]
