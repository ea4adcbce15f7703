"""Random drops within rows: the larger an entry, the likelier it stays.

Nothing is ranked for it: an entry is compared with another one that is drawn from its row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from fusekit.kernels import direct, lanes, random, ranks, vectors
from fusekit.kernels.ballot import Election, merge_kept
from fusekit.kernels.floats import value_of

Array = np.ndarray[Any, np.dtype[Any]]

_tuple_of: Any = types.UniTuple

LANES = lanes.LANES
"""Entries whose fate is kept in one integer."""


def _kept_sums(typingctx: Any, sizes: Any, kept: Any) -> Any:
    """Sums of all sizes and of those whose bit is set, 64 to an integer.

    Four lanes' sizes are added in their own type before float64 takes over.
    """
    if sizes.layout != "C" or kept.layout != "C" or kept.dtype != types.uint64:
        raise TypingError(f"found {sizes} and {kept}, expected contiguous sizes and uint64")

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        masks = context.make_array(kept)(context, builder, arguments[1])
        half, mask = ir.IntType(16), ir.VectorType(ir.IntType(1), vectors.LANES)
        places = builder.bitcast(masks.data, half.as_pointer())
        start = ir.Constant(vectors.DOUBLES, [0.0] * vectors.LANES)
        whole, left = (vectors.variable(builder, start) for _ in range(2))
        with vectors.each_run(builder, masks.nitems) as loop:
            every, chosen = [], []
            for part in range(LANES // vectors.LANES):
                run = builder.add(
                    builder.mul(loop.index, loop.index.type(LANES // vectors.LANES)),
                    loop.index.type(part),
                )
                at = builder.mul(run, run.type(vectors.LANES))
                size = vectors.loaded_raw(context, builder, sizes, arguments[0], at)
                flags = builder.bitcast(builder.load(builder.gep(places, [run])), mask)
                zero = ir.Constant(size.type, [0.0] * vectors.LANES)
                every.append(size)
                chosen.append(builder.select(flags, size, zero))
            for sum_so_far, parts in ((whole, every), (left, chosen)):
                added = vectors.widened(builder, vectors.sum_in_pairs(builder, parts))
                builder.store(builder.fadd(builder.load(sum_so_far), added), sum_so_far)
        results = [vectors.total(builder, builder.load(place)) for place in (whole, left)]
        return context.make_tuple(builder, signature.return_type, results)

    return _tuple_of(types.float64, 2)(sizes, kept), build


_kept_sums_of: Any = intrinsic(_kept_sums)


@njit(nogil=True, cache=True)
def _wide_sums(sizes: Array, kept: Array) -> tuple[float, float]:
    """What `_kept_sums` takes, in float64."""
    whole, left = 0.0, 0.0
    for i in range(sizes.size):
        size = np.float64(sizes[i])
        whole += size
        if kept[i // LANES] >> np.uint64(i % LANES) & np.uint64(1):
            left += size
    return whole, left


@njit(nogil=True, cache=True)
def _add_sizes(sizes: Array, kept: Array, totals: Array) -> None:
    """Add the sum of all sizes and that of the survivors."""
    whole, left = _kept_sums_of(sizes, kept)
    if not np.isfinite(whole):  # four sizes can be more than their type holds
        whole, left = _wide_sums(sizes, kept)
    totals[0] += whole
    totals[1] += left


@njit(nogil=True, cache=True)
def settle(
    keys: Array,
    bits: Array,
    first: np.uint32,
    tickets: np.uint32,
    rivals: np.uint64,
    shift: np.uint64,
    kept: Array,
) -> None:
    """Which entries of a row survive, as bits in `kept`.

    An entry whose random number is below `first` is kept; one whose number is among the `tickets`
    that follow, if its key is larger than that of the rival which the number names; others are
    dropped. Of equal keys the one at the later position is the larger. The t-th ticket names the
    (t * rivals >> shift)-th of the others.
    """
    last = np.uint32(first + tickets - np.uint32(1))
    for word in range(kept.size):
        at = np.uint64(word * lanes.LANES)
        beyond, from_first = lanes.compare_keys(bits, word * lanes.LANES, first, last)
        winners = np.uint64(~from_first)
        players = np.uint64(from_first & ~beyond) if tickets else np.uint64(0)
        while players != np.uint64(0):
            lane = np.uint64(lanes.lowest_bit(players))
            players &= np.uint64(players - np.uint64(1))
            i = np.uint64(at + lane)
            ticket = np.uint64(np.uint32(bits[i] - first))
            rival = np.uint64(np.uint64(ticket * rivals) >> shift)
            behind = np.uint64(rival >= i)  # anybody but the entry itself
            other = np.uint64(keys[np.uint64(rival + behind)])
            wins = np.uint64(other + behind <= np.uint64(keys[i]))
            winners |= np.uint64(wins << lane)
        kept[word] = winners


@njit(nogil=True, cache=True)
def _write_bits(words: Array, length: int, position: int, packed: Array) -> None:
    """Set the bits of `packed` from `position` on, lowest bit of a byte first, to the first bits
    of `words`; they are unset before."""
    shift = position & 7
    at = position >> 3
    if shift == 0 and length == lanes.LANES * words.size:
        packed[at : at + 8 * words.size] = words.view(np.uint8)
        return
    for word in range(words.size):
        left = min(length - lanes.LANES * word, lanes.LANES)
        value = np.uint64(words[word] & _lowest(left))
        low = np.uint64(value << np.uint64(shift))
        for byte in range(min(8, (left + shift + 7) >> 3)):
            packed[at + byte] |= np.uint8((low >> np.uint64(8 * byte)) & np.uint64(0xFF))
        if left + shift > lanes.LANES:
            packed[at + 8] |= np.uint8(value >> np.uint64(lanes.LANES - shift))
        at += 8


@njit(nogil=True, cache=True)
def _read_bits(packed: Array, position: int, length: int, words: Array) -> None:
    """The opposite of `_write_bits`."""
    words[:] = 0
    for i in range(length):
        at = position + i
        bit = np.uint64((packed[at >> 3] >> (at & 7)) & 1)
        words[i // lanes.LANES] |= bit << np.uint64(i % lanes.LANES)


@njit(nogil=True, cache=True)
def _lowest(count: int) -> np.uint64:
    """So many bits set."""
    if count >= lanes.LANES:
        return np.uint64(0xFFFFFFFFFFFFFFFF)
    return np.uint64((np.uint64(1) << np.uint64(count)) - np.uint64(1))


@njit(nogil=True, cache=True)
def _take_sizes(
    model: Array, base: Array, first: int, stride: int, length: int, out: Array
) -> None:
    """out[i] = |model - base| at first + i * stride; without a base, |model|."""
    kind = out.dtype.type
    if stride == 1 and base.size:
        left, right = model[first : first + length], base[first : first + length]
        for i in range(length):
            out[i] = abs(kind(value_of(left[i])) - kind(value_of(right[i])))
    elif stride == 1:
        left = model[first : first + length]
        for i in range(length):
            out[i] = abs(kind(value_of(left[i])))
    else:
        for i in range(length):
            at = first + i * stride
            origin = kind(value_of(base[at])) if base.size else kind(0)
            out[i] = abs(kind(value_of(model[at])) - origin)


@njit(nogil=True, cache=True)
def rivals_per_ticket(others: int, tickets: np.uint32) -> tuple[np.uint64, np.uint64]:
    """(rivals, shift) of `settle`: the share of the others that one ticket stands for.

    As precise as the product of a ticket and `rivals` in 64 bits allows.
    """
    share = np.float64(others) / max(np.float64(tickets), 1.0)
    shift = 0
    while shift < 63 and 2.0 * share < 4294967296.0:
        share *= 2.0
        shift += 1
    return np.uint64(share), np.uint64(shift)


@njit(nogil=True, cache=True)
def draw(
    model: Array,
    base: Array,
    key: np.uint64,
    start: int,
    length: int,
    stride: int,
    low: float,
    high: float,
    sizes: Array,
    keys: Array,
    packed: Array,
    totals: Array,
) -> None:
    """Draw which entries of rows survive: the smallest with probability `low`, the largest `high`.

    An entry that neither surely stays nor surely goes meets another one of its row, drawn at
    random, and stays if it is the larger. That happens with probability rank / (length - 1), rank 0
    the smallest, equal ones by position: nothing needs to be ranked.

    Args:
        model, base: whole groups of length * stride elements, each made of `stride` interleaved
            rows of `length`: floats or the bits of bfloat16 (uint16). Without elements in the base,
            `model` are the differences from it.
        key: the 64-bit random key; element i uses position start + i.
        sizes: working memory of `length` elements, up to a multiple of 64, of the type to compute
            in; zero behind `length`.
        keys: the same memory as unsigned integers.
        packed: uint8; the bit of position start + i is set where entry i survives, lowest bit
            first. The bits are unset before.
        totals: (2,) to which the magnitudes of all entries and of the survivors are added.
    """
    bits = np.zeros(sizes.size, np.uint32)
    group = np.empty(length * stride if stride > 1 else 0, np.uint32)
    kept = np.empty(sizes.size // lanes.LANES, np.uint64)
    first = np.uint32(low * 4294967296.0)
    tickets = np.uint32((high - low) * 4294967296.0)
    rivals, shift = rivals_per_ticket(length - 1, tickets)
    for begin in range(0, model.size, length * stride):
        if stride > 1:
            random.uniform_bits(key, start + begin, group)
        for offset in range(stride):
            _take_sizes(model, base, begin + offset, stride, length, sizes)
            if stride == 1:
                random.uniform_bits(key, start + begin, bits[:length])
            else:
                for i in range(length):
                    bits[i] = group[offset + i * stride]
            settle(keys, bits, first, tickets, rivals, shift, kept)
            _add_sizes(sizes, kept, totals)
            if stride == 1:
                _write_bits(kept, length, start + begin, packed)
                continue
            for i in range(length):
                at = start + begin + offset + i * stride
                survives = (kept[i // lanes.LANES] >> np.uint64(i % lanes.LANES)) & np.uint64(1)
                packed[at >> 3] |= np.uint8(survives << np.uint64(at & 7))


@njit(nogil=True, cache=True)
def add_sizes(
    model: Array,
    base: Array,
    start: int,
    length: int,
    sizes: Array,
    packed: Array,
    totals: Array,
) -> None:
    """Add to the totals of `draw` for entries whose survival is given in `packed`."""
    kept = np.empty(sizes.size // lanes.LANES, np.uint64)
    for begin in range(0, model.size, length):
        count = min(length, model.size - begin)
        sizes[:] = 0
        _take_sizes(model, base, begin, 1, count, sizes)
        _read_bits(packed, start + begin, count, kept)
        _add_sizes(sizes, kept, totals)


@njit(nogil=True, cache=True)
def _survivors(
    bits: Array, start: int, size: int, packed: Array, position: int, kept: Array
) -> bool:
    """kept = the flags of a run, a row per model; whether the run's entries are all finite.

    What is dropped would not show in a result.
    """
    for model in range(kept.shape[0]):
        ranks.unpack(packed[model, position >> 3 :], kept[model])
    return bool(direct.all_finite(bits, start, start + size))


@njit(nogil=True, cache=True)
def sum_of_three(
    bits: Array, start: int, position: int, packed: Array, weights: Array, out: Array
) -> bool:
    """Encode base + the weighted sum of the survivors; arguments and result as of
    `elect_of_three`, but for the (3,) float64 weights."""
    kept = np.empty((3, direct.CHUNK), np.uint8)
    for begin in range(0, out.size, direct.CHUNK):
        part = out[begin : begin + direct.CHUNK]
        at = start + begin
        if not _survivors(bits, at, part.size, packed, position + begin, kept):
            return False
        if not direct.sum_kept_of_three(bits, at, kept, weights, part):
            return False
    return True


@njit(nogil=True, cache=True, error_model="numpy")
def elect_of_three(
    bits: Array,
    start: int,
    position: int,
    packed: Array,
    factors: Array,
    rule: Election,
    out: Array,
) -> bool:
    """Sign election and merging of the survivors of three task vectors, encoded.

    Args:
        bits: (4, any) of bfloat16, the base last; the wanted elements begin at `start`.
        position: where in the tensor they begin, a multiple of 8.
        packed: (3, bytes) of `draw`.
        factors: (3,) float32 by which survivors are multiplied.
        rule, out: as for `trimmed.elect_of_three`.

    Returns:
        whether all values are finite; `out` is else not to be used.
    """
    kept = np.empty((3, direct.CHUNK), np.uint8)
    for begin in range(0, out.size, direct.CHUNK):
        part = out[begin : begin + direct.CHUNK]
        at = start + begin
        if not _survivors(bits, at, part.size, packed, position + begin, kept):
            return False
        if merge_kept(bits, at, kept, factors, rule, part) >= direct.OVERFLOW:
            return False
    return True


@njit(nogil=True, cache=True, error_model="numpy")
def drop_and_elect(
    bits: Array,
    start: int,
    position: int,
    keys: Array,
    densities: Array,
    factors: Array,
    rule: Election,
    out: Array,
) -> bool:
    """`elect_of_three` of what `random.drop` leaves under these keys and densities, (3,) each.

    `position` is a multiple of a granule.
    """
    kept = np.empty((3, random.RUN), np.uint8)
    for begin in range(0, out.size, random.RUN):
        part = out[begin : begin + random.RUN]
        at = start + begin
        if not direct.all_finite(bits, at, at + part.size):
            return False
        for model in range(3):
            random.survivors(position + begin, keys[model], densities[model], kept[model])
        if merge_kept(bits, at, kept, factors, rule, part) >= direct.OVERFLOW:
            return False
    return True
