"""Counter-based random drops: whether an element is kept depends on its key and position alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

_GRANULE = 8192
RUN = 1024
"""Entries that share their hashes: a half of them each half a hash."""

_HALF = RUN // 2
_LOW = np.uint32(0xFFFF)
_C1 = np.uint32(0x7FEB352D)
_C2 = np.uint32(0x846CA68B)


@njit(nogil=True, cache=True)
def _mix64(x: np.uint64) -> np.uint64:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(nogil=True, cache=True)
def granule_keys(key: np.uint64, granule: int) -> tuple[np.uint32, np.uint32]:
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
        first, second = granule_keys(key, granule)
        part = out[i : i + run]
        for j in range(run):
            part[j] = _hash(offset + j, first, second)
        i += run


@njit(nogil=True, cache=True)
def survivors(position: int, key: np.uint64, density: float, kept: Array) -> None:
    """kept[i] = 1 where the entry at `position` + i, a multiple of `RUN`, survives, else 0.

    A run takes its draws from 512 hashes: entry l < 512 the lower half of the l-th, entry 512 + l
    the upper. A draw of 16 bits settles all but one entry in 65,536; for those a second one of 32
    bits is taken.

    Args:
        position: where in the tensor the run begins.
        key: of the tensor and model.
        density: the probability to survive.
        kept: (RUN,) uint8.
    """
    scaled = density * 65536.0
    threshold = np.uint32(min(np.floor(scaled), 65535.0))
    rest = (scaled - np.float64(threshold)) * 4294967296.0
    granule, offset = divmod(position, _GRANULE)
    first, second = granule_keys(key, granule)
    at = offset // 2
    lower, upper = kept[:_HALF], kept[_HALF:]
    ties = np.uint32(0)
    for i in range(_HALF):
        h = _hash(at + i, first, second)
        h ^= h >> np.uint32(16)  # now both halves are well mixed
        low, high = np.uint32(h & _LOW), np.uint32(h >> np.uint32(16))
        ties |= np.uint32(low == threshold) | np.uint32(high == threshold)
        lower[i] = np.uint8(low <= threshold)
        upper[i] = np.uint8(high <= threshold)
    if not ties:
        return
    for i in range(_HALF):
        h = _hash(at + i, first, second)
        h ^= h >> np.uint32(16)
        if np.uint32(h & _LOW) == threshold:
            lower[i] = np.uint8(_hash(offset + i, second, first) < rest)
        if np.uint32(h >> np.uint32(16)) == threshold:
            upper[i] = np.uint8(_hash(offset + _HALF + i, second, first) < rest)


@njit(nogil=True, cache=True)
def drop(row: Array, density: float, key: np.uint64, start: int) -> None:
    """Zero each entry with probability 1 - density, decided by its key and position."""
    zero = row.dtype.type(0)
    kept = np.empty(RUN, np.uint8)
    i = 0
    while i < row.size:
        lane = (start + i) % RUN
        survivors(start + i - lane, key, density, kept)
        part = row[i : i + RUN - lane]
        flags = kept[lane : lane + part.size]
        for j in range(part.size):
            part[j] = part[j] if flags[j] else zero
        i += part.size
