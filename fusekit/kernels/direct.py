"""bfloat16 models without a decoded copy: what needs no pruning happens in registers.

`bits` holds the operands' bits as they were read, (operands, any), the base last; the wanted
elements begin at `start`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusekit.kernels import lanes, norms, random
from fusekit.kernels.floats import MAGNITUDE, as_bits, from_bf16, to_bf16

Array = np.ndarray[Any, np.dtype[Any]]

CHUNK = lanes.CHUNK
"""Elements that are worked on together."""

_GRANULE = 8192
_LANES = 512
_CHAIN = 8

OVERFLOW = 0x7F7F8000
"""The smallest magnitude, as float32 bits, that no finite bfloat16 is nearest to."""


@njit(nogil=True, cache=True)
def all_finite(bits: Array, start: int, stop: int) -> bool:
    """Whether no operand has a NaN or infinite entry."""
    largest = np.uint16(0)
    for r in range(bits.shape[0]):
        row = bits[r, start:stop]
        for i in range(row.size):
            largest = max(largest, np.uint16(row[i] & np.uint16(0x7FFF)))
    return int(largest) < 0x7F80


@njit(nogil=True, cache=True)
def task_vectors(bits: Array, start: int, size: int, out: Array) -> None:
    """out[:, :size] = the models' differences from the base, from element `start` of `bits` on."""
    n = bits.shape[0] - 1
    base = bits[n, start : start + size]
    for r in range(n):
        row, target = bits[r, start : start + size], out[r, :size]
        for i in range(size):
            target[i] = from_bf16(row[i]) - from_bf16(base[i])


@njit(nogil=True, cache=True)
def _few(bits: Array, weights: Array, start: int, stop: int, out: Array) -> int:
    """The weighted sum of at most four operands, encoded; the largest magnitude's bits."""
    n = weights.size
    largest = np.uint32(0)
    first, a = bits[0, start:stop], weights[0]
    if n == 1:
        for i in range(out.size):
            value = np.float32(a * np.float64(from_bf16(first[i])))
            out[i] = to_bf16(value)
            largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
        return int(largest)
    second, b = bits[1, start:stop], weights[1]
    if n == 2:
        for i in range(out.size):
            total = a * np.float64(from_bf16(first[i])) + b * np.float64(from_bf16(second[i]))
            value = np.float32(total)
            out[i] = to_bf16(value)
            largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
        return int(largest)
    third, c = bits[2, start:stop], weights[2]
    if n == 3:
        for i in range(out.size):
            total = a * np.float64(from_bf16(first[i])) + b * np.float64(from_bf16(second[i]))
            value = np.float32(total + c * np.float64(from_bf16(third[i])))
            out[i] = to_bf16(value)
            largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
        return int(largest)
    fourth, d = bits[3, start:stop], weights[3]
    for i in range(out.size):
        total = a * np.float64(from_bf16(first[i])) + b * np.float64(from_bf16(second[i]))
        total += c * np.float64(from_bf16(third[i]))
        value = np.float32(total + d * np.float64(from_bf16(fourth[i])))
        out[i] = to_bf16(value)
        largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
    return int(largest)


@njit(nogil=True, cache=True)
def _many(bits: Array, weights: Array, start: int, stop: int, total: Array, out: Array) -> int:
    """The weighted sum of five operands or more, two at a time."""
    n = weights.size
    total[:] = 0.0
    done = 0
    while done + 1 < n:
        left, right = bits[done, start:stop], bits[done + 1, start:stop]
        a, b = weights[done], weights[done + 1]
        for i in range(out.size):
            total[i] += a * np.float64(from_bf16(left[i]))
            total[i] += b * np.float64(from_bf16(right[i]))
        done += 2
    if done < n:
        left, a = bits[done, start:stop], weights[done]
        for i in range(out.size):
            total[i] += a * np.float64(from_bf16(left[i]))
    largest = np.uint32(0)
    for i in range(out.size):
        value = np.float32(total[i])
        out[i] = to_bf16(value)
        largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
    return int(largest)


@njit(nogil=True, cache=True)
def weighted_sum(bits: Array, start: int, weights: Array, out: Array) -> bool:
    """out = the bfloat16 nearest to sum_i weights[i] * bits[i], summed in float64.

    Returns False where a result left the finite range or an operand has NaN or infinite entries:
    `out` is then not to be used.
    """
    totals = np.empty(CHUNK, np.float64)
    for begin in range(0, out.size, CHUNK):
        part = out[begin : begin + CHUNK]
        first = start + begin
        stop = first + part.size
        if weights.size <= 4:
            largest = _few(bits, weights, first, stop, part)
        else:
            largest = _many(bits, weights, first, stop, totals[: part.size], part)
        if largest >= OVERFLOW:
            return False
    return True


@njit(nogil=True, cache=True)
def _pair(left: Array, right: Array, base: Array, deltas: bool, chains: Array) -> None:
    """chains += products left left, left right and right right, entry by entry."""
    first, mixed, second = chains[0], chains[1], chains[2]
    if deltas:
        for i in range(left.size):
            origin = from_bf16(base[i])
            p, q = from_bf16(left[i]) - origin, from_bf16(right[i]) - origin
            first[i] += p * p
            mixed[i] += p * q
            second[i] += q * q
    else:
        for i in range(left.size):
            p, q = from_bf16(left[i]), from_bf16(right[i])
            first[i] += p * p
            mixed[i] += p * q
            second[i] += q * q


@njit(nogil=True, cache=True)
def folded(lane: Array) -> float:
    """The sum of a power of two of entries, the upper half added to the lower again and again."""
    half = lane.size
    while half > 1:
        half //= 2
        lower, upper = lane[:half], lane[half : 2 * half]
        for i in range(half):
            lower[i] += upper[i]
    return float(lane[0])


@njit(nogil=True, cache=True)
def folded_narrow(lane: Array, wide: Array) -> float:
    """The sum of float32 lanes in float64; `wide` is working memory of their number."""
    for i in range(lane.size):
        wide[i] = np.float64(lane[i])
    return float(folded(wide))


@njit(nogil=True, cache=True)
def _own_and_mixed(
    left: Array, right: Array, base: Array, deltas: bool, own: Array, mixed: Array
) -> None:
    """own += left left, mixed += left right, entry by entry."""
    if deltas:
        for i in range(left.size):
            origin = from_bf16(base[i])
            p, q = from_bf16(left[i]) - origin, from_bf16(right[i]) - origin
            own[i] += p * p
            mixed[i] += p * q
    else:
        for i in range(left.size):
            p, q = from_bf16(left[i]), from_bf16(right[i])
            own[i] += p * p
            mixed[i] += p * q


@njit(nogil=True, cache=True)
def products(bits: Array, start: int, size: int, deltas: bool, out: Array) -> None:
    """Inner products of two or three models, or of their task vectors, per granule.

    `out` is (granules, pairs), the pairs as in `gram.gram`. Products of bfloat16 are exact in
    float32; eight at most are summed before float64 takes over, in 512 lanes.
    """
    pairs, last = out.shape[1], bits.shape[0] - 1
    chains = np.empty((pairs, _LANES), np.float32)
    lanes = np.empty((pairs, _LANES), np.float64)
    for granule in range(out.shape[0]):
        begin, end = granule * _GRANULE, min((granule + 1) * _GRANULE, size)
        lanes[:] = 0.0
        chains[:] = np.float32(0)
        links = 0
        for at in range(begin, end, _LANES):
            a, b = start + at, start + min(at + _LANES, end)
            base = bits[last, a:b]
            if pairs == 3:
                _pair(bits[0, a:b], bits[1, a:b], base, deltas, chains)
            else:
                for left, right, own, mixed in ((0, 1, 0, 1), (1, 2, 3, 4), (2, 0, 5, 2)):
                    first, second = bits[left, a:b], bits[right, a:b]
                    _own_and_mixed(first, second, base, deltas, chains[own], chains[mixed])
            links += 1
            if links == _CHAIN or b - start == end:
                for j in range(pairs):
                    chain, lane = chains[j], lanes[j]
                    for i in range(_LANES):
                        lane[i] += np.float64(chain[i])
                        chain[i] = np.float32(0)
                links = 0
        for j in range(pairs):
            out[granule, j] = folded(lanes[j])


@njit(nogil=True, cache=True)
def _add_to_lanes(model: Array, base: Array, what: int, lanes: Array) -> None:
    """lanes[i] += what a task vector's entry i adds to one of `norms`' sums."""
    if what == norms.SQUARES:
        for i in range(model.size):
            delta = np.float64(from_bf16(model[i]) - from_bf16(base[i]))
            lanes[i] += delta * delta
    elif what == norms.MAGNITUDES:
        for i in range(model.size):
            lanes[i] += abs(np.float64(from_bf16(model[i]) - from_bf16(base[i])))
    else:
        for i in range(model.size):
            lanes[i] += np.float64(from_bf16(model[i]) - from_bf16(base[i]))


@njit(nogil=True, cache=True)
def sums(bits: Array, start: int, size: int, what: int, out: Array) -> None:
    """`norms.sums` of the task vectors per granule, to the same bits: (granules, models)."""
    models = bits.shape[0] - 1
    lanes = np.empty(norms.LANES, np.float64)
    for granule in range(out.shape[0]):
        begin, end = granule * _GRANULE, min((granule + 1) * _GRANULE, size)
        for r in range(models):
            lanes[:] = 0.0
            for at in range(begin, end, norms.LANES):
                a, b = start + at, start + min(at + norms.LANES, end)
                _add_to_lanes(bits[r, a:b], bits[models, a:b], what, lanes)
            total = 0.0
            for i in range(norms.LANES):
                total += lanes[i]
            out[granule, r] = total


@njit(nogil=True, cache=True)
def _add_sizes(model: Array, base: Array, kept: Array, whole: Array, left: Array) -> None:
    """Add the magnitudes of updates, and of those that are kept."""
    zero = np.float32(0)
    for i in range(model.size):
        size = abs(from_bf16(model[i]) - from_bf16(base[i]))
        whole[i] += size
        left[i] += size if kept[i] else zero


@njit(nogil=True, cache=True)
def drop_sums(
    bits: Array,
    start: int,
    size: int,
    position: int,
    keys: Array,
    densities: Array,
    out: Array,
) -> None:
    """Sums of magnitudes of task vectors before and after random drops: (granules, 2 models).

    `position`, a multiple of a granule, is where in the tensor the elements begin. A lane sums 16
    magnitudes in float32 before float64 takes over.
    """
    models = bits.shape[0] - 1
    kept = np.empty(random.RUN, np.uint8)
    sizes = np.empty((2, _LANES), np.float32)
    wide = np.empty(_LANES, np.float64)
    whole, left = sizes[0], sizes[1]
    for granule in range(out.shape[0]):
        begin, end = granule * _GRANULE, min((granule + 1) * _GRANULE, size)
        for r in range(models):
            sizes[:] = np.float32(0)
            for run in range(begin, end, random.RUN):
                random.survivors(position + run, keys[r], densities[r], kept)
                for at in range(0, random.RUN, _LANES):
                    a, b = start + min(run + at, end), start + min(run + at + _LANES, end)
                    flags = kept[at : at + _LANES]
                    _add_sizes(bits[r, a:b], bits[models, a:b], flags, whole, left)
            for which in range(2):
                out[granule, which * models + r] = folded_narrow(sizes[which], wide)


@njit(nogil=True, cache=True)
def add_to_base(change: Array, base: Array, out: Array) -> bool:
    """out = the bfloat16 nearest to base + change, added in float64; whether all are finite."""
    largest = np.uint32(0)
    for i in range(out.size):
        value = np.float32(np.float64(change[i]) + np.float64(from_bf16(base[i])))
        out[i] = to_bf16(value)
        largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
    return int(largest) < OVERFLOW


@njit(nogil=True, cache=True)
def move_at_most(bits: Array, start: int, slope: float, limit: float, out: Array) -> bool:
    """`pairs.move_at_most` of two models, encoded; returns False as `weighted_sum` does."""
    for begin in range(0, out.size, CHUNK):
        part, at = out[begin : begin + CHUNK], start + begin
        stop = at + part.size
        if not all_finite(bits, at, stop):  # a bounded step would not show it
            return False
        first, second = bits[0, at:stop], bits[1, at:stop]
        largest = np.uint32(0)
        for i in range(part.size):
            origin = np.float64(from_bf16(first[i]))
            step = slope * (np.float64(from_bf16(second[i])) - origin)
            value = np.float32(origin + min(max(step, -limit), limit))
            part[i] = to_bf16(value)
            largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
        if largest >= OVERFLOW:
            return False
    return True


@njit(nogil=True, cache=True)
def _add_kept(model: Array, base: Array, kept: Array, weight: float, total: Array) -> None:
    """total += weight * the kept updates."""
    zero = np.float32(0)
    for i in range(total.size):
        update = from_bf16(model[i]) - from_bf16(base[i])
        total[i] += weight * np.float64(update if kept[i] else zero)


@njit(nogil=True, cache=True)
def weighted_step(
    x: np.float32, y: np.float32, z: np.float32, weights: tuple[float, float, float]
) -> float:
    """The weighted sum of three updates."""
    a, b, c = weights
    return (a * np.float64(x) + b * np.float64(y)) + c * np.float64(z)


@njit(nogil=True, cache=True)
def sum_kept_of_three(bits: Array, start: int, kept: Array, weights: Array, out: Array) -> bool:
    """Encode base + the weighted sum of the updates whose flag in `kept` is not 0, of one run.

    Returns whether all results are finite.
    """
    stop = start + out.size
    first, second, third = bits[0, start:stop], bits[1, start:stop], bits[2, start:stop]
    base, one, two, three = bits[3, start:stop], kept[0], kept[1], kept[2]
    shares = weights[0], weights[1], weights[2]
    largest, zero = np.uint32(0), np.float32(0)
    for i in range(out.size):
        origin = from_bf16(base[i])
        x, y = from_bf16(first[i]) - origin, from_bf16(second[i]) - origin
        z = from_bf16(third[i]) - origin
        x, y, z = x if one[i] else zero, y if two[i] else zero, z if three[i] else zero
        value = np.float32(weighted_step(x, y, z, shares) + np.float64(origin))
        out[i] = to_bf16(value)
        largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
    return bool(largest < OVERFLOW)


@njit(nogil=True, cache=True)
def drop_weighted_sum(
    bits: Array,
    start: int,
    position: int,
    keys: Array,
    densities: Array,
    weights: Array,
    out: Array,
) -> bool:
    """out = the bfloat16 nearest to base + sum_i weights[i] * task vector i after random drops.

    `position`, a multiple of a granule, is where in the tensor the elements begin. Returns False
    as `weighted_sum` does.
    """
    models = bits.shape[0] - 1
    kept = np.empty((models, random.RUN), np.uint8)
    totals = np.empty(random.RUN, np.float64)
    for at in range(0, out.size, random.RUN):
        part = out[at : at + random.RUN]
        a, b = start + at, start + at + part.size
        if not all_finite(bits, a, b):  # what is dropped would not show in the result
            return False
        for r in range(models):
            random.survivors(position + at, keys[r], densities[r], kept[r])
        if models == 3:
            if not sum_kept_of_three(bits, a, kept, weights, part):
                return False
            continue
        base, total = bits[models, a:b], totals[: part.size]
        total[:] = 0.0
        for r in range(models):
            _add_kept(bits[r, a:b], base, kept[r], weights[r], total)
        if not add_to_base(total, base, part):
            return False
    return True


@njit(nogil=True, cache=True)
def _key(model: np.uint16, base: np.uint16) -> np.uint32:
    """The bits of a task-vector entry's magnitude."""
    return np.uint32(as_bits(from_bf16(model) - from_bf16(base)) & MAGNITUDE)


@njit(nogil=True, cache=True)
def _deviate(
    left: Array, right: Array, first: Array, base: Array, total: Array, square: Array
) -> None:
    """total, square += deviations of two task vectors from the first one, and their squares."""
    for i in range(total.size):
        origin = from_bf16(base[i])
        zero = np.float64(from_bf16(first[i]) - origin)
        x = np.float64(from_bf16(left[i]) - origin) - zero
        y = np.float64(from_bf16(right[i]) - origin) - zero
        total[i] = (total[i] + x) + y
        square[i] = (square[i] + x * x) + y * y


@njit(nogil=True, cache=True)
def variance_of_three(
    first: np.uint16, second: np.uint16, third: np.uint16, base: np.uint16
) -> np.float32:
    """`variance` of one entry of three models."""
    share, origin = 1.0 / 3, from_bf16(base)
    zero = np.float64(from_bf16(first) - origin)
    x = np.float64(from_bf16(second) - origin) - zero
    y = np.float64(from_bf16(third) - origin) - zero
    mean = (x + y) * share
    return np.float32((x * x + y * y) * share - mean * mean)


@njit(nogil=True, cache=True)
def _vary_three(first: Array, second: Array, third: Array, base: Array, out: Array) -> None:
    """`variance_of_run` without working memory."""
    for i in range(out.size):
        out[i] = variance_of_three(first[i], second[i], third[i], base[i])


@njit(nogil=True, cache=True)
def variance_of_run(bits: Array, start: int, total: Array, square: Array, out: Array) -> None:
    """`variance` of as many finite entries as `out` has room for; all arrays are of one length."""
    n = bits.shape[0] - 1
    share = 1.0 / n
    stop = start + out.size
    base, first = bits[n, start:stop], bits[0, start:stop]
    if n == 3:
        _vary_three(first, bits[1, start:stop], bits[2, start:stop], base, out)
        return
    total[:] = 0.0
    square[:] = 0.0
    if n % 2 == 0:  # the first one beside itself adds nothing
        _deviate(first, bits[1, start:stop], first, base, total, square)
    for r in range(2 - n % 2, n, 2):
        _deviate(bits[r, start:stop], bits[r + 1, start:stop], first, base, total, square)
    for i in range(out.size):
        mean = total[i] * share
        out[i] = square[i] * share - mean * mean


@njit(nogil=True, cache=True)
def variance(bits: Array, start: int, out: Array) -> int:
    """`thin.variance` of the task vectors, to the same bits: (elements,) float32.

    Returns how many elements are done: fewer than asked for where the next 1024 have an entry that
    is not finite.
    """
    totals, squares = np.empty(CHUNK, np.float64), np.empty(CHUNK, np.float64)
    for begin in range(0, out.size, CHUNK):
        part = out[begin : begin + CHUNK]
        at, count = start + begin, part.size
        if not all_finite(bits, at, at + count):
            return begin
        variance_of_run(bits, at, totals[:count], squares[:count], part)
    return int(out.size)


@njit(nogil=True, cache=True)
def magnitudes(bits: Array, start: int, size: int, out: Array, at: int) -> None:
    """out[:, at : at + size] = the bits of the magnitudes of task vectors; (models, any) uint32."""
    base = bits[bits.shape[0] - 1, start : start + size]
    for r in range(out.shape[0]):
        model, row = bits[r, start : start + size], out[r, at : at + size]
        for i in range(size):
            row[i] = _key(model[i], base[i])


@njit(nogil=True, cache=True)
def count_brackets(
    bits: Array, start: int, size: int, brackets: Array, bins: Array, above: Array
) -> int:
    """`order.count_brackets` of the magnitudes of task vectors.

    Returns how many elements are done: fewer than asked for where the next 1024 have an entry that
    is not finite.
    """
    masks = np.empty(lanes.WORDS, np.uint64)
    work = np.empty(lanes.WORDS, np.int32)
    inside = np.empty(CHUNK, np.int32)
    for done in range(0, size, CHUNK):
        begin = start + done
        stop = min(begin + CHUNK, start + size)
        if not all_finite(bits, begin, stop):
            return done
        base = bits[bits.shape[0] - 1, begin:stop]
        for k in range(brackets.shape[0]):
            model, first = bits[brackets[k, 0], begin:stop], bins[brackets[k, 4] :]
            low, high, shift = brackets[k, 1], brackets[k, 2], brackets[k, 3]
            if stop - begin == CHUNK:
                over = 0
                for word in range(lanes.WORDS):
                    at = word * lanes.LANES
                    higher, at_least = lanes.compare_deltas(model, base, at, low, high)
                    over += lanes.count_bits(higher)
                    masks[word] = at_least & ~higher
                above[k] += over
                for number in range(lanes.list_bits(masks, work, inside)):
                    i = inside[number]
                    first[np.uint32(_key(model[i], base[i]) - low) >> shift] += 1
            else:
                for i in range(model.size):
                    key = _key(model[i], base[i])
                    if key > high:
                        above[k] += 1
                    elif key >= low:
                        first[np.uint32(key - low) >> shift] += 1
    return size


@njit(nogil=True, cache=True)
def count_equal_entries(model: Array, base: Array, key: np.uint32) -> int:
    """How many entries of a task vector have the magnitude whose bits are `key`."""
    count = np.uint32(0)
    for i in range(model.size):
        delta = from_bf16(model[i]) - from_bf16(base[i])
        count += np.uint32(np.uint32(as_bits(delta) & MAGNITUDE) == key)
    return int(count)


@njit(nogil=True, cache=True)
def count_equal(bits: Array, start: int, size: int, models: Array, keys: Array, out: Array) -> None:
    """out[granule, j] = entries of task vector models[j] whose magnitude has the bits keys[j]."""
    base = bits[bits.shape[0] - 1]
    for granule in range(out.shape[0]):
        begin = start + granule * _GRANULE
        stop = min(begin + _GRANULE, start + size)
        for j in range(keys.size):
            out[granule, j] = count_equal_entries(
                bits[models[j], begin:stop], base[begin:stop], keys[j]
            )
