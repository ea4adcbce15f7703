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
def uniform_bits(key: np.uint64, start: int, out: Array) -> None:
    """Uniform 32-bit integers for positions start, start + 1, ... under a 64-bit key.

    Each granule of positions gets two 32-bit keys from a 64-bit hash of (key, granule); within it a
    two-round 32-bit hash of the offset is keyed before and between the rounds.
    """
    i = 0
    while i < out.size:
        granule, offset = divmod(start + i, _GRANULE)
        run = min(out.size - i, _GRANULE - offset)
        hashed = _mix64(_mix64(key + np.uint64(granule) * np.uint64(0x9E3779B97F4A7C15)) ^ key)
        first = np.uint32(hashed & np.uint64(0xFFFFFFFF))
        second = np.uint32(hashed >> np.uint64(32))
        part = out[i : i + run]
        for j in range(run):
            h = np.uint32(np.uint32(offset + j) + first)
            h ^= h >> np.uint32(16)
            h = np.uint32(h * _C1) ^ second
            h ^= h >> np.uint32(15)
            h = np.uint32(h * _C2)
            h ^= h >> np.uint32(16)
            part[j] = h
        i += run


@njit(nogil=True, cache=True)
def drop(row: Array, density: float, key: np.uint64, start: int, bits: Array) -> None:
    """Zero each entry with probability 1 - density (to 2^-32). `bits` is uint32 scratch."""
    threshold = np.uint32(min(np.floor(density * 4294967296.0), 4294967295.0))
    uniform_bits(key, start, bits[: row.size])
    zero = row.dtype.type(0)
    for i in range(row.size):
        row[i] = row[i] if bits[i] < threshold else zero
