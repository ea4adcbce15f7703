"""Counter-based random drops: whether an element is kept depends on its key and position alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

_GRANULE = 8192
RUN = 1024
"""Entries that share their hashes: a half of them each half a hash."""

HALF = 512
LOW = np.uint32(0xFFFF)
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
def pair(offset: int, first: np.uint32, second: np.uint32) -> np.uint32:
    """A hash whose both halves are well mixed: two 16-bit draws."""
    h = _hash(offset, first, second)
    return np.uint32(h ^ (h >> np.uint32(16)))


@njit(nogil=True, cache=True)
def second_draw(offset: int, first: np.uint32, second: np.uint32) -> np.uint32:
    """32 bits that decide where the first draw equals the threshold."""
    return np.uint32(_hash(offset, second, first))


@njit(nogil=True, cache=True)
def thresholds(density: float) -> tuple[np.uint32, float]:
    """What the first draw is compared with, and the second where the first is equal."""
    scaled = density * 65536.0
    threshold = np.uint32(min(np.floor(scaled), 65535.0))
    return threshold, min((scaled - np.float64(threshold)) * 4294967296.0, 4294967296.0)


@njit(nogil=True, cache=True)
def draw(position: int, key: np.uint64, pairs: Array) -> tuple[np.uint32, np.uint32]:
    """The HALF hashes of the run that `position` lies in: first draws, two to a hash.

    Returns the keys of the granule.
    """
    granule, offset = divmod(position, _GRANULE)
    first, second = granule_keys(key, granule)
    at = offset // RUN * HALF
    for i in range(HALF):
        pairs[i] = pair(at + i, first, second)
    return first, second


@njit(nogil=True, cache=True)
def is_dropped(
    entry: int,
    position: int,
    pairs: Array,
    threshold: np.uint32,
    rest: float,
    first: np.uint32,
    second: np.uint32,
) -> bool:
    """Whether an entry whose first draw is the threshold is dropped by its second.

    `entry` counts from the beginning of the run, which is at `position`.
    """
    lane = entry % HALF
    upper = entry >= HALF
    drawn = np.uint32(pairs[lane] >> np.uint32(16)) if upper else np.uint32(pairs[lane] & LOW)
    if drawn != threshold:
        return False
    return bool(second_draw(position % _GRANULE + entry, first, second) >= rest)


@njit(nogil=True, cache=True)
def drop(row: Array, density: float, key: np.uint64, start: int) -> None:
    """Zero each entry with probability 1 - density, decided by its key and position.

    A run of 1024 entries takes its draws from 512 hashes: entry l < 512 the lower half of the l-th,
    entry 512 + l the upper. A draw of 16 bits settles all but one entry in 65,536; for those a
    second one of 32 bits is taken.
    """
    threshold, rest = thresholds(density)
    zero = row.dtype.type(0)
    pairs = np.empty(HALF, np.uint32)
    i = 0
    while i < row.size:
        lane = (start + i) % RUN
        begin = start + i - lane
        first, second = draw(begin, key, pairs)
        count = min(row.size - i, RUN - lane)
        part = row[i : i + count]
        ties = np.uint32(0)
        lower = part[: max(HALF - lane, 0)]
        draws = pairs[min(lane, HALF) :]
        for j in range(lower.size):
            drawn = np.uint32(draws[j] & LOW)
            ties |= np.uint32(drawn == threshold)
            lower[j] = lower[j] if drawn <= threshold else zero
        upper = part[lower.size :]
        draws = pairs[max(lane - HALF, 0) :]
        for j in range(upper.size):
            drawn = np.uint32(draws[j] >> np.uint32(16))
            ties |= np.uint32(drawn == threshold)
            upper[j] = upper[j] if drawn <= threshold else zero
        if ties:
            for j in range(count):
                if is_dropped(lane + j, begin, pairs, threshold, rest, first, second):
                    part[j] = zero
        i += count
