"""16-bit floats in, results out: decode, take differences, prune and combine a tile at a time.

What the other kernels do to whole rows one after the other happens here to a few thousand elements
that stay in the first-level cache, without a step of Python in between. Every kernel sets the
operands' numbers of NaN and infinite entries; `position` is where in the tensor its elements begin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusekit.kernels import codecs, elect, gram, linear, norms, order, random, ranks, thin
from fusekit.kernels.floats import MAGNITUDE
from fusekit.kernels.packed import F16, Packed, Steps

Array = np.ndarray[Any, np.dtype[Any]]

TILE = 2048
_GRANULE = 8192

SCALE, DROP, KEEP_ABOVE, KEEP_AT_LEAST, DROP_AT_LEAST = range(5)
KEEP_FIRST, DROP_FIRST, KEEP_PACKED, KEEP_VARYING, KEEP_FIRST_VARYING = range(5, 10)
"""Kinds of steps: see `_prune`."""


@njit(nogil=True, cache=True)
def _decode(raw: Array, kind: int, row: Array) -> int:
    if kind == F16:
        return int(codecs.decode_f16(raw, row))
    return int(codecs.decode_bf16(raw, row))


@njit(nogil=True, cache=True)
def _load(packed: Packed, begin: int, deltas: bool, rows: Array, base: Array) -> None:
    """Decode elements begin, begin + 1, ...; `deltas` subtracts the base from the models' rows."""
    n, length = rows.shape
    bits, kind, special = packed.bits, packed.kind, packed.special
    start = packed.start + begin
    stop = start + length
    if bits.shape[0] > n:
        special[n] += _decode(bits[n, start:stop], kind, base)
    for r in range(n):
        raw, row = bits[r, start:stop], rows[r]
        if not deltas:
            special[r] += _decode(raw, kind, row)
        elif kind == F16:
            special[r] += codecs.decode_f16(raw, row)
            for i in range(length):
                row[i] -= base[i]
        else:
            special[r] += codecs.decode_bf16_delta(raw, base, row)


@njit(nogil=True, cache=True)
def prune(rows: Array, position: int, steps: Steps) -> None:
    """Carry out steps on rows whose first element is the tensor's `position`.

    SCALE multiplies by the value; DROP keeps with that probability under a key; KEEP_ABOVE and
    KEEP_AT_LEAST keep larger magnitudes, DROP_AT_LEAST zeroes them; KEEP_FIRST and DROP_FIRST take
    the larger ones and the first `left` equal ones, which they count down; KEEP_PACKED keeps what
    is flagged for the model. KEEP_VARYING and KEEP_FIRST_VARYING keep positions of
    all models, by the variance over these, as KEEP_AT_LEAST and KEEP_FIRST keep entries.
    """
    kinds, values, keys, left = steps.kinds, steps.values, steps.keys, steps.left
    for k in range(kinds.shape[0]):
        kind, row = kinds[k, 0], rows[kinds[k, 1]]
        value = np.float32(values[k])
        if kind == SCALE:
            for i in range(row.size):
                row[i] *= value
        elif kind == DROP:
            random.drop(row, values[k], keys[k], position)
        elif kind == KEEP_ABOVE:
            order.keep_above(row, value)
        elif kind == KEEP_AT_LEAST:
            order.keep_at_least(row, value)
        elif kind == DROP_AT_LEAST:
            order.drop_at_least(row, value)
        elif kind == KEEP_FIRST:
            left[k] -= order.keep_first(row, value, left[k])
        elif kind == DROP_FIRST:
            left[k] -= order.drop_first(row, value, left[k])
        elif kind in (KEEP_VARYING, KEEP_FIRST_VARYING):
            varying = np.empty(row.size, np.float32)
            thin.variance(rows, varying)
            if kind == KEEP_VARYING:
                order.keep_at_least(varying, value)
            else:
                left[k] -= order.keep_first(varying, value, left[k])
            thin.keep_where(varying, rows)
        else:
            ranks.keep_packed(row, position, steps.flags[kinds[k, 1]])


@njit(nogil=True, cache=True)
def _load_pruned(
    packed: Packed, begin: int, position: int, steps: Steps, rows: Array, base: Array
) -> None:
    """A tile's task vectors after some steps."""
    _load(packed, begin, True, rows, base)
    prune(rows, position + begin, steps)


@njit(nogil=True, cache=True)
def weighted_sum(packed: Packed, position: int, steps: Steps, weights: Array, out: Array) -> None:
    """out = base + sum_i weights[i] * pruned task vector i, as `linear.weighted_sum`; float32."""
    n = weights.size
    memory = np.empty(n * TILE, np.float32)
    origin = np.empty(TILE, np.float32)
    packed.special[:] = 0
    for begin in range(0, out.size, TILE):
        part = out[begin : begin + TILE]
        rows, base = memory[: n * part.size].reshape((n, part.size)), origin[: part.size]
        _load_pruned(packed, begin, position, steps, rows, base)
        linear.weighted_sum(rows, weights, base, 1.0, part)


@njit(nogil=True, cache=True)
def combine(packed: Packed, weights: Array, base_weight: float, out: Array) -> None:
    """`linear.weighted_sum` of the models themselves."""
    n = weights.size
    memory = np.empty(n * TILE, np.float32)
    origin = np.empty(TILE, np.float32)
    packed.special[:] = 0
    for begin in range(0, out.size, TILE):
        part = out[begin : begin + TILE]
        rows, base = memory[: n * part.size].reshape((n, part.size)), origin[: part.size]
        _load(packed, begin, False, rows, base)
        used = base if base_weight != 0.0 else base[:0]
        linear.weighted_sum(rows, weights, used, base_weight, part)


@njit(nogil=True, cache=True)
def elect_and_merge(
    packed: Packed,
    position: int,
    steps: Steps,
    ballots: Array,
    weights: Array,
    election: int,
    tie_sign: int,
    merge: int,
    scale: float,
    out: Array,
) -> None:
    """`elect.elect_and_merge` of the task vectors; what agrees is summed in float32."""
    n = weights.size
    memory = np.empty(n * TILE, np.float32)
    origin = np.empty(TILE, np.float32)
    work = np.empty((3, elect.CHUNK), np.float32)
    packed.special[:] = 0
    for begin in range(0, out.size, TILE):
        part = out[begin : begin + TILE]
        rows, base = memory[: n * part.size].reshape((n, part.size)), origin[: part.size]
        _load_pruned(packed, begin, position, steps, rows, base)
        elect.elect_and_merge(
            rows, ballots, weights, election, tie_sign, merge, base, scale, work, part
        )


@njit(nogil=True, cache=True)
def sums(
    packed: Packed, size: int, position: int, steps: Steps, what: int, unpruned: bool, out: Array
) -> None:
    """`norms.sums` of the task vectors per granule: (granules, models); `unpruned` puts the sums
    before the steps in front, (granules, 2 models)."""
    n = out.shape[1] // 2 if unpruned else out.shape[1]
    memory = np.empty(n * _GRANULE, np.float32)
    origin = np.empty(_GRANULE, np.float32)
    packed.special[:] = 0
    for granule in range(out.shape[0]):
        begin = granule * _GRANULE
        length = min(_GRANULE, size - begin)
        rows = memory[: n * length].reshape((n, length))
        own = out[granule : granule + 1]
        _load(packed, begin, True, rows, origin[:length])
        if unpruned:
            norms.sums(rows, what, _GRANULE, own[:, :n])
            own = own[:, n:]
        prune(rows, position + begin, steps)
        norms.sums(rows, what, _GRANULE, own)


@njit(nogil=True, cache=True)
def products(packed: Packed, size: int, deltas: bool, n: int, out: Array) -> None:
    """`gram.gram` of the rows: (granules, n (n + 1) / 2)."""
    memory = np.empty(n * _GRANULE, np.float32)
    origin = np.empty(_GRANULE, np.float32)
    packed.special[:] = 0
    for granule in range(out.shape[0]):
        begin = granule * _GRANULE
        length = min(_GRANULE, size - begin)
        rows = memory[: n * length].reshape((n, length))
        _load(packed, begin, deltas, rows, origin[:length])
        gram.gram(rows, out[granule : granule + 1])


@njit(nogil=True, cache=True)
def variance(packed: Packed, n: int, out: Array) -> None:
    """`thin.variance` of the task vectors: (elements,)."""
    memory = np.empty(n * TILE, np.float32)
    origin = np.empty(TILE, np.float32)
    packed.special[:] = 0
    for begin in range(0, out.size, TILE):
        part = out[begin : begin + TILE]
        rows = memory[: n * part.size].reshape((n, part.size))
        _load(packed, begin, True, rows, origin[: part.size])
        thin.variance(rows, part)


@njit(nogil=True, cache=True)
def count_brackets(
    packed: Packed,
    size: int,
    position: int,
    steps: Steps,
    brackets: Array,
    bins: Array,
    above: Array,
    n: int,
) -> None:
    """`order.count_brackets` of the task vectors' magnitudes."""
    memory = np.empty(n * TILE, np.float32)
    origin = np.empty(TILE, np.float32)
    packed.special[:] = 0
    for begin in range(0, size, TILE):
        length = min(TILE, size - begin)
        rows = memory[: n * length].reshape((n, length))
        _load_pruned(packed, begin, position, steps, rows, origin[:length])
        magnitudes = rows.view(np.uint32)
        for r in range(n):
            row = magnitudes[r]
            for i in range(length):
                row[i] &= MAGNITUDE
        order.count_brackets(magnitudes, brackets, bins, above)
