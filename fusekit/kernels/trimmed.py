"""bfloat16 task vectors of which the small or the large entries are cut, merged in registers.

Cuts come as the steps of a program (`kernels.tiles`). A run of elements is merged here where every
step asks for nothing but a range of magnitudes; where only some of equal magnitudes are to be kept,
or a value is not finite, the run is left to the tiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusekit.kernels import direct, random, tiles
from fusekit.kernels.floats import as_bits, from_bf16, to_bf16

Array = np.ndarray[Any, np.dtype[Any]]

CHUNK = direct.CHUNK
"""Elements of a run."""

STEPS = ("KEEP_ABOVE", "KEEP_AT_LEAST", "DROP_AT_LEAST", "KEEP_FIRST", "DROP_FIRST")
"""What a program may consist of."""

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_ONE = np.uint32(1)


@njit(nogil=True, cache=True)
def _find_ranges(
    bits: Array,
    begin: int,
    stop: int,
    steps: Array,
    values: Array,
    left: Array,
    least: Array,
    most: Array,
    used: Array,
) -> bool:
    """The magnitudes' bits between which a run's entries are kept, both included, per model.

    `used` receives the equal entries that each step counts down. False where a step takes only
    some of the run's equal entries.
    """
    least[:] = 0
    most[:] = _MAGNITUDE
    base = bits[bits.shape[0] - 1, begin:stop]
    for k in range(steps.shape[0]):
        kind, r = steps[k, 0], steps[k, 1]
        key = np.uint32(as_bits(np.float32(values[k])) & _MAGNITUDE)
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
                least[r] = _MAGNITUDE
        elif kind == tiles.KEEP_ABOVE:
            least[r] = max(least[r], np.uint32(key + _ONE))
        elif kind == tiles.KEEP_AT_LEAST:
            least[r] = max(least[r], key)
        elif key > 0:
            most[r] = min(most[r], np.uint32(key - _ONE))
        else:
            least[r] = _MAGNITUDE
    for r in range(least.size):
        if least[r] > most[r]:  # nothing finite is that large
            least[r], most[r] = _MAGNITUDE, _MAGNITUDE
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
        key = np.uint32(as_bits(update) & _MAGNITUDE)
        total[i] += weight * np.float64(update if np.uint32(key - least) <= width else zero)


@njit(nogil=True, cache=True)
def weighted_sum(
    bits: Array,
    start: int,
    steps: Array,
    values: Array,
    left: Array,
    weights: Array,
    out: Array,
) -> int:
    """out = the bfloat16 nearest to base + sum_i weights[i] * cut task vector i.

    Args:
        bits: (operands, any), the base last.
        start: where in `bits` the wanted elements begin.
        steps, values, left: the cuts, of `STEPS` alone; `left` is counted down.
        weights: (models,).
        out: (elements,) uint16.

    Returns:
        how many elements are done: fewer than asked for where the next run is left to the tiles.
    """
    models = weights.size
    least, most = np.empty(models, np.uint32), np.empty(models, np.uint32)
    used = np.empty(left.size, np.int64)
    totals = np.empty(CHUNK, np.float64)
    for begin in range(0, out.size, CHUNK):
        part = out[begin : begin + CHUNK]
        at = start + begin
        stop = at + part.size
        if not direct.all_finite(bits, at, stop):  # what is cut would not show in the result
            return begin
        if not _find_ranges(bits, at, stop, steps, values, left, least, most, used):
            return begin
        base, total = bits[models, at:stop], totals[: part.size]
        total[:] = 0.0
        for r in range(models):
            _add_kept(bits[r, at:stop], base, least[r], most[r], weights[r], total)
        if not direct.add_to_base(total, base, part):
            return begin
        for k in range(left.size):
            left[k] -= used[k]
    return int(out.size)


@njit(nogil=True, cache=True, error_model="numpy")
def elected(
    origin: np.float32,
    x: np.float32,
    y: np.float32,
    z: np.float32,
    a: float,
    b: float,
    c: float,
    u: np.float32,
    v: np.float32,
    w: np.float32,
    divide: bool,
    factor: np.float32,
) -> np.float32:
    """The merged weight of three updates: what agrees with the sign of a x + b y + c z is summed.

    Votes are summed in float64, the updates with their weights u, v, w in float32.
    """
    one, zero = np.float32(1), np.float32(0)
    vote = (a * np.float64(x) + b * np.float64(y)) + c * np.float64(z)
    sign = -one if vote < 0.0 else one
    x, y, z = u * x, v * y, w * z
    agrees, too, as_well = x * sign > zero, y * sign > zero, z * sign > zero
    merged = ((x if agrees else zero) + (y if too else zero)) + (z if as_well else zero)
    if divide:
        kept = ((u if agrees else zero) + (v if too else zero)) + (w if as_well else zero)
        merged = merged / (kept if kept != zero else one)
    return np.float32(origin + factor * merged)


@njit(nogil=True, cache=True, error_model="numpy")
def _elect_run(
    bits: Array,
    begin: int,
    least: Array,
    most: Array,
    open_above: bool,
    a: float,
    b: float,
    c: float,
    u: np.float32,
    v: np.float32,
    w: np.float32,
    divide: bool,
    factor: np.float32,
    out: Array,
) -> np.uint32:
    """A run of `elect_of_three`; the bits of the largest magnitude.

    `open_above` says that no range ends: one comparison will do.
    """
    stop = begin + out.size
    base, zero = bits[3, begin:stop], np.float32(0)
    first, second, third = bits[0, begin:stop], bits[1, begin:stop], bits[2, begin:stop]
    j, k, m = least[0], least[1], least[2]
    e, f, g = np.uint32(most[0] - j), np.uint32(most[1] - k), np.uint32(most[2] - m)
    largest = np.uint32(0)
    if open_above:
        for i in range(out.size):
            origin = from_bf16(base[i])
            x, y = from_bf16(first[i]) - origin, from_bf16(second[i]) - origin
            z = from_bf16(third[i]) - origin
            x = x if np.uint32(as_bits(x) & _MAGNITUDE) >= j else zero
            y = y if np.uint32(as_bits(y) & _MAGNITUDE) >= k else zero
            z = z if np.uint32(as_bits(z) & _MAGNITUDE) >= m else zero
            value = elected(origin, x, y, z, a, b, c, u, v, w, divide, factor)
            out[i] = to_bf16(value)
            largest = max(largest, np.uint32(as_bits(value) & _MAGNITUDE))
        return largest
    for i in range(out.size):
        origin = from_bf16(base[i])
        x, y = from_bf16(first[i]) - origin, from_bf16(second[i]) - origin
        z = from_bf16(third[i]) - origin
        x = x if np.uint32(np.uint32(as_bits(x) & _MAGNITUDE) - j) <= e else zero
        y = y if np.uint32(np.uint32(as_bits(y) & _MAGNITUDE) - k) <= f else zero
        z = z if np.uint32(np.uint32(as_bits(z) & _MAGNITUDE) - m) <= g else zero
        value = elected(origin, x, y, z, a, b, c, u, v, w, divide, factor)
        out[i] = to_bf16(value)
        largest = max(largest, np.uint32(as_bits(value) & _MAGNITUDE))
    return largest


@njit(nogil=True, cache=True, error_model="numpy")
def elect_of_three(
    bits: Array,
    start: int,
    steps: Array,
    values: Array,
    left: Array,
    ballots: Array,
    weights: Array,
    divide: bool,
    scale: float,
    out: Array,
) -> int:
    """Sign election by mass and merging of three cut task vectors, encoded, in one sweep.

    Args:
        bits, start, steps, values, left, out: as for `weighted_sum`, of three models.
        ballots, weights: (3,) of the votes (summed in float64) and of the merge.
        divide: by the weights of the entries that agree.
        scale: of the merged task vector.

    Returns:
        how many elements are done, as `weighted_sum`.
    """
    a, b, c = ballots[0], ballots[1], ballots[2]
    u, v, w = np.float32(weights[0]), np.float32(weights[1]), np.float32(weights[2])
    factor = np.float32(scale)
    least, most = np.empty(3, np.uint32), np.empty(3, np.uint32)
    used = np.empty(left.size, np.int64)
    for begin in range(0, out.size, CHUNK):
        part = out[begin : begin + CHUNK]
        at = start + begin
        stop = at + part.size
        if not direct.all_finite(bits, at, stop):  # NaN agrees with no sign and would not show
            return begin
        if not _find_ranges(bits, at, stop, steps, values, left, least, most, used):
            return begin
        open_above = min(most[0], most[1], most[2]) == _MAGNITUDE
        largest = _elect_run(
            bits, at, least, most, open_above, a, b, c, u, v, w, divide, factor, part
        )
        if largest >= direct.OVERFLOW:
            return begin
        for number in range(left.size):
            left[number] -= used[number]
    return int(out.size)


@njit(nogil=True, cache=True, error_model="numpy")
def _elect_half(
    bits: Array,
    begin: int,
    pairs: Array,
    upper: bool,
    thresholds: Array,
    factors: Array,
    ballots: Array,
    weights: Array,
    divide: bool,
    scale: float,
    out: Array,
) -> tuple[np.uint32, bool]:
    """Half a run of `drop_and_elect`: (bits of the largest magnitude, whether any draw ties)."""
    a, b, c = ballots[0], ballots[1], ballots[2]
    u, v, w = np.float32(weights[0]), np.float32(weights[1]), np.float32(weights[2])
    p, q, r = factors[0], factors[1], factors[2]
    j, k, m = thresholds[0], thresholds[1], thresholds[2]
    zero, factor = np.float32(0), np.float32(scale)
    shift = np.uint32(16 if upper else 0)
    stop = begin + out.size
    base = bits[3, begin:stop]
    first, second, third = bits[0, begin:stop], bits[1, begin:stop], bits[2, begin:stop]
    ones, twos, threes = pairs[0], pairs[1], pairs[2]
    largest, tied = np.uint32(0), np.uint32(0)
    for i in range(out.size):
        origin = from_bf16(base[i])
        x, y = p * (from_bf16(first[i]) - origin), q * (from_bf16(second[i]) - origin)
        z = r * (from_bf16(third[i]) - origin)
        one = np.uint32(np.uint32(ones[i] >> shift) & random.LOW)
        two = np.uint32(np.uint32(twos[i] >> shift) & random.LOW)
        three = np.uint32(np.uint32(threes[i] >> shift) & random.LOW)
        tied |= np.uint32(one == j) | np.uint32(two == k) | np.uint32(three == m)
        x, y = x if one <= j else zero, y if two <= k else zero
        z = z if three <= m else zero
        value = elected(origin, x, y, z, a, b, c, u, v, w, divide, factor)
        out[i] = to_bf16(value)
        largest = max(largest, np.uint32(as_bits(value) & _MAGNITUDE))
    return largest, bool(tied != 0)


@njit(nogil=True, cache=True, error_model="numpy")
def drop_and_elect(
    bits: Array,
    start: int,
    position: int,
    keys: Array,
    densities: Array,
    factors: Array,
    ballots: Array,
    weights: Array,
    divide: bool,
    scale: float,
    out: Array,
) -> bool:
    """`elect_of_three` of task vectors after random drops and scaling by `factors`, float32 each.

    `position`, a multiple of a granule, is where in the tensor the elements begin. Returns False
    where a value is not finite: `out` is then not to be used.
    """
    pairs = np.empty((3, random.HALF), np.uint32)
    thresholds, rests = np.empty(3, np.uint32), np.empty(3, np.float64)
    granule_keys = np.empty((3, 2), np.uint32)
    kept = np.empty(3, np.float32)
    for r in range(3):
        thresholds[r], rests[r] = random.thresholds(densities[r])
    for at in range(0, out.size, random.RUN):
        part = out[at : at + random.RUN]
        begin = start + at
        if not direct.all_finite(bits, begin, begin + part.size):
            return False
        for r in range(3):
            first, second = random.draw(position + at, keys[r], pairs[r])
            granule_keys[r, 0], granule_keys[r, 1] = first, second
        middle = min(random.HALF, part.size)
        low, tied = _elect_half(
            bits, begin, pairs, False, thresholds, factors, ballots, weights, divide, scale,
            part[:middle],
        )  # fmt: skip
        high, tied_too = _elect_half(
            bits, begin + middle, pairs, True, thresholds, factors, ballots, weights, divide, scale,
            part[middle:],
        )  # fmt: skip
        if tied or tied_too:
            for i in range(part.size):
                lane, shift = i % random.HALF, np.uint32(16 if i >= random.HALF else 0)
                origin = from_bf16(bits[3, begin + i])
                changed = False
                for r in range(3):
                    drawn = np.uint32(np.uint32(pairs[r, lane] >> shift) & random.LOW)
                    dropped = drawn > thresholds[r]
                    if drawn == thresholds[r]:
                        dropped = random.is_dropped(
                            i, position + at, pairs[r], thresholds[r], rests[r],
                            granule_keys[r, 0], granule_keys[r, 1],
                        )  # fmt: skip
                        changed |= dropped
                    update = factors[r] * (from_bf16(bits[r, begin + i]) - origin)
                    kept[r] = np.float32(0) if dropped else update
                if changed:
                    value = elected(
                        origin, kept[0], kept[1], kept[2], ballots[0], ballots[1], ballots[2],
                        np.float32(weights[0]), np.float32(weights[1]), np.float32(weights[2]),
                        divide, np.float32(scale),
                    )  # fmt: skip
                    part[i] = to_bf16(value)
                    low = max(low, np.uint32(as_bits(value) & _MAGNITUDE))
        if max(low, high) >= direct.OVERFLOW:
            return False
    return True
