"""64 elements compared at once: the results are the bits of an integer, not an array of marks.

What vectorising a loop cannot do: the compiler keeps comparisons in mask registers, where they are
counted, and looked at one by one only where a bit is set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from fusekit.kernels import vectors

Array = np.ndarray[Any, np.dtype[Any]]

LANES = 64
WORDS = 16
"""Masks that are looked at together."""

CHUNK = LANES * WORDS

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_WIDE = ir.VectorType(_I32, LANES)
_MASKS: Any = types.UniTuple(types.uint64, 2)  # type: ignore[no-untyped-call]


def _repeated(builder: Any, value: Any) -> Any:
    """A vector with the value in every lane."""
    vector = ir.VectorType(value.type, LANES)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_WIDE, [0] * LANES))


def _check_contiguous(*arrays: Any) -> None:
    for array in arrays:
        if array.layout != "C":
            raise TypingError(f"found an array of layout {array.layout}, expected contiguous ones")


def _magnitudes(context: Any, builder: Any, kinds: Any, model: Any, base: Any, start: Any) -> Any:
    """The bits of |model - base|, as float32, of two arrays of bfloat16 bits."""
    values, origin = (
        vectors.from_bf16(builder, vectors.loaded_raw(context, builder, kind, array, start, LANES))
        for kind, array in ((kinds[0], model), (kinds[1], base))
    )
    return vectors.magnitude_bits(builder, builder.fsub(values, origin))


def _compared(builder: Any, keys: Any, low: Any, high: Any) -> list[Any]:
    """Masks of the keys above `high`, and of those of at least `low`."""
    above = builder.icmp_unsigned(">", keys, _repeated(builder, high))
    at_least = builder.icmp_unsigned(">=", keys, _repeated(builder, low))
    return [builder.bitcast(mask, _I64) for mask in (above, at_least)]


def _compare_keys(typingctx: Any, keys: Any, start: Any, low: Any, high: Any) -> Any:
    """(mask of keys above `high`, mask of keys of at least `low`) of 64 unsigned integers."""
    _check_contiguous(keys)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = signature.args[0], arguments[0], arguments[1]
        vector = vectors.loaded_raw(context, builder, *place, LANES)
        masks = _compared(builder, vector, arguments[2], arguments[3])
        return context.make_tuple(builder, signature.return_type, masks)

    return _MASKS(keys, types.intp, keys.dtype, keys.dtype), build


def _compare_deltas(typingctx: Any, model: Any, base: Any, start: Any, low: Any, high: Any) -> Any:
    """`compare_keys` of the magnitudes' bits of 64 task-vector entries of bfloat16 models."""
    _check_contiguous(model, base)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        keys = _magnitudes(context, builder, signature.args, *arguments[:3])
        masks = _compared(builder, keys, arguments[3], arguments[4])
        return context.make_tuple(builder, signature.return_type, masks)

    return _MASKS(model, base, types.intp, types.uint32, types.uint32), build


def _count_bits(typingctx: Any, mask: Any) -> Any:
    """How many bits are set."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), build


def _lowest_bit(typingctx: Any, mask: Any) -> Any:
    """The number of the lowest bit that is set; 64 if none is."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), build


compare_keys: Any = intrinsic(_compare_keys)
compare_deltas: Any = intrinsic(_compare_deltas)
count_bits: Any = intrinsic(_count_bits)
lowest_bit: Any = intrinsic(_lowest_bit)


@njit(nogil=True, cache=True)
def list_bits(masks: Array, work: Array, found: Array) -> int:
    """Write the numbers of all set bits, ascending, and return how many there are.

    Args:
        masks: (WORDS,) uint64; bit b of mask w has the number LANES w + b. Destroyed.
        work: (WORDS,) int32 of working memory.
        found: (CHUNK,) int32.

    Without a branch that depends on the bits: where few are set, none could be foreseen.
    """
    words, count = 0, 0
    for word in range(WORDS):
        mask = masks[word]
        count += count_bits(mask)
        masks[words] = mask
        work[words] = LANES * word
        words += int(mask != np.uint64(0))
    if count == 0:
        return 0
    word, mask = 0, masks[0]
    for number in range(count):
        found[number] = work[word] + lowest_bit(mask)
        mask &= np.uint64(mask - np.uint64(1))
        word += int(mask == np.uint64(0))
        following = masks[min(word, WORDS - 1)]
        mask = following if mask == np.uint64(0) else mask
    return count
