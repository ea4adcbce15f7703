"""bfloat16 task vectors of which the small or the large entries are cut, merged in registers.

Cuts come as steps that `kernels.tiles` would carry out. A run of elements is merged here where
every step asks for nothing but a range of magnitudes; where only some of equal magnitudes are to be
kept, or a value is not finite, the run is left to the tiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusekit.kernels import direct, tiles
from fusekit.kernels.ballot import Election, elected, summed_sign, voted_sign
from fusekit.kernels.floats import MAGNITUDE, as_bits, from_bf16, to_bf16
from fusekit.kernels.packed import Steps

Array = np.ndarray[Any, np.dtype[Any]]

CHUNK = direct.CHUNK
"""Elements of a run."""

STEPS = ("KEEP_ABOVE", "KEEP_AT_LEAST", "DROP_AT_LEAST", "KEEP_FIRST", "DROP_FIRST")
"""The kinds that are cuts."""

_GRANULE = 8192
_SQUARABLE = int(np.float32(1e-15).view(np.uint32))
"""Magnitudes from these bits on have squares that float32 holds without loss."""

_ONE = np.uint32(1)


@njit(nogil=True, cache=True)
def _find_ranges(
    bits: Array,
    begin: int,
    stop: int,
    steps: Steps,
    least: Array,
    most: Array,
    used: Array,
) -> bool:
    """The magnitudes' bits between which a run's entries are kept, both included, per model.

    `used` receives the equal entries that each step counts down. False where a step takes only
    some of the run's equal entries.
    """
    least[:] = 0
    most[:] = MAGNITUDE
    base = bits[bits.shape[0] - 1, begin:stop]
    left = steps.left
    for k in range(left.size):
        kind, r = steps.kinds[k, 0], steps.kinds[k, 1]
        key = np.uint32(as_bits(np.float32(steps.values[k])) & MAGNITUDE)
        used[k] = 0
        if kind in (tiles.KEEP_FIRST, tiles.DROP_FIRST):
            if left[k] > 0:
                equal = direct.count_equal_entries(bits[r, begin:stop], base, key)
                if equal > left[k]:
                    return False
                used[k] = equal
            taken = left[k] > 0
            if kind == tiles.KEEP_FIRST:
                least[r] = max(least[r], key if taken else np.uint32(key + _ONE))
            elif not taken:
                most[r] = min(most[r], key)
            elif key > 0:
                most[r] = min(most[r], np.uint32(key - _ONE))
            else:
                least[r] = MAGNITUDE
        elif kind == tiles.KEEP_ABOVE:
            least[r] = max(least[r], np.uint32(key + _ONE))
        elif kind == tiles.KEEP_AT_LEAST:
            least[r] = max(least[r], key)
        elif key > 0:
            most[r] = min(most[r], np.uint32(key - _ONE))
        else:
            least[r] = MAGNITUDE
    for r in range(least.size):
        if least[r] > most[r]:  # nothing finite is that large
            least[r], most[r] = MAGNITUDE, MAGNITUDE
    return True


@njit(nogil=True, cache=True)
def _add_kept(
    model: Array, base: Array, least: np.uint32, most: np.uint32, weight: float, total: Array
) -> None:
    """total += weight * the entries of a task vector whose magnitudes lie in a range."""
    zero = np.float32(0)
    width = np.uint32(most - least)
    for i in range(total.size):
        update = from_bf16(model[i]) - from_bf16(base[i])
        key = np.uint32(as_bits(update) & MAGNITUDE)
        total[i] += weight * np.float64(update if np.uint32(key - least) <= width else zero)


@njit(nogil=True, cache=True)
def _within(update: np.float32, least: np.uint32, width: np.uint32) -> np.float32:
    """The update where its magnitude's bits lie in [least, least + width], else 0."""
    key = np.uint32(as_bits(update) & MAGNITUDE)
    return update if np.uint32(key - least) <= width else np.float32(0)


@njit(nogil=True, cache=True)
def _sum_three(
    bits: Array, start: int, least: Array, most: Array, weights: Array, out: Array
) -> bool:
    """A run of `weighted_sum` in registers; whether all results are finite."""
    stop = start + out.size
    first, second, third = bits[0, start:stop], bits[1, start:stop], bits[2, start:stop]
    base, largest = bits[3, start:stop], np.uint32(0)
    j, k, m = least[0], least[1], least[2]
    e, f, g = np.uint32(most[0] - j), np.uint32(most[1] - k), np.uint32(most[2] - m)
    shares = weights[0], weights[1], weights[2]
    for i in range(out.size):
        origin = from_bf16(base[i])
        x = _within(from_bf16(first[i]) - origin, j, e)
        y = _within(from_bf16(second[i]) - origin, k, f)
        z = _within(from_bf16(third[i]) - origin, m, g)
        value = np.float32(direct.weighted_step(x, y, z, shares) + np.float64(origin))
        out[i] = to_bf16(value)
        largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
    return bool(largest < direct.OVERFLOW)


@njit(nogil=True, cache=True)
def weighted_sum(bits: Array, start: int, steps: Steps, weights: Array, out: Array) -> int:
    """out = the bfloat16 nearest to base + sum_i weights[i] * cut task vector i.

    Args:
        bits: (operands, any), the base last.
        start: where in `bits` the wanted elements begin.
        steps: the cuts, of `STEPS` alone.
        weights: (models,).
        out: (elements,) uint16.

    Returns:
        how many elements are done: fewer than asked for where the next run is left to the tiles.
    """
    models = weights.size
    least, most = np.empty(models, np.uint32), np.empty(models, np.uint32)
    left = steps.left
    used = np.empty(left.size, np.int64)
    totals = np.empty(CHUNK, np.float64)
    for begin in range(0, out.size, CHUNK):
        part = out[begin : begin + CHUNK]
        at = start + begin
        stop = at + part.size
        if not direct.all_finite(bits, at, stop):  # what is cut would not show in the result
            return begin
        if not _find_ranges(bits, at, stop, steps, least, most, used):
            return begin
        if models == 3:
            if not _sum_three(bits, at, least, most, weights, part):
                return begin
        else:
            base, total = bits[models, at:stop], totals[: part.size]
            total[:] = 0.0
            for r in range(models):
                _add_kept(bits[r, at:stop], base, least[r], most[r], weights[r], total)
            if not direct.add_to_base(total, base, part):
                return begin
        for k in range(left.size):
            left[k] -= used[k]
    return int(out.size)


@njit(nogil=True, cache=True)
def _add_squares(model: Array, base: Array, least: np.uint32, most: np.uint32, lane: Array) -> None:
    """lane += the squared entries of a task vector whose magnitudes lie in a range."""
    width = np.uint32(most - least)
    for i in range(model.size):
        update = _within(from_bf16(model[i]) - from_bf16(base[i]), least, width)
        lane[i] += update * update


@njit(nogil=True, cache=True)
def _add_split_squares(
    bits: Array, begin: int, stop: int, steps: Steps, memory: Array, sums: Array
) -> bool:
    """Add a run's squares where steps take some of its equal entries; whether float32 can."""
    models, size = sums.shape[0], stop - begin
    rows = memory[: models * size].reshape((models, size))
    direct.task_vectors(bits, begin, size, rows)
    tiles.prune(rows, 0, steps)
    smallest = MAGNITUDE
    for r in range(models):
        row, lane = rows[r], sums[r]
        for i in range(size):
            key = np.uint32(as_bits(row[i]) & MAGNITUDE)
            smallest = min(smallest, key if key else MAGNITUDE)
            lane[i] += row[i] * row[i]
    return bool(smallest >= _SQUARABLE)


@njit(nogil=True, cache=True)
def squares(bits: Array, start: int, size: int, steps: Steps, out: Array) -> bool:
    """Squared norms of cut task vectors: (granules, models).

    A lane sums 8 squares in float32 before float64 takes over. Returns whether all are known: sums
    are NaN where an entry is not finite or squares leave the range of float32.
    """
    models = bits.shape[0] - 1
    least, most = np.empty(models, np.uint32), np.empty(models, np.uint32)
    left = steps.left
    used = np.empty(left.size, np.int64)
    sums, wide = np.empty((models, CHUNK), np.float32), np.empty(CHUNK, np.float64)
    memory = np.empty(models * CHUNK, np.float32)
    all_known = True
    for granule in range(out.shape[0]):
        sums[:] = np.float32(0)
        known = True
        end = min((granule + 1) * _GRANULE, size)
        for begin in range(granule * _GRANULE, end, CHUNK):
            a, b = start + begin, start + min(begin + CHUNK, end)
            known &= direct.all_finite(bits, a, b)  # what is cut would not show
            if not _find_ranges(bits, a, b, steps, least, most, used):
                known &= _add_split_squares(bits, a, b, steps, memory, sums)
                continue
            known &= least.min() >= _SQUARABLE
            for r in range(models):
                _add_squares(bits[r, a:b], bits[models, a:b], least[r], most[r], sums[r])
            for k in range(left.size):
                left[k] -= used[k]
        for r in range(models):
            out[granule, r] = direct.folded_narrow(sums[r], wide) if known else np.nan
            all_known &= np.isfinite(out[granule, r])
    return all_known


@njit(nogil=True, cache=True, error_model="numpy")
def _elect_run(
    bits: Array, begin: int, least: Array, most: Array, rule: Election, out: Array
) -> np.uint32:
    """A run of `elect_of_three`; the bits of the largest magnitude."""
    stop = begin + out.size
    base, largest = bits[3, begin:stop], np.uint32(0)
    first, second, third = bits[0, begin:stop], bits[1, begin:stop], bits[2, begin:stop]
    j, k, m = least[0], least[1], least[2]
    e, f, g = np.uint32(most[0] - j), np.uint32(most[1] - k), np.uint32(most[2] - m)
    if rule.alike:
        for i in range(out.size):
            origin = from_bf16(base[i])
            x = _within(from_bf16(first[i]) - origin, j, e)
            y = _within(from_bf16(second[i]) - origin, k, f)
            z = _within(from_bf16(third[i]) - origin, m, g)
            value = elected(origin, x, y, z, summed_sign(x, y, z), rule)
            out[i] = to_bf16(value)
            largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
        return largest
    for i in range(out.size):
        origin = from_bf16(base[i])
        x = _within(from_bf16(first[i]) - origin, j, e)
        y = _within(from_bf16(second[i]) - origin, k, f)
        z = _within(from_bf16(third[i]) - origin, m, g)
        value = elected(origin, x, y, z, voted_sign(x, y, z, rule), rule)
        out[i] = to_bf16(value)
        largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
    return largest


@njit(nogil=True, cache=True, error_model="numpy")
def elect_of_three(bits: Array, start: int, steps: Steps, rule: Election, out: Array) -> int:
    """Sign election and merging of three cut task vectors, encoded, in one sweep.

    Args:
        bits, start, steps, out: as for `weighted_sum`, of three models.
        rule: the election.

    Returns:
        how many elements are done, as `weighted_sum`.
    """
    least, most = np.empty(3, np.uint32), np.empty(3, np.uint32)
    left = steps.left
    used = np.empty(left.size, np.int64)
    for begin in range(0, out.size, CHUNK):
        part = out[begin : begin + CHUNK]
        at = start + begin
        stop = at + part.size
        if not direct.all_finite(bits, at, stop):  # NaN agrees with no sign and would not show
            return begin
        if not _find_ranges(bits, at, stop, steps, least, most, used):
            return begin
        if _elect_run(bits, at, least, most, rule, part) >= direct.OVERFLOW:
            return begin
        for number in range(left.size):
            left[number] -= used[number]
    return int(out.size)
