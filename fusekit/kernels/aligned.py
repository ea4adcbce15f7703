"""Pruned sums of several updates' entries in one basis (KnOTS), and counts of their magnitudes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1024


@njit(nogil=True, cache=True)
def count_magnitudes(bits: Array, shift: int, bins: Array) -> None:
    """Add to `bins` how many float32 have magnitudes of the same bits above `shift`."""
    below_sign, places = np.uint32(0x7FFFFFFF), np.uint32(shift)
    for i in range(bits.size):
        bins[(bits[i] & below_sign) >> places] += 1


@njit(nogil=True, cache=True)
def sum_kept(rows: Array, thresholds: Array, weights: Array, out: Array) -> None:
    """out = the weighted sum of the entries whose magnitudes reach their row's threshold."""
    zero = np.float32(0)
    out[:] = zero
    for start in range(0, out.size, _CHUNK):
        target = out[start : start + _CHUNK]
        for r in range(rows.shape[0]):
            row, limit, weight = rows[r, start : start + _CHUNK], thresholds[r], weights[r]
            for i in range(target.size):
                target[i] += weight * row[i] if abs(row[i]) >= limit else zero


@njit(nogil=True, cache=True)
def mean_of_elected(rows: Array, thresholds: Array, weights: Array, tie: float, out: Array) -> int:
    """out = the mean weighted entry among those kept that have the sign of the kept entries' sum.

    Args:
        rows: (n, m) float32.
        thresholds: (n,) float32; entries of at least this magnitude are kept.
        weights: (n,) float32; they do not vote. An entry of weight 0 is not counted.
        tie: the sign elected where kept entries cancel: 1, -1, or 0 for no entry at all.
        out: (m,) float32.

    Returns:
        At how many places kept entries cancel.
    """
    zero, one = np.float32(0), np.float32(1)
    votes = np.empty(_CHUNK, np.float32)
    mass = np.empty(_CHUNK, np.float32)
    count = np.empty(_CHUNK, np.float32)
    ties = 0
    for start in range(0, out.size, _CHUNK):
        target = out[start : start + _CHUNK]
        size = target.size
        votes[:] = zero
        mass[:] = zero
        for r in range(rows.shape[0]):
            row, limit = rows[r, start : start + _CHUNK], thresholds[r]
            for i in range(size):
                kept = row[i] if abs(row[i]) >= limit else zero
                votes[i] += kept
                mass[i] += abs(kept)
        for i in range(size):
            cancels = votes[i] == zero and mass[i] > zero
            ties += cancels
            votes[i] = np.float32(tie) if cancels else votes[i]
        target[:] = zero
        count[:] = zero
        for r in range(rows.shape[0]):
            row, limit, weight = rows[r, start : start + _CHUNK], thresholds[r], weights[r]
            counted = one if weight != zero else zero
            for i in range(size):
                x, sign = row[i], votes[i]
                alike = ((x > zero) & (sign > zero)) | ((x < zero) & (sign < zero))
                agrees = alike & (abs(x) >= limit)
                target[i] += weight * row[i] if agrees else zero
                count[i] += counted if agrees else zero
        for i in range(size):
            target[i] = target[i] / count[i] if count[i] > zero else zero
    return ties
