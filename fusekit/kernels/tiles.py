"""16-bit floats in, results out: decode, take differences, prune and combine a tile at a time.

What the other kernels do to whole rows one after the other happens here to a few thousand elements
that stay in the first-level cache, without a step of Python in between. `bits` holds the operands'
bits as they were read, (operands, elements) with the base last; a *program* lists what is done to
the models' rows before they are summed, counted or merged.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusekit.kernels import codecs, elect, gram, linear, norms, order, random, ranks, thin

Array = np.ndarray[Any, np.dtype[Any]]

TILE = 2048
_GRANULE = 8192
_BELOW_SIGN = np.uint32(0x7FFFFFFF)

BF16, F16 = 0, 1
"""What the bits mean."""

SCALE, DROP, KEEP_ABOVE, KEEP_AT_LEAST, DROP_AT_LEAST = range(5)
KEEP_FIRST, DROP_FIRST, KEEP_PACKED, KEEP_VARYING, KEEP_FIRST_VARYING = range(5, 10)
"""Steps of a program: see `_prune`."""


@njit(nogil=True, cache=True)
def _decode(raw: Array, kind: int, row: Array) -> int:
    if kind == F16:
        return int(codecs.decode_f16(raw, row))
    return int(codecs.decode_bf16(raw, row))


@njit(nogil=True, cache=True)
def _load(
    bits: Array, kind: int, start: int, deltas: bool, rows: Array, base: Array, special: Array
) -> None:
    """Decode elements start, start + 1, ...; `deltas` subtracts the base from the models' rows."""
    n, length = rows.shape
    stop = start + length
    if bits.shape[0] > n:
        special[n] += _decode(bits[n, start:stop], kind, base)
    for r in range(n):
        raw, row = bits[r, start:stop], rows[r]
        if not deltas:
            special[r] += _decode(raw, kind, row)
        elif kind == BF16:
            special[r] += codecs.decode_bf16_delta(raw, base, row)
        else:
            special[r] += codecs.decode_f16(raw, row)
            for i in range(length):
                row[i] -= base[i]


@njit(nogil=True, cache=True)
def _prune(
    rows: Array,
    position: int,
    steps: Array,
    values: Array,
    keys: Array,
    left: Array,
    flags: Array,
) -> None:
    """Apply a program's steps (kind, model) to rows whose first element is the tensor's `position`.

    SCALE multiplies by the value; DROP keeps with that probability under a key; KEEP_ABOVE and
    KEEP_AT_LEAST keep larger magnitudes, DROP_AT_LEAST zeroes them; KEEP_FIRST and DROP_FIRST take
    the larger ones and the first `left` equal ones, which they count down; KEEP_PACKED keeps what
    is flagged in the model's row of `flags`. KEEP_VARYING and KEEP_FIRST_VARYING keep positions of
    all models, by the variance over these, as KEEP_AT_LEAST and KEEP_FIRST keep entries.
    """
    for k in range(steps.shape[0]):
        kind, row = steps[k, 0], rows[steps[k, 1]]
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
            ranks.keep_packed(row, position, flags[steps[k, 1]])


@njit(nogil=True, cache=True)
def _pruned(
    bits: Array,
    kind: int,
    start: int,
    position: int,
    steps: Array,
    values: Array,
    keys: Array,
    left: Array,
    flags: Array,
    rows: Array,
    base: Array,
    special: Array,
) -> None:
    """A tile's task vectors after a program."""
    _load(bits, kind, start, True, rows, base, special)
    _prune(rows, position, steps, values, keys, left, flags)


@njit(nogil=True, cache=True)
def weighted_sum(
    bits: Array,
    kind: int,
    start: int,
    position: int,
    steps: Array,
    values: Array,
    keys: Array,
    left: Array,
    flags: Array,
    weights: Array,
    special: Array,
    out: Array,
) -> None:
    """out = base + sum_i weights[i] * pruned task vector i, as `linear.weighted_sum`.

    Args:
        bits: (operands, elements) of 16 bits, the base last.
        kind: BF16 or F16.
        start: where in `bits` the wanted elements begin.
        position: where in the tensor they begin.
        steps, values, keys, left, flags: the program: see `_prune`.
        weights: (models,).
        special: (operands,) receives the numbers of NaN and infinite entries.
        out: (elements,) float32.
    """
    n = weights.size
    memory = np.empty(n * TILE, np.float32)
    origin = np.empty(TILE, np.float32)
    special[:] = 0
    for begin in range(0, out.size, TILE):
        length = min(TILE, out.size - begin)
        rows = memory[: n * length].reshape((n, length))
        base = origin[:length]
        _pruned(
            bits, kind, start + begin, position + begin,
            steps, values, keys, left, flags, rows, base, special,
        )  # fmt: skip
        linear.weighted_sum(rows, weights, base, 1.0, out[begin : begin + length])


@njit(nogil=True, cache=True)
def combine(
    bits: Array,
    kind: int,
    start: int,
    weights: Array,
    base_weight: float,
    special: Array,
    out: Array,
) -> None:
    """`linear.weighted_sum` of the models themselves."""
    n = weights.size
    memory = np.empty(n * TILE, np.float32)
    origin = np.empty(TILE, np.float32)
    special[:] = 0
    for begin in range(0, out.size, TILE):
        length = min(TILE, out.size - begin)
        rows = memory[: n * length].reshape((n, length))
        base = origin[:length]
        _load(bits, kind, start + begin, False, rows, base, special)
        used = base if base_weight != 0.0 else base[:0]
        linear.weighted_sum(rows, weights, used, base_weight, out[begin : begin + length])


@njit(nogil=True, cache=True)
def elect_and_merge(
    bits: Array,
    kind: int,
    start: int,
    position: int,
    steps: Array,
    values: Array,
    keys: Array,
    left: Array,
    flags: Array,
    ballots: Array,
    weights: Array,
    election: int,
    tie_sign: int,
    merge: int,
    scale: float,
    special: Array,
    out: Array,
) -> None:
    """`elect.elect_and_merge` of the task vectors; what agrees is summed in float32."""
    n = weights.size
    memory = np.empty(n * TILE, np.float32)
    origin = np.empty(TILE, np.float32)
    work = np.empty((3, elect.CHUNK), np.float32)
    special[:] = 0
    for begin in range(0, out.size, TILE):
        length = min(TILE, out.size - begin)
        rows = memory[: n * length].reshape((n, length))
        base = origin[:length]
        _pruned(
            bits, kind, start + begin, position + begin,
            steps, values, keys, left, flags, rows, base, special,
        )  # fmt: skip
        elect.elect_and_merge(
            rows, ballots, weights, election, tie_sign, merge, base, scale, work,
            out[begin : begin + length],
        )  # fmt: skip


@njit(nogil=True, cache=True)
def sums(
    bits: Array,
    kind: int,
    start: int,
    size: int,
    position: int,
    steps: Array,
    values: Array,
    keys: Array,
    left: Array,
    flags: Array,
    what: int,
    unpruned: bool,
    special: Array,
    out: Array,
) -> None:
    """`norms.sums` of the task vectors per granule: (granules, models); `unpruned` puts the sums
    before the program in front, (granules, 2 models)."""
    n = out.shape[1] // 2 if unpruned else out.shape[1]
    memory = np.empty(n * _GRANULE, np.float32)
    origin = np.empty(_GRANULE, np.float32)
    special[:] = 0
    for granule in range(out.shape[0]):
        begin = granule * _GRANULE
        length = min(_GRANULE, size - begin)
        rows = memory[: n * length].reshape((n, length))
        own = out[granule : granule + 1]
        _load(bits, kind, start + begin, True, rows, origin[:length], special)
        if unpruned:
            norms.sums(rows, what, _GRANULE, own[:, :n])
            own = own[:, n:]
        _prune(rows, position + begin, steps, values, keys, left, flags)
        norms.sums(rows, what, _GRANULE, own)


@njit(nogil=True, cache=True)
def products(
    bits: Array, kind: int, start: int, size: int, deltas: bool, n: int, special: Array, out: Array
) -> None:
    """`gram.gram` of the rows: (granules, n (n + 1) / 2)."""
    memory = np.empty(n * _GRANULE, np.float32)
    origin = np.empty(_GRANULE, np.float32)
    special[:] = 0
    for granule in range(out.shape[0]):
        begin = granule * _GRANULE
        length = min(_GRANULE, size - begin)
        rows = memory[: n * length].reshape((n, length))
        _load(bits, kind, start + begin, deltas, rows, origin[:length], special)
        gram.gram(rows, out[granule : granule + 1])


@njit(nogil=True, cache=True)
def variance(bits: Array, kind: int, start: int, n: int, special: Array, out: Array) -> None:
    """`thin.variance` of the task vectors: (elements,)."""
    memory = np.empty(n * TILE, np.float32)
    origin = np.empty(TILE, np.float32)
    special[:] = 0
    for begin in range(0, out.size, TILE):
        length = min(TILE, out.size - begin)
        rows = memory[: n * length].reshape((n, length))
        _load(bits, kind, start + begin, True, rows, origin[:length], special)
        thin.variance(rows, out[begin : begin + length])


@njit(nogil=True, cache=True)
def count_brackets(
    bits: Array,
    kind: int,
    start: int,
    size: int,
    position: int,
    steps: Array,
    values: Array,
    keys: Array,
    left: Array,
    flags: Array,
    brackets: Array,
    bins: Array,
    above: Array,
    n: int,
    special: Array,
) -> None:
    """`order.count_brackets` of the task vectors' magnitudes."""
    memory = np.empty(n * TILE, np.float32)
    origin = np.empty(TILE, np.float32)
    special[:] = 0
    for begin in range(0, size, TILE):
        length = min(TILE, size - begin)
        rows = memory[: n * length].reshape((n, length))
        _pruned(
            bits, kind, start + begin, position + begin,
            steps, values, keys, left, flags, rows, origin[:length], special,
        )  # fmt: skip
        magnitudes = rows.view(np.uint32)
        for r in range(n):
            row = magnitudes[r]
            for i in range(length):
                row[i] &= _BELOW_SIGN
        order.count_brackets(magnitudes, brackets, bins, above)
