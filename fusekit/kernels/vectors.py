"""Vectors of 16 float32 numbers, for intrinsics that spell out what a loop keeps in registers.

The compiler does not carry sums in registers from one iteration to the next without changing their
order. An intrinsic that does so itself has a fixed order on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError

_tools: Any = cgutils

LANES = 16

INT = ir.IntType(32)
INTS = ir.VectorType(INT, LANES)
FLOATS = ir.VectorType(ir.FloatType(), LANES)
DOUBLES = ir.VectorType(ir.DoubleType(), LANES)


def check_operand(kind: Any) -> None:
    """Refuse what `loaded` cannot load."""
    if kind.layout != "C" or kind.dtype not in {types.uint16, types.float32}:
        raise TypingError(f"found {kind}, expected a contiguous array of uint16 or float32")


def floats(value: float) -> Any:
    """A constant in every lane."""
    return ir.Constant(FLOATS, [float(np.float32(value))] * LANES)


def ints(value: int) -> Any:
    """A constant in every lane."""
    return ir.Constant(INTS, [value] * LANES)


def variable(builder: Any, start: Any) -> Any:
    """A place that holds a vector; the compiler keeps it in a register."""
    place = _tools.alloca_once(builder, start.type)
    builder.store(start, place)
    return place


def each_run(builder: Any, count: Any) -> Any:
    """A loop over so many runs of lanes: a context with the `index` of the run."""
    return _tools.for_range(builder, count)


def loaded_raw(
    context: Any, builder: Any, kind: Any, array: Any, start: Any, lanes: int = LANES
) -> Any:
    """What stands in an array from an element on."""
    data = context.make_array(kind)(context, builder, array).data
    vector = ir.VectorType(data.type.pointee, lanes).as_pointer()
    place = builder.bitcast(builder.gep(data, [start]), vector)
    return builder.load(place, align=kind.dtype.bitwidth // 8)


def from_bf16(builder: Any, bits: Any) -> Any:
    """The float32 values of a vector of bfloat16 bits."""
    lanes = bits.type.count
    wide = ir.VectorType(INT, lanes)
    upper = builder.shl(builder.zext(bits, wide), ir.Constant(wide, [16] * lanes))
    return builder.bitcast(upper, ir.VectorType(ir.FloatType(), lanes))


def loaded(context: Any, builder: Any, kind: Any, array: Any, start: Any) -> Any:
    """The floats from an element of an array on: bfloat16 bits (uint16) or float32."""
    values = loaded_raw(context, builder, kind, array, start)
    return from_bf16(builder, values) if kind.dtype == types.uint16 else values


def widened(builder: Any, values: Any) -> Any:
    """Floats or doubles as doubles."""
    return values if values.type == DOUBLES else builder.fpext(values, DOUBLES)


def sum_in_pairs(builder: Any, parts: Sequence[Any]) -> Any:
    """The sum of a power of two of vectors."""
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [builder.fadd(left, right) for left, right in pairs]
    return parts[0]


def multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z, rounded once."""
    function = ir.FunctionType(FLOATS, [FLOATS] * 3)
    name = f"llvm.fma.v{LANES}f32"
    return builder.call(_tools.get_or_insert_function(builder.module, function, name), (x, y, z))


def polynomial(builder: Any, x: Any, coefficients: Sequence[float]) -> Any:
    """The polynomial with these coefficients, the highest power's first."""
    value = floats(coefficients[0])
    for coefficient in coefficients[1:]:
        value = multiply_add(builder, value, x, floats(coefficient))
    return value


def larger(builder: Any, x: Any, y: Any) -> Any:
    """The larger of unsigned integers."""
    return builder.select(builder.icmp_unsigned(">", x, y), x, y)


def folded(builder: Any, vector: Any, fold: Callable[[Any, Any, Any], Any]) -> Any:
    """One number from all lanes: the upper half is folded into the lower one until one is left."""
    while vector.type.count > 1:
        half = vector.type.count // 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(
                vector,
                undefined,
                ir.Constant(ir.VectorType(INT, half), list(range(first, first + half))),
            )
            for first in (0, half)
        )
        vector = fold(builder, low, high)
    return builder.extract_element(vector, ir.Constant(INT, 0))


def magnitude_bits(builder: Any, vector: Any) -> Any:
    """The bits of floats without their signs: integers that order like the magnitudes."""
    lanes = vector.type.count
    wide = ir.VectorType(INT, lanes)
    return builder.and_(builder.bitcast(vector, wide), ir.Constant(wide, [0x7FFFFFFF] * lanes))


def total(builder: Any, vector: Any) -> Any:
    """The sum of all lanes, in float64."""
    return folded(builder, widened(builder, vector), lambda builder, x, y: builder.fadd(x, y))
