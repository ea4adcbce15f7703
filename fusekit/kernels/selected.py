"""bfloat16 task vectors of which the positions that vary most over the models are kept.

Variances are those of `thin.variance`, to the same bits. Most need not be known that well: an
estimate in float32 tells on which side of a threshold they lie, and only those close to it are
computed in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from fusekit.kernels import direct, lanes, order, ranks
from fusekit.kernels.ballot import Election, merge_kept
from fusekit.kernels.floats import MAGNITUDE, as_bits, as_float32, from_bf16

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = direct.CHUNK
_GRANULE = 8192
_FEW = 128
"""Up to so many variances of a chunk are computed one by one."""

_SMALLEST, _LARGEST = np.float32(1e-30), np.float32(1e30)
"""Between these, estimates are off by less than models^2 / 2^20 of themselves.

With S the sum of the squared deviations from the first model, rounding takes less than 6 S / 2^24,
and the variance is at least S / models^2.
"""


_INFINITE = np.uint32(0x7F800000)


class _Memory(NamedTuple):
    """What a chunk is worked on in."""

    wide: Array
    narrow: Array
    values: Array
    """Variances."""
    keys: Array
    """Bits of estimated variances."""
    sure: Array
    unsure: Array
    """Bits: which variances lie above a bracket, and which may lie in it."""
    words: Array
    listed: Array


@njit(nogil=True, cache=True)
def _memory() -> _Memory:
    return _Memory(
        np.empty((2, _CHUNK), np.float64),
        np.empty((2, _CHUNK), np.float32),
        np.empty(_CHUNK, np.float32),
        np.empty(_CHUNK, np.uint32),
        np.empty(lanes.WORDS, np.uint64),
        np.empty(lanes.WORDS, np.uint64),
        np.empty(lanes.WORDS, np.int32),
        np.empty(_CHUNK, np.int32),
    )


@njit(nogil=True, cache=True)
def _estimate_three(
    first: Array, second: Array, third: Array, base: Array, keys: Array
) -> np.uint32:
    """The keys of three models, from the differences of all pairs; the largest magnitude's bits."""
    share, largest = np.float32(1 / 9), np.uint32(0)
    for i in range(keys.size):
        origin = from_bf16(base[i])
        x, y = from_bf16(first[i]) - origin, from_bf16(second[i]) - origin
        z = from_bf16(third[i]) - origin
        p, q, r = y - x, z - x, z - y
        keys[i] = as_bits(((p * p + q * q) + r * r) * share)
        largest = max(largest, np.uint32(keys[i] & MAGNITUDE))
    return largest


@njit(nogil=True, cache=True)
def _estimate(bits: Array, start: int, memory: _Memory) -> bool:
    """The keys of a whole chunk; whether all its entries are finite."""
    n, stop, keys = bits.shape[0] - 1, start + _CHUNK, memory.keys
    base, first = bits[n, start:stop], bits[0, start:stop]
    if n == 3:
        others = bits[1, start:stop], bits[2, start:stop]
        if _estimate_three(first, *others, base, keys) < _INFINITE:
            return True
        return bool(direct.all_finite(bits, start, stop))
    share = np.float32(1.0 / n)
    total, square = memory.narrow[0], memory.narrow[1]
    memory.narrow[:] = 0
    for r in range(1, n):
        row = bits[r, start:stop]
        for i in range(keys.size):
            origin = from_bf16(base[i])
            x = (from_bf16(row[i]) - origin) - (from_bf16(first[i]) - origin)
            total[i] += x
            square[i] += x * x
    for i in range(keys.size):
        mean = total[i] * share
        keys[i] = as_bits(square[i] * share - mean * mean) & MAGNITUDE
    return bool(direct.all_finite(bits, start, stop))


@njit(nogil=True, cache=True)
def _compare(low: np.uint32, high: np.uint32, models: int, memory: _Memory) -> tuple[int, int]:
    """How many variances surely have bits above `high`, and how many may lie in [low, high]."""
    error = np.float32(models * models / 1048576.0)
    least = as_float32(low) * (np.float32(1) - error)
    most = max(as_float32(high) * (np.float32(1) + error), _SMALLEST)
    first = as_bits(least) if least > _SMALLEST else np.uint32(0)
    last = as_bits(most) if most < _LARGEST else MAGNITUDE
    above, inside = 0, 0
    for word in range(lanes.WORDS):
        higher, at_least = lanes.compare_keys(memory.keys, word * lanes.LANES, first, last)
        memory.sure[word] = higher
        memory.unsure[word] = at_least & ~higher
        above += lanes.count_bits(higher)
        inside += lanes.count_bits(memory.unsure[word])
    return above, inside


@njit(nogil=True, cache=True)
def _vary(bits: Array, start: int, memory: _Memory, out: Array) -> bool:
    """out = the variances of a run; whether all its entries are finite."""
    total, square = memory.wide[0, : out.size], memory.wide[1, : out.size]
    direct.variance_of_run(bits, start, total, square, out)
    return bool(direct.all_finite(bits, start, start + out.size))


@njit(nogil=True, cache=True)
def _vary_unsure(bits: Array, start: int, memory: _Memory) -> int:
    """List the positions of a chunk that are unsure and compute their variances; how many."""
    listed, values = memory.listed, memory.values
    count = lanes.list_bits(memory.unsure, memory.words, listed)
    if bits.shape[0] == 4 and count:
        first, second, third, base = bits[0], bits[1], bits[2], bits[3]
        for number in range(count):
            at = start + listed[number]
            values[number] = direct.variance_of_three(first[at], second[at], third[at], base[at])
        return count
    for number in range(count):
        total, square = memory.wide[0, :1], memory.wide[1, :1]
        out = values[number : number + 1]
        direct.variance_of_run(bits, start + listed[number], total, square, out)
    return count


@njit(nogil=True, cache=True)
def count_brackets(
    bits: Array, start: int, size: int, brackets: Array, bins: Array, above: Array
) -> int:
    """`order.count_brackets` of the variances of task vectors over the models.

    Returns how many elements are done: fewer than asked for where the next 1024 have an entry that
    is not finite.
    """
    memory, models = _memory(), bits.shape[0] - 1
    for done in range(0, size, _CHUNK):
        begin = start + done
        values = memory.values[: min(_CHUNK, size - done)]
        known = values.size < _CHUNK
        if not (_vary(bits, begin, memory, values) if known else _estimate(bits, begin, memory)):
            return done
        for k in range(brackets.shape[0]):
            low, high, shift = brackets[k, 1], brackets[k, 2], brackets[k, 3]
            first = bins[brackets[k, 4] :]
            if not known:
                over, unsure = _compare(low, high, models, memory)
                if unsure <= _FEW:
                    above[k] += over
                    for number in range(_vary_unsure(bits, begin, memory)):
                        key = as_bits(memory.values[number])
                        above[k] += key > high
                        if low <= key <= high:
                            first[np.uint32(key - low) >> shift] += 1
                    continue
                _vary(bits, begin, memory, values)
                known = True
            above[k] += order.count_bracket(values.view(np.uint32), low, high, shift, first)
    return size


@njit(nogil=True, cache=True)
def _choose(
    bits: Array, start: int, threshold: np.float32, left: Array, memory: _Memory, kept: Array
) -> bool:
    """kept[i] is not 0 where position start + i is kept; whether all entries are finite.

    `left` has how many more variances equal to the threshold are kept (negative: all). Positions
    with an entry that is not finite have no variance and are not kept.
    """
    values = memory.values[: kept.size]
    if kept.size == _CHUNK and _estimate(bits, start, memory):
        key = as_bits(threshold)
        _, unsure = _compare(key, key, bits.shape[0] - 1, memory)
        if unsure <= _FEW:
            for number in range(_vary_unsure(bits, start, memory)):
                i, value = memory.listed[number], values[number]
                equal = value == threshold and left[0] != 0
                chosen = equal or value > threshold
                left[0] -= equal and left[0] > 0
                memory.sure[i // lanes.LANES] |= np.uint64(chosen) << np.uint64(i % lanes.LANES)
            ranks.unpack(memory.sure.view(np.uint8), kept)
            return True
    finite = _vary(bits, start, memory, values)
    if left[0] < 0:
        order.keep_at_least(values, threshold)
    else:
        left[0] -= order.keep_first(values, threshold, left[0])
    zero = np.float32(0)
    for i in range(kept.size):
        kept[i] = np.uint8(values[i] != zero)
    return finite


@njit(nogil=True, cache=True)
def squares(bits: Array, start: int, size: int, threshold: float, left: Array, out: Array) -> bool:
    """Squared norms of the task vectors over the kept positions: (granules, models).

    A lane sums 8 squares in float32 before float64 takes over.

    Args:
        bits: (models + 1, any), the base last.
        start, size: which elements.
        threshold: the least variance that is kept.
        left: (1,) how many variances equal to it are kept, counted down; negative: all.

    Returns whether all are known: sums are NaN where an entry of the granule is not finite or
    squares leave the range of float32.
    """
    models = bits.shape[0] - 1
    if threshold < _SMALLEST:
        out[:] = np.nan
        return False
    memory = _memory()
    sums, zero = np.empty((models, _CHUNK), np.float32), np.float32(0)
    wide, chosen = np.empty(_CHUNK, np.float64), np.empty(_CHUNK, np.uint8)
    all_known = True
    for granule in range(out.shape[0]):
        sums[:] = zero
        known = True
        end = min((granule + 1) * _GRANULE, size)
        for begin in range(granule * _GRANULE, end, _CHUNK):
            a, b = start + begin, start + min(begin + _CHUNK, end)
            kept = chosen[: b - a]
            known &= _choose(bits, a, np.float32(threshold), left, memory, kept)
            base = bits[models, a:b]
            for r in range(models):
                model, lane = bits[r, a:b], sums[r]
                for i in range(kept.size):
                    update = from_bf16(model[i]) - from_bf16(base[i])
                    update = update if kept[i] else zero
                    lane[i] += update * update
        for r in range(models):
            out[granule, r] = direct.folded_narrow(sums[r], wide) if known else np.nan
            all_known &= np.isfinite(out[granule, r])
    return all_known


@njit(nogil=True, cache=True, error_model="numpy")
def elect_of_three(
    bits: Array, start: int, threshold: float, left: Array, rule: Election, out: Array
) -> bool:
    """`trimmed.elect_of_three` where positions are kept, with the arguments of `squares`.

    Returns False where a value is not finite: `out` is then not to be used.
    """
    memory, kept = _memory(), np.empty((3, _CHUNK), np.uint8)
    factors = np.ones(3, np.float32)
    for begin in range(0, out.size, _CHUNK):
        part = out[begin : begin + _CHUNK]
        at = start + begin
        if not _choose(bits, at, np.float32(threshold), left, memory, kept[0, : part.size]):
            return False
        kept[1:] = kept[0]
        if merge_kept(bits, at, kept, factors, rule, part) >= direct.OVERFLOW:
            return False
    return True
