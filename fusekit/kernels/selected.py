"""bfloat16 task vectors of which the positions that vary most over the models are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusekit.kernels import direct, order
from fusekit.kernels.ballot import Election, merge_kept
from fusekit.kernels.floats import from_bf16

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = direct.CHUNK
_GRANULE = 8192
_LANES = 256


@njit(nogil=True, cache=True)
def _choose(
    bits: Array, start: int, threshold: np.float32, left: Array, work: Array, chosen: Array
) -> None:
    """chosen = the variances over the models, 0 where a position is not kept.

    `left` has how many more variances equal to the threshold are kept (negative: all).
    """
    count = chosen.size
    direct.variance_of_run(bits, start, work[0, :count], work[1, :count], chosen)
    if left[0] < 0:
        order.keep_at_least(chosen, threshold)
    else:
        left[0] -= order.keep_first(chosen, threshold, left[0])


@njit(nogil=True, cache=True)
def squares(bits: Array, start: int, size: int, threshold: float, left: Array, out: Array) -> bool:
    """Squared norms of the task vectors over the kept positions: (granules, models).

    Args:
        bits: (models + 1, any), the base last.
        start, size: which elements.
        threshold: the least variance that is kept.
        left: (1,) how many variances equal to it are kept, counted down; negative: all.

    Returns False where an entry is not finite.
    """
    models = bits.shape[0] - 1
    work = np.empty((2, _CHUNK), np.float64)
    lanes = np.empty((models, _CHUNK), np.float64)
    kept, zero = np.empty(_CHUNK, np.float32), np.float32(0)
    for granule in range(out.shape[0]):
        lanes[:] = 0.0
        end = min((granule + 1) * _GRANULE, size)
        for begin in range(granule * _GRANULE, end, _CHUNK):
            a, b = start + begin, start + min(begin + _CHUNK, end)
            if not direct.all_finite(bits, a, b):
                return False
            chosen = kept[: b - a]
            _choose(bits, a, np.float32(threshold), left, work, chosen)
            base = bits[models, a:b]
            for r in range(models):
                model, lane = bits[r, a:b], lanes[r]
                for i in range(chosen.size):
                    delta = from_bf16(model[i]) - from_bf16(base[i])
                    value = np.float64(delta if chosen[i] != zero else zero)
                    lane[i] += value * value
        for r in range(models):
            out[granule, r] = direct.folded(lanes[r])
    return True


@njit(nogil=True, cache=True, error_model="numpy")
def elect_of_three(
    bits: Array, start: int, threshold: float, left: Array, rule: Election, out: Array
) -> bool:
    """`trimmed.elect_of_three` where positions are kept, with the arguments of `squares`.

    Returns False where a value is not finite: `out` is then not to be used.
    """
    work = np.empty((2, _CHUNK), np.float64)
    varying, zero = np.empty(_CHUNK, np.float32), np.float32(0)
    kept, factors = np.empty((3, _CHUNK), np.uint8), np.ones(3, np.float32)
    for begin in range(0, out.size, _CHUNK):
        part = out[begin : begin + _CHUNK]
        at = start + begin
        if not direct.all_finite(bits, at, at + part.size):
            return False
        chosen = varying[: part.size]
        _choose(bits, at, np.float32(threshold), left, work, chosen)
        for model in range(3):
            row = kept[model]
            for i in range(chosen.size):
                row[i] = np.uint8(chosen[i] != zero)
        if merge_kept(bits, at, kept, factors, rule, part) >= direct.OVERFLOW:
            return False
    return True
