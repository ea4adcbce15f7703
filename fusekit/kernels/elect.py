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
def votes(deltas: Array, ballots: Array, election: int, total: Array) -> None:
    """total = the sum whose sign is elected; `ballots` weighs each model's vote."""
    total[:] = 0.0
    n = deltas.shape[0]
    if election == LARGEST:
        for i in range(total.size):
            best = 0.0
            for r in range(n):
                x = np.float64(deltas[r, i])
                share = ballots[r] * x * x
                if share > best:
                    best = share
                    total[i] = x
        return
    for r in range(n):
        ballot = ballots[r]
        row = deltas[r]
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
        votes(deltas[:, start:stop], ballots, election, total)
        for i in range(total.size):
            balance += (total[i] > 0) - np.int64(total[i] < 0)
    return balance


@njit(nogil=True, cache=True)
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
    n, size = deltas.shape
    totals = np.empty(_CHUNK, np.float64)
    sums = np.empty(_CHUNK, np.float64)
    divisors = np.empty(_CHUNK, np.float64)
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        total = totals[: stop - start]
        merged = sums[: stop - start]
        divisor = divisors[: stop - start]
        votes(deltas[:, start:stop], ballots, election, total)
        for i in range(total.size):
            total[i] = 1.0 if total[i] > 0 else (-1.0 if total[i] < 0 else np.float64(tie_sign))
        merged[:] = 0.0
        divisor[:] = 0.0
        for r in range(n):
            weight = weights[r]
            row = deltas[r, start:stop]
            if merge == MAX:
                for i in range(total.size):
                    x = weight * np.float64(row[i])
                    merged[i] = x if x * total[i] > merged[i] * total[i] else merged[i]
            else:
                for i in range(total.size):
                    x = weight * np.float64(row[i])
                    kept = x * total[i] > 0.0
                    merged[i] += x if kept else 0.0
                    divisor[i] += weight if kept else 0.0
        origin = base[start:stop]
        target = out[start:stop]
        if merge == MEAN:
            for i in range(total.size):
                merged[i] /= divisor[i] if divisor[i] != 0.0 else 1.0
        for i in range(total.size):
            target[i] = np.float64(origin[i]) + scale * merged[i]
