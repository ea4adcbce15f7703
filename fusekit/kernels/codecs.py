"""Bytes of every floating-point type <-> float32 rows: round to nearest even, specials kept.

bfloat16 and float16 overflow to infinity, as in torch. The fp8 types saturate: a finite value
beyond the largest finite one becomes that one (E4M3 448, E5M2 57344). Infinity stays infinity in
E5M2 and becomes NaN in E4M3, which has none. NaN stays NaN everywhere; NaN payloads are not kept.
Encoders return how many finite values left the type's finite range, decoders how many values are
not finite.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fusekit.kernels.floats import MAGNITUDE

Array = np.ndarray[Any, np.dtype[Any]]

_EXPONENT = np.uint32(0x7F800000)
_BF16_OVERFLOW = np.uint32(0x7F7F8000)
_TWO_23 = np.float32(8388608.0)


@njit(nogil=True, cache=True)
def count_nonfinite(row: Array) -> int:
    """Number of NaN and infinite entries of a float32 or float64 row."""
    count = 0
    for i in range(row.size):
        count += not np.isfinite(row[i])
    return count


@njit(nogil=True, cache=True)
def decode_bf16(raw: Array, out: Array) -> int:
    """uint16 bits of bfloat16 -> float32."""
    bits = out.view(np.uint32)
    nonfinite = 0
    for i in range(raw.size):
        wide = np.uint32(raw[i]) << np.uint32(16)
        bits[i] = wide
        nonfinite += (wide & _EXPONENT) == _EXPONENT
    return nonfinite


@njit(nogil=True, cache=True)
def decode_bf16_delta(raw: Array, base: Array, out: Array) -> int:
    """uint16 bits of bfloat16 minus a float32 base -> float32."""
    bits = out.view(np.uint32)
    nonfinite = 0
    for i in range(raw.size):
        wide = np.uint32(raw[i]) << np.uint32(16)
        bits[i] = wide
        nonfinite += (wide & _EXPONENT) == _EXPONENT
        out[i] -= base[i]
    return nonfinite


@njit(nogil=True, cache=True)
def decode_f16(raw: Array, out: Array) -> int:
    """uint16 bits of float16 -> float32, subnormals included."""
    bits = out.view(np.uint32)
    rebias = np.float32(2.0**112)
    for i in range(raw.size):
        # With float32's bias the value is 2^-112 times too small, subnormals likewise.
        bits[i] = np.uint32(raw[i] & 0x7FFF) << np.uint32(13)
    for i in range(raw.size):
        out[i] *= rebias
    nonfinite = 0
    for i in range(raw.size):
        special = (raw[i] & 0x7C00) == 0x7C00
        sign = np.uint32(raw[i] & 0x8000) << np.uint32(16)
        bits[i] = bits[i] | sign | (_EXPONENT if special else np.uint32(0))
        nonfinite += special
    return nonfinite


@njit(nogil=True, cache=True)
def decode_table(raw: Array, table: Array, out: Array) -> int:
    """One-byte types by a table of 256 float32 values."""
    for i in range(raw.size):
        out[i] = table[raw[i]]
    return count_nonfinite(out[: raw.size])


@njit(nogil=True, cache=True)
def encode_bf16(row: Array, out: Array) -> int:
    """float32 -> uint16 bits of bfloat16, round to nearest even."""
    bits = row.view(np.uint32)
    largest = np.uint32(0)
    for i in range(row.size):
        b = bits[i]
        rounded = b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))
        out[i] = np.uint16(rounded >> np.uint32(16))
        largest = max(largest, b & MAGNITUDE)
    if largest < _BF16_OVERFLOW:
        return 0
    overflows = 0
    for i in range(row.size):
        magnitude = bits[i] & MAGNITUDE
        if magnitude > _EXPONENT:  # rounding may have carried a NaN into infinity
            out[i] = np.uint16((bits[i] >> np.uint32(16)) | np.uint32(0x40))
        overflows += (magnitude >= _BF16_OVERFLOW) & (magnitude < _EXPONENT)
    return overflows


@njit(nogil=True, cache=True)
def encode_f16(row: Array, out: Array) -> int:
    """float32 -> uint16 bits of float16, round to nearest even."""
    bits = row.view(np.uint32)
    overflows = 0
    for i in range(row.size):
        b = bits[i] & MAGNITUDE
        sign = (bits[i] >> np.uint32(16)) & np.uint32(0x8000)
        normal = (
            (b + np.uint32(0xFFF) + ((b >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
        ) - (np.uint32(112 << 10))
        # Below 2^-14 the result is an integer multiple of 2^-24; adding 2^23 rounds to one.
        steps = (np.abs(row[i]) * np.float32(2.0**24) + _TWO_23) - _TWO_23
        small = b < np.uint32(0x38800000)
        subnormal = np.uint32(steps) if small else np.uint32(0)
        finite = subnormal if small else min(normal, np.uint32(0x7C00))
        special = np.uint32(0x7E00) if b > _EXPONENT else np.uint32(0x7C00)
        out[i] = np.uint16((special if b >= _EXPONENT else finite) | sign)
        overflows += (b >= np.uint32(0x477FF000)) & (b < _EXPONENT)
    return overflows


@njit(nogil=True, cache=True, error_model="numpy")
def encode_f8(
    row: Array,
    out: Array,
    mantissa: int,
    bias: int,
    largest: int,
    infinity: int,
    nan: int,
) -> int:
    """float32 -> one byte with `mantissa` bits and `bias`, saturating at the code `largest`."""
    bits = row.view(np.uint32)
    drop = np.uint32(23 - mantissa)
    half = np.uint32((1 << (23 - mantissa - 1)) - 1)
    rebias = np.uint32((127 - bias) << mantissa)
    smallest_normal = np.uint32((127 - bias + 1) << 23)
    steps_per_unit = np.float32(2.0 ** (bias - 1 + mantissa))
    overflows = 0
    for i in range(row.size):
        b = bits[i] & MAGNITUDE
        sign = (bits[i] >> np.uint32(24)) & np.uint32(0x80)
        small = b < smallest_normal
        normal = ((b + half + ((b >> drop) & np.uint32(1))) >> drop) - rebias
        steps = (np.abs(row[i]) * steps_per_unit + _TWO_23) - _TWO_23
        code = np.uint32(steps) if small else normal
        beyond = (not small) & (code > np.uint32(largest)) & (b < _EXPONENT)
        code = np.uint32(largest) if beyond else code
        code = np.uint32(infinity) if b == _EXPONENT else code
        code = np.uint32(nan) if b > _EXPONENT else code
        out[i] = np.uint8(code | sign)
        overflows += beyond
    return overflows


@njit(nogil=True, cache=True)
def narrow_to_odd(row: Array, out: Array) -> None:
    """float64 -> float32 by rounding to odd, so that rounding once more is rounding once."""
    bits = out.view(np.uint32)
    for i in range(row.size):
        nearest = np.float32(row[i])
        out[i] = nearest
        even = (bits[i] & np.uint32(1)) == np.uint32(0)
        if even and np.float64(nearest) != row[i] and row[i] == row[i]:
            if abs(np.float64(nearest)) > abs(row[i]):
                bits[i] -= np.uint32(1)
            else:
                bits[i] += np.uint32(1)
