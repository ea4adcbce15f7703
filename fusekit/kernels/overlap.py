"""Task vectors by how many models changed an entry: one, several or none."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1024


@njit(nogil=True, cache=True)
def count_overlap(deltas: Array, epsilon: float, out: Array) -> None:
    """out[r] = entries that model r alone changed, out[n + r] = those it changed among others."""
    n, size = deltas.shape
    changed = np.empty(_CHUNK, np.int32)
    out[:] = 0.0
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        count = changed[: stop - start]
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


@njit(nogil=True, cache=True, error_model="numpy")
def reinforce(deltas: Array, epsilon: float, boosts: Array, base: Array, out: Array) -> None:
    """out = base + boosts[r] * delta_r where only model r changed, + the mean of changes elsewhere.

    A change is an entry of magnitude greater than `epsilon`.
    """
    n, size = deltas.shape
    changed = np.empty(_CHUNK, np.float64)
    plain = np.empty(_CHUNK, np.float64)
    boosted = np.empty(_CHUNK, np.float64)
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        count = changed[: stop - start]
        total = plain[: stop - start]
        strong = boosted[: stop - start]
        count[:] = 0.0
        total[:] = 0.0
        strong[:] = 0.0
        for r in range(n):
            row, boost = deltas[r, start:stop], boosts[r]
            for i in range(count.size):
                x = np.float64(row[i]) if abs(row[i]) > epsilon else 0.0
                count[i] += 1.0 if x != 0.0 else 0.0
                total[i] += x
                strong[i] += boost * x
        origin, target = base[start:stop], out[start:stop]
        for i in range(count.size):
            mean = total[i] / (count[i] if count[i] > 1.0 else 1.0)
            target[i] = np.float64(origin[i]) + (strong[i] if count[i] == 1.0 else mean)
