"""One vector for several tasks, and who needs which entry of it: bfloat16 models in registers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusekit.kernels import direct
from fusekit.kernels.elect import vote_of_three
from fusekit.kernels.floats import MAGNITUDE, as_bits, from_bf16, to_bf16

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = direct.CHUNK
_GRANULE = 8192


@njit(nogil=True, cache=True)
def _sum_up(bits: Array, start: int, total: Array, update: Array) -> None:
    """update = the sum of the task vectors, added up in float64."""
    models, stop = bits.shape[0] - 1, start + update.size
    base = bits[models, start:stop]
    total[:] = 0.0
    for r in range(models):
        model = bits[r, start:stop]
        for i in range(update.size):
            total[i] += np.float64(from_bf16(model[i]) - from_bf16(base[i]))
    for i in range(update.size):
        update[i] = total[i]


@njit(nogil=True, cache=True)
def _stands_out(d: float, update: float, ratio: float) -> bool:
    """What `masks.stand_out` says of an entry of one task vector."""
    return bool(abs(d) > ratio * abs(update - d))


@njit(nogil=True, cache=True)
def _mark(model: Array, base: Array, update: Array, ratio: float, kept: Array) -> None:
    """kept = where a task vector stands out."""
    for i in range(update.size):
        d = np.float64(from_bf16(model[i]) - from_bf16(base[i]))
        kept[i] = _stands_out(d, np.float64(update[i]), ratio)


@njit(nogil=True, cache=True)
def _three_updates(
    first: np.uint16, second: np.uint16, third: np.uint16, origin: np.float32
) -> tuple[float, float, float, float]:
    """Entries of three task vectors and their sum, rounded to float32."""
    x = np.float64(from_bf16(first) - origin)
    y = np.float64(from_bf16(second) - origin)
    z = np.float64(from_bf16(third) - origin)
    return x, y, z, np.float64(np.float32((x + y) + z))


@njit(nogil=True, cache=True)
def _sum_and_mark_three(bits: Array, start: int, ratios: Array, keep: Array, out: Array) -> bool:
    """A run of `sum_and_masks` in registers."""
    stop = start + out.size
    first, second, third = bits[0, start:stop], bits[1, start:stop], bits[2, start:stop]
    base, largest = bits[3, start:stop], np.uint32(0)
    one, two, three = keep[0, : out.size], keep[1, : out.size], keep[2, : out.size]
    a, b, c = ratios[0], ratios[1], ratios[2]
    for i in range(out.size):
        origin = from_bf16(base[i])
        x, y, z, update = _three_updates(first[i], second[i], third[i], origin)
        one[i] = _stands_out(x, update, a)
        two[i] = _stands_out(y, update, b)
        three[i] = _stands_out(z, update, c)
        value = np.float32(np.float64(origin) + update)
        out[i] = to_bf16(value)
        largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
    return bool(largest < direct.OVERFLOW)


@njit(nogil=True, cache=True)
def _consensus_of_three(
    bits: Array, start: int, ratios: Array, tasks: int, scale: float, out: Array
) -> bool:
    """A run of `consensus` in registers."""
    stop = start + out.size
    first, second, third = bits[0, start:stop], bits[1, start:stop], bits[2, start:stop]
    base, largest = bits[3, start:stop], np.uint32(0)
    a, b, c = ratios[0], ratios[1], ratios[2]
    if not direct.all_finite(bits, start, stop):  # what is left out would not show
        return False
    for i in range(out.size):
        origin = from_bf16(base[i])
        x, y, z, update = _three_updates(first[i], second[i], third[i], origin)
        count = np.int32(_stands_out(x, update, a)) + np.int32(_stands_out(y, update, b))
        count += np.int32(_stands_out(z, update, c))
        value = np.float32(np.float64(origin) + (scale * update if count >= tasks else 0.0))
        out[i] = to_bf16(value)
        largest = max(largest, np.uint32(as_bits(value) & MAGNITUDE))
    return bool(largest < direct.OVERFLOW)


@njit(nogil=True, cache=True)
def sum_and_masks(bits: Array, start: int, ratios: Array, keep: Array, out: Array) -> bool:
    """out = the bfloat16 nearest to base + the sum of the task vectors; keep[i] = task i's mask.

    Args:
        bits: (models + 1, any), the base last; the wanted elements begin at `start`.
        ratios: (models,) how much larger than the others' disturbance an entry must be.
        keep: (models, at least elements) of 0 and 1, zero behind the elements.
        out: (elements,) uint16.

    Returns False where a value is not finite: the results are then not to be used.
    """
    models = ratios.size
    totals, updates = np.empty(_CHUNK, np.float64), np.empty(_CHUNK, np.float32)
    keep[:, out.size :] = 0
    for begin in range(0, out.size, _CHUNK):
        part = out[begin : begin + _CHUNK]
        at, end = start + begin, begin + part.size
        stop = at + part.size
        if models == 3:
            if not _sum_and_mark_three(bits, at, ratios, keep[:, begin:end], part):
                return False
            continue
        if not direct.all_finite(bits, at, stop):
            return False
        update, base = updates[: part.size], bits[models, at:stop]
        _sum_up(bits, at, totals[: part.size], update)
        for r in range(models):
            _mark(bits[r, at:stop], base, update, ratios[r], keep[r, begin:end])
        if not direct.add_to_base(update, base, part):
            return False
    return True


@njit(nogil=True, cache=True)
def consensus(bits: Array, start: int, ratios: Array, tasks: int, scale: float, out: Array) -> bool:
    """out = the bfloat16 nearest to base + scale * the sum where `tasks` masks at least are set.

    Arguments and result as for `sum_and_masks`.
    """
    models = ratios.size
    totals, updates = np.empty(_CHUNK, np.float64), np.empty(_CHUNK, np.float32)
    kept, counts = np.empty(_CHUNK, np.uint8), np.empty(_CHUNK, np.uint8)
    for begin in range(0, out.size, _CHUNK):
        part = out[begin : begin + _CHUNK]
        at = start + begin
        stop = at + part.size
        if models == 3:
            if not _consensus_of_three(bits, at, ratios, tasks, scale, part):
                return False
            continue
        if not direct.all_finite(bits, at, stop):
            return False
        update, base = updates[: part.size], bits[models, at:stop]
        count, change = counts[: part.size], totals[: part.size]
        _sum_up(bits, at, change, update)
        count[:] = 0
        for r in range(models):
            _mark(bits[r, at:stop], base, update, ratios[r], kept[: part.size])
            for i in range(part.size):
                count[i] += kept[i]
        for i in range(part.size):
            change[i] = scale * np.float64(update[i]) if count[i] >= tasks else 0.0
        if not direct.add_to_base(change, base, part):
            return False
    return True


@njit(nogil=True, cache=True)
def _unify(
    bits: Array, start: int, total: Array, sign: Array, best: Array, keep: Array, column: int
) -> None:
    """`masks.unify` of a run, but for the sign of `best`; its masks begin at a column of `keep`."""
    models, stop = bits.shape[0] - 1, start + best.size
    base = bits[models, start:stop]
    one, zero = np.float32(1), np.float32(0)
    total[:] = 0.0
    best[:] = zero
    for r in range(models):
        model = bits[r, start:stop]
        for i in range(best.size):
            total[i] += np.float64(from_bf16(model[i]) - from_bf16(base[i]))
    for i in range(best.size):
        sign[i] = one if total[i] > 0.0 else -one
    for r in range(models):
        model, kept = bits[r, start:stop], keep[r, column : column + best.size]
        for i in range(best.size):
            agreeing = (from_bf16(model[i]) - from_bf16(base[i])) * sign[i]
            kept[i] = agreeing > zero
            best[i] = agreeing if agreeing > best[i] else best[i]


@njit(nogil=True, cache=True)
def _unify_three(
    bits: Array, start: int, signed: bool, keep: Array, column: int, best: Array
) -> None:
    """`_unify` in registers; `signed` gives `best` its sign."""
    stop, end = start + best.size, column + best.size
    first, second, third = bits[0, start:stop], bits[1, start:stop], bits[2, start:stop]
    base, unit, zero = bits[3, start:stop], np.float32(1), np.float32(0)
    one, two, three = keep[0, column:end], keep[1, column:end], keep[2, column:end]
    for i in range(best.size):
        origin = from_bf16(base[i])
        x, y = from_bf16(first[i]) - origin, from_bf16(second[i]) - origin
        z = from_bf16(third[i]) - origin
        sign = unit if vote_of_three(x, y, z) > zero else -unit
        p, q, r = x * sign, y * sign, z * sign
        one[i], two[i], three[i] = p > zero, q > zero, r > zero
        largest = p if p > zero else zero
        largest = q if q > largest else largest
        largest = r if r > largest else largest
        best[i] = largest * sign if signed else largest


@njit(nogil=True, cache=True)
def unified(bits: Array, start: int, keep: Array, out: Array) -> bool:
    """out = the bfloat16 nearest to base + `masks.unify` of the task vectors; keep as there.

    Arguments and result as for `sum_and_masks`.
    """
    models = keep.shape[0]
    totals = np.empty(_CHUNK, np.float64)
    signs, bests = np.empty(_CHUNK, np.float32), np.empty(_CHUNK, np.float32)
    keep[:, out.size :] = 0
    for begin in range(0, out.size, _CHUNK):
        part = out[begin : begin + _CHUNK]
        at, count = start + begin, part.size
        if not direct.all_finite(bits, at, at + count):
            return False
        sign, best = signs[:count], bests[:count]
        if models == 3:
            _unify_three(bits, at, True, keep, begin, best)
        else:
            _unify(bits, at, totals[:count], sign, best, keep, begin)
            for i in range(count):
                best[i] *= sign[i]
        if not direct.add_to_base(best, bits[models, at : at + count], part):
            return False
    return True


@njit(nogil=True, cache=True)
def _add_sizes(model: Array, base: Array, best: Array, kept: Array, lanes: Array) -> None:
    """lanes += a task vector's magnitudes, and those of the unified vector where it agrees."""
    sizes, agreeing, zero = lanes[0], lanes[1], np.float32(0)
    for i in range(best.size):
        sizes[i] += abs(from_bf16(model[i]) - from_bf16(base[i]))
        agreeing[i] += best[i] if kept[i] else zero


@njit(nogil=True, cache=True)
def agreement(bits: Array, start: int, size: int, out: Array) -> bool:
    """Per task sum |d_i|, then sum |u| where d_i agrees with the unified u: (granules, 2 models).

    A lane sums 8 magnitudes in float32 before float64 takes over. Returns whether all sums are
    known: those of a granule are not finite where an entry or a sum of float32 is not.
    """
    models = out.shape[1] // 2
    totals = np.empty(_CHUNK, np.float64)
    signs, bests = np.empty(_CHUNK, np.float32), np.empty(_CHUNK, np.float32)
    keep = np.empty((models, _CHUNK), np.uint8)
    lanes, wide = np.empty((models, 2, _CHUNK), np.float32), np.empty(_CHUNK, np.float64)
    all_known = True
    for granule in range(out.shape[0]):
        lanes[:] = np.float32(0)
        known = True
        end = min((granule + 1) * _GRANULE, size)
        for begin in range(granule * _GRANULE, end, _CHUNK):
            a, b = start + begin, start + min(begin + _CHUNK, end)
            known &= direct.all_finite(bits, a, b)
            best = bests[: b - a]
            if models == 3:
                _unify_three(bits, a, False, keep, 0, best)
            else:
                _unify(bits, a, totals[: b - a], signs[: b - a], best, keep, 0)
            for r in range(models):
                _add_sizes(bits[r, a:b], bits[models, a:b], best, keep[r], lanes[r])
        for r in range(models):
            for which in range(2):
                total = direct.folded_narrow(lanes[r, which], wide) if known else np.nan
                out[granule, which * models + r] = total
                all_known &= np.isfinite(total)
    return all_known
