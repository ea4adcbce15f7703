"""Exact order statistics by counting: floats become order-preserving integer keys, keys are
counted.

No sort and no copy of the values: a pass counts, per row, the keys above a bracket and, inside it,
the keys per bin. When a bin is one key wide the count is exact, ties included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusekit.kernels import lanes

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1024
_DIGIT = 11


@njit(nogil=True, cache=True)
def magnitude_keys(bits: Array, below_sign: Any, keys: Array) -> None:
    """Keys that order like |x|: the bits without the sign; `below_sign` masks them."""
    for i in range(bits.size):
        keys[i] = bits[i] & below_sign


@njit(nogil=True, cache=True)
def signed_keys(bits: Array, sign: Any, keys: Array) -> None:
    """Keys that order like x: negative floats are inverted, others and -0 get the bit `sign`."""
    for i in range(bits.size):
        keys[i] = ~bits[i] if bits[i] > sign else bits[i] | sign


@njit(nogil=True, cache=True)
def count_bracket(keys: Array, low: Any, high: Any, shift: Any, bins: Array) -> int:
    """Add the keys in [low, high] to `bins` of 2^shift keys each; return how many lie above.

    Few keys lie inside: comparisons of 64 at a time find them.
    """
    masks = np.empty(lanes.WORDS, np.uint64)
    work = np.empty(lanes.WORDS, np.int32)
    inside = np.empty(lanes.CHUNK, np.int32)
    above: int = 0
    whole = keys.size // lanes.CHUNK * lanes.CHUNK
    for start in range(0, whole, lanes.CHUNK):
        over = 0
        for word in range(lanes.WORDS):
            at = start + word * lanes.LANES
            higher, at_least = lanes.compare_keys(keys, at, low, high)
            over += lanes.count_bits(higher)
            masks[word] = at_least & ~higher
        above += over
        for number in range(lanes.list_bits(masks, work, inside)):
            bins[(keys[start + inside[number]] - low) >> shift] += 1
    for key in keys[whole:]:
        if key > high:
            above += 1
        elif key >= low:
            bins[(key - low) >> shift] += 1
    return above


@njit(nogil=True, cache=True)
def count_brackets(keys: Array, brackets: Array, bins: Array, above: Array) -> None:
    """Count the keys of rows in several brackets at once.

    Args:
        keys: (rows, m).
        brackets: (k, 5) of the keys' type: row, low, high, shift, and where its bins begin.
        bins: counters of all brackets, one after the other.
        above: (k,) counts of the keys above each bracket.
    """
    for k in range(brackets.shape[0]):
        row, first = keys[brackets[k, 0]], bins[brackets[k, 4] :]
        above[k] += count_bracket(row, brackets[k, 1], brackets[k, 2], brackets[k, 3], first)


@njit(nogil=True, cache=True)
def find_rank(bins: Array, rank: int) -> tuple[int, int]:
    """(bin of the rank-th largest key, keys in higher bins); bin -1 if it lies below all."""
    greater = 0
    for stop in range(bins.size, 0, -_CHUNK):
        part = bins[max(stop - _CHUNK, 0) : stop]
        total = part.sum()
        if greater + total < rank:
            greater += total
            continue
        for i in range(part.size - 1, -1, -1):
            if greater + part[i] >= rank:
                return stop - part.size + i, greater
            greater += part[i]
    return -1, greater


@njit(nogil=True, cache=True)
def select(keys: Array, ranks: Array, work: Array, out: Array) -> None:
    """out[j] = the key that ranks[j] keys precede in ascending order, by radix selection.

    `work` is as long as `keys`.
    """
    width = 8 * keys.itemsize
    bins = np.zeros(1 << _DIGIT, np.int64)
    for key in keys:
        bins[np.int64(key >> np.uint64(width - _DIGIT))] += 1
    for j in range(ranks.size):
        digit, before = _bin_of(bins, ranks[j])
        count = 0
        for key in keys:
            work[count] = key
            count += int(np.int64(key >> np.uint64(width - _DIGIT)) == digit)
        out[j] = _select_rest(work[:count], ranks[j] - before, width - _DIGIT)


@njit(nogil=True, cache=True)
def _select_rest(keys: Array, rank: int, width: int) -> Any:
    """`select` of keys that differ in their lowest `width` bits only; destroys them."""
    bins = np.empty(1 << _DIGIT, np.int64)
    count = keys.size
    while width > 0:
        step = min(width, _DIGIT)
        shift, mask = np.uint64(width - step), (1 << step) - 1
        bins[:] = 0
        for i in range(count):
            bins[np.int64(keys[i] >> shift) & mask] += 1
        digit, before = _bin_of(bins, rank)
        rank -= before
        members = 0
        for i in range(count):
            key = keys[i]
            keys[members] = key
            members += int((np.int64(key >> shift) & mask) == digit)
        count, width = members, width - step
    return keys[0]


@njit(nogil=True, cache=True)
def _bin_of(bins: Array, rank: int) -> tuple[int, int]:
    """(the bin that the rank-th entry, from 0, is counted in, entries in the bins before)."""
    before = 0
    for i in range(bins.size):
        if before + bins[i] > rank:
            return i, before
        before += bins[i]
    return bins.size - 1, before


@njit(nogil=True, cache=True)
def count_equal(row: Array, value: Any) -> int:
    """How many entries of a row have magnitude `value` exactly."""
    count = 0
    for i in range(row.size):
        count += abs(row[i]) == value
    return count


@njit(nogil=True, cache=True)
def keep_at_least(row: Array, threshold: Any) -> None:
    """Zero every entry smaller than `threshold` in magnitude."""
    zero = row.dtype.type(0)
    for i in range(row.size):
        row[i] = row[i] if abs(row[i]) >= threshold else zero


@njit(nogil=True, cache=True)
def keep_above(row: Array, threshold: Any) -> None:
    """Zero every entry not greater than `threshold` in magnitude."""
    zero = row.dtype.type(0)
    for i in range(row.size):
        row[i] = row[i] if abs(row[i]) > threshold else zero


@njit(nogil=True, cache=True)
def drop_at_least(row: Array, threshold: Any) -> None:
    """Zero every entry of at least `threshold` in magnitude."""
    zero = row.dtype.type(0)
    for i in range(row.size):
        row[i] = zero if abs(row[i]) >= threshold else row[i]


@njit(nogil=True, cache=True)
def drop_above(row: Array, threshold: Any) -> None:
    """Zero every entry greater than `threshold` in magnitude."""
    zero = row.dtype.type(0)
    for i in range(row.size):
        row[i] = zero if abs(row[i]) > threshold else row[i]


@njit(nogil=True, cache=True)
def _cut(row: Array, threshold: Any, left: int, keeps: bool) -> int:
    """Keep the entries above the threshold and the first `left` equal to it, or all others.

    Returns how many equal entries belong to the first.
    """
    zero = row.dtype.type(0)
    before = left
    for start in range(0, row.size, _CHUNK):
        part = row[start : start + _CHUNK]
        equal = count_equal(part, threshold) if left > 0 else 0
        if equal > left:
            for i in range(part.size):
                magnitude = abs(part[i])
                is_first = magnitude > threshold
                if magnitude == threshold and left > 0:
                    is_first = True
                    left -= 1
                if is_first != keeps:
                    part[i] = zero
            continue
        left -= equal
        if keeps:
            if equal:
                keep_at_least(part, threshold)
            else:
                keep_above(part, threshold)
        elif equal:
            drop_at_least(part, threshold)
        else:
            drop_above(part, threshold)
    return before - left


@njit(nogil=True, cache=True)
def keep_first(row: Array, threshold: Any, left: int) -> int:
    """As `keep_above`, but keep the first `left` entries equal to the threshold as well.

    Returns how many equal entries it kept.
    """
    return int(_cut(row, threshold, left, True))


@njit(nogil=True, cache=True)
def drop_first(row: Array, threshold: Any, left: int) -> int:
    """As `drop_above`, but zero the first `left` entries equal to the threshold as well.

    Returns how many equal entries it zeroed.
    """
    return int(_cut(row, threshold, left, False))
