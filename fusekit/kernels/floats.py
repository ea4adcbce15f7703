"""Floats as bits inside a kernel: what lets a loop decode, compute and encode in registers."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

MAGNITUDE = np.uint32(0x7FFFFFFF)
"""The bits of a float32 but for its sign."""


def _as_float32(typingctx: Any, bits: Any) -> Any:
    """The float32 that these 32 bits are."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), build


def _as_bits(typingctx: Any, value: Any) -> Any:
    """The 32 bits of a float32."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), build


def _value_of(typingctx: Any, element: Any) -> Any:
    """The value of an operand's element: the bits of a bfloat16 (uint16), or the number it is."""
    if element != types.uint16:
        return element(element), lambda context, builder, signature, arguments: arguments[0]

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.shl(builder.zext(arguments[0], word), word(16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.uint16), build


as_float32: Any = intrinsic(_as_float32)
as_bits: Any = intrinsic(_as_bits)
value_of: Any = intrinsic(_value_of)


@njit(nogil=True, cache=True)
def from_bf16(bits: np.uint16) -> np.float32:
    """A bfloat16's value."""
    value: np.float32 = as_float32(np.uint32(np.uint32(bits) << np.uint32(16)))
    return value


@njit(nogil=True, cache=True)
def to_bf16(value: np.float32) -> np.uint16:
    """The nearest bfloat16, ties to even; for finite values only."""
    bits = as_bits(value)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
