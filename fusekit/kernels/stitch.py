"""The mean of the task vectors that changed a position."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1024


@njit(nogil=True, cache=True)
def mean_of_kept(deltas: Array, base: Array, out: Array) -> None:
    """out = base + sum_i d_i / max(1, number of d_i that are not 0)."""
    totals = np.empty(_CHUNK, np.float64)
    counts = np.empty(_CHUNK, np.float64)
    for start in range(0, out.size, _CHUNK):
        stop = min(start + _CHUNK, out.size)
        total, count = totals[: stop - start], counts[: stop - start]
        origin, target = base[start:stop], out[start:stop]
        total[:] = 0.0
        count[:] = 0.0
        for r in range(deltas.shape[0]):
            row = deltas[r, start:stop]
            for i in range(total.size):
                total[i] += np.float64(row[i])
                count[i] += 1.0 if row[i] != 0 else 0.0
        for i in range(total.size):
            target[i] = np.float64(origin[i]) + total[i] / max(count[i], 1.0)
