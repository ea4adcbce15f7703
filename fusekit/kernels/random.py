"""Counter-based random drops: whether an element is kept depends on its key and position alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

_GRANULE = 8192
_C1 = np.uint32(0x7FEB352D)
_C2 = np.uint32(0x846CA68B)


@njit(nogil=True, cache=True)
def _mix64(x: np.uint64) -> np.uint64:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(nogil=True, cache=True)
def _granule_keys(key: np.uint64, granule: int) -> tuple[np.uint32, np.uint32]:
    """Two 32-bit keys for one granule of positions."""
    hashed = _mix64(_mix64(key + np.uint64(granule) * np.uint64(0x9E3779B97F4A7C15)) ^ key)
    return np.uint32(hashed & np.uint64(0xFFFFFFFF)), np.uint32(hashed >> np.uint64(32))


@njit(nogil=True, cache=True)
def _hash(offset: int, first: np.uint32, second: np.uint32) -> np.uint32:
    """A two-round 32-bit hash of an offset, keyed before and between the rounds.

    Its upper bits are the well-mixed ones: compare it with thresholds, do not take remainders.
    """
    h = np.uint32(np.uint32(offset) + first)
    h ^= h >> np.uint32(16)
    h = np.uint32(h * _C1) ^ second
    h ^= h >> np.uint32(15)
    return np.uint32(h * _C2)


@njit(nogil=True, cache=True)
def uniform_bits(key: np.uint64, start: int, out: Array) -> None:
    """Uniform 32-bit integers for positions start, start + 1, ... under a 64-bit key."""
    i = 0
    while i < out.size:
        granule, offset = divmod(start + i, _GRANULE)
        run = min(out.size - i, _GRANULE - offset)
        first, second = _granule_keys(key, granule)
        part = out[i : i + run]
        for j in range(run):
            part[j] = _hash(offset + j, first, second)
        i += run


@njit(nogil=True, cache=True)
def drop(row: Array, density: float, key: np.uint64, start: int) -> None:
    """Zero each entry with probability 1 - density (to 2^-32), by the same numbers."""
    threshold = np.uint32(min(np.floor(density * 4294967296.0), 4294967295.0))
    zero = row.dtype.type(0)
    i = 0
    while i < row.size:
        granule, offset = divmod(start + i, _GRANULE)
        run = min(row.size - i, _GRANULE - offset)
        first, second = _granule_keys(key, granule)
        part = row[i : i + run]
        for j in range(run):
            part[j] = part[j] if _hash(offset + j, first, second) < threshold else zero
        i += run
