"""Sign election and disjoint merging of task vectors (TIES and its relatives)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1024

MASS, COUNT, SQUARE, LARGEST = 0, 1, 2, 3
"""How votes are cast: by value, by sign, by signed square, or by the largest square alone."""

MEAN, SUM, MAX = 0, 1, 2
"""What becomes of the entries that agree with the elected sign."""


@njit(nogil=True, cache=True)
def votes(deltas: Array, start: int, ballots: Array, election: int, total: Array) -> None:
    """total = the sum whose sign is elected at positions start, ...; `ballots` weighs the votes."""
    total[:] = 0.0
    n = deltas.shape[0]
    stop = start + total.size
    if election == LARGEST:
        for i in range(total.size):
            best = 0.0
            for r in range(n):
                x = np.float64(deltas[r, start + i])
                share = ballots[r] * x * x
                if share > best:
                    best = share
                    total[i] = x
        return
    for r in range(n):
        ballot = ballots[r]
        row = deltas[r, start:stop]
        if election == MASS:
            for i in range(total.size):
                total[i] += ballot * np.float64(row[i])
        elif election == COUNT:
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
    scratch = np.empty(_CHUNK, np.float64)
    balance = 0
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        total = scratch[: stop - start]
        votes(deltas, start, ballots, election, total)
        for i in range(total.size):
            balance += (total[i] > 0) - np.int64(total[i] < 0)
    return balance


@njit(nogil=True, cache=True)
def _largest(deltas: Array, start: int, weights: Array, sign: Array, merged: Array) -> None:
    """merged = the weighted entry of the elected sign with the largest magnitude."""
    merged[:] = 0.0
    for r in range(deltas.shape[0]):
        weight, row = weights[r], deltas[r, start : start + sign.size]
        for i in range(sign.size):
            x = weight * np.float64(row[i])
            merged[i] = x if x * sign[i] > merged[i] * sign[i] else merged[i]


@njit(nogil=True, cache=True)
def _agreeing(
    deltas: Array, start: int, weights: Array, sign: Array, merged: Array, divisor: Array
) -> None:
    """merged, divisor = sums of the weighted entries of the elected sign and of their weights."""
    merged[:] = 0.0
    divisor[:] = 0.0
    n = deltas.shape[0]
    stop = start + sign.size
    done = 0
    # Two rows a sweep: the sums are loaded and stored half as often.
    while done + 1 < n:
        a, b = weights[done], weights[done + 1]
        left, right = deltas[done, start:stop], deltas[done + 1, start:stop]
        for i in range(sign.size):
            x, y = a * np.float64(left[i]), b * np.float64(right[i])
            first, second = x * sign[i] > 0.0, y * sign[i] > 0.0
            merged[i] = (merged[i] + (x if first else 0.0)) + (y if second else 0.0)
            divisor[i] = (divisor[i] + (a if first else 0.0)) + (b if second else 0.0)
        done += 2
    if done < n:
        a, left = weights[done], deltas[done, start:stop]
        for i in range(sign.size):
            x = a * np.float64(left[i])
            first = x * sign[i] > 0.0
            merged[i] += x if first else 0.0
            divisor[i] += a if first else 0.0


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
    out: Array,
) -> None:
    """out = base + scale * (merge of the entries whose weighted sign is the elected one).

    Args:
        deltas: (n, m) pruned task vectors.
        ballots: (n,) weights of the votes.
        weights: (n,) weights of the merge; a negative weight flips the sign an entry counts with.
        election: MASS, COUNT, SQUARE or LARGEST.
        tie_sign: +1, -1 or 0, the sign where votes cancel; 0 keeps nothing there.
        merge: MEAN divides by the kept weights (by 1 where they sum to 0), SUM does not divide,
            MAX takes the largest kept magnitude.
    """
    size = deltas.shape[1]
    totals = np.empty(_CHUNK, np.float64)
    sums = np.empty(_CHUNK, np.float64)
    divisors = np.empty(_CHUNK, np.float64)
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        total = totals[: stop - start]
        merged = sums[: stop - start]
        divisor = divisors[: stop - start]
        votes(deltas, start, ballots, election, total)
        for i in range(total.size):
            total[i] = 1.0 if total[i] > 0 else (-1.0 if total[i] < 0 else np.float64(tie_sign))
        if merge == MAX:
            _largest(deltas, start, weights, total, merged)
        else:
            _agreeing(deltas, start, weights, total, merged, divisor)
        origin = base[start:stop]
        target = out[start:stop]
        if merge == MEAN:
            for i in range(total.size):
                kept_weight = divisor[i] if divisor[i] != 0.0 else 1.0
                target[i] = np.float64(origin[i]) + scale * (merged[i] / kept_weight)
        else:
            for i in range(total.size):
                target[i] = np.float64(origin[i]) + scale * merged[i]
