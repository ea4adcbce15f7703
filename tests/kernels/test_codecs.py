"""Decoding and encoding of every element type, code by code and bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fusekit.kernels import codecs

Array = np.ndarray[Any, np.dtype[Any]]


def f8_encoder(*format_of: int) -> Callable[[Array, Array], int]:
    return lambda row, out: int(codecs.encode_f8(row, out, *format_of))


def f8_decoder(dtype: Any) -> Callable[[Array, Array], int]:
    table = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    return lambda raw, out: int(codecs.decode_table(raw, table, out))


@dataclass(frozen=True)
class Format:
    """An element type, its codes, and what lies above its largest finite value."""

    dtype: Any
    code: Any
    encode: Callable[[Array, Array], int]
    decode: Callable[[Array, Array], int]
    saturates: bool

    @property
    def codes(self) -> Array:
        return np.arange(1 << (8 * np.dtype(self.code).itemsize), dtype=self.code)

    @property
    def magnitudes(self) -> Array:
        """The finite values >= 0 in float64; the code of a value is its index."""
        with np.errstate(invalid="ignore"):
            values = self.codes[: self.codes.size // 2].view(self.dtype).astype(np.float64)
        return values[np.isfinite(values)]

    def encoded(self, row: Array) -> tuple[Array, int]:
        out = np.empty(row.size, self.code)
        overflows = self.encode(row, out)
        return out, overflows

    def rounded(self, values: Array) -> tuple[Array, int]:
        """Codes of finite float64 values, rounded once to nearest even, and how many overflow."""
        grid = self.magnitudes
        magnitude = np.abs(values)
        below = np.clip(np.searchsorted(grid, magnitude, side="right") - 1, 0, grid.size - 1)
        step_beyond = grid[-1] - grid[-2]
        above_value = np.append(grid[1:], grid[-1] + step_beyond)[below]
        middle = (grid[below] + above_value) / 2  # exact: one bit more than the grid's values
        up = (magnitude > middle) | ((magnitude == middle) & (below % 2 == 1))
        code = below + up
        beyond = code >= grid.size
        code[beyond] = grid.size - 1 if self.saturates else grid.size
        sign = np.signbit(values).astype(self.code) << (8 * np.dtype(self.code).itemsize - 1)
        return code.astype(self.code) | sign, int(beyond.sum())


FORMATS = {
    "bfloat16": Format(
        ml_dtypes.bfloat16, np.uint16, codecs.encode_bf16, codecs.decode_bf16, saturates=False
    ),
    "float16": Format(np.float16, np.uint16, codecs.encode_f16, codecs.decode_f16, saturates=False),
    "float8_e4m3fn": Format(
        ml_dtypes.float8_e4m3fn,
        np.uint8,
        f8_encoder(3, 7, 0x7E, 0x7F, 0x7F),
        f8_decoder(ml_dtypes.float8_e4m3fn),
        saturates=True,
    ),
    "float8_e5m2": Format(
        ml_dtypes.float8_e5m2,
        np.uint8,
        f8_encoder(2, 15, 0x7B, 0x7C, 0x7E),
        f8_decoder(ml_dtypes.float8_e5m2),
        saturates=True,
    ),
}

every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())


def assert_same_floats(found: Array, expected: Array) -> None:
    """The same bits, except that any NaN is as good as another."""
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    bits = np.dtype(f"u{expected.dtype.itemsize}")
    np.testing.assert_array_equal(found[~nan].view(bits), expected[~nan].view(bits))


def random_float32(count: int, seed: int) -> Array:
    """Every bit pattern equally likely: subnormals, infinities and NaN included."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint32)
    return bits.view(np.float32)


def halfway(form: Format) -> Array:
    """The midpoint of every two neighbouring values, both signs, with its float32 neighbours."""
    grid = form.magnitudes
    step_beyond = grid[-1] - grid[-2]
    middle = (grid + np.append(grid[1:], grid[-1] + step_beyond)) / 2
    middle = middle.astype(np.float32)
    cases = [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))]
    return np.concatenate([*cases, *(-case for case in cases)])


@every_format
def test_every_code_decodes_to_its_value(form: Format) -> None:
    out = np.empty(form.codes.size, np.float32)
    nonfinite = form.decode(form.codes, out)
    expected = form.codes.view(form.dtype).astype(np.float32)
    assert_same_floats(out, expected)
    assert nonfinite == np.count_nonzero(~np.isfinite(expected))


@every_format
def test_every_finite_code_survives_a_round_trip(form: Format) -> None:
    out = np.empty(form.codes.size, np.float32)
    form.decode(form.codes, out)
    finite = np.isfinite(out)
    codes, overflows = form.encoded(np.ascontiguousarray(out[finite]))
    np.testing.assert_array_equal(codes, form.codes[finite])
    assert overflows == 0


@every_format
def test_random_bit_patterns_encode_as_in_ml_dtypes(form: Format) -> None:
    row = random_float32(1_000_000, seed=1)
    found, overflows = form.encoded(row)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = row.astype(form.dtype)
    left_range = np.isfinite(row) & ~np.isfinite(expected.astype(np.float32))
    assert overflows == np.count_nonzero(left_range)
    if form.saturates:
        largest = np.float32(form.magnitudes[-1])
        expected[left_range] = np.copysign(largest, row[left_range]).astype(form.dtype)
    assert_same_floats(found.view(form.dtype).astype(np.float32), expected.astype(np.float32))


@every_format
def test_halfway_cases_round_to_even_and_their_neighbours_to_the_nearest(form: Format) -> None:
    row = halfway(form)
    found, overflows = form.encoded(row)
    expected, beyond = form.rounded(row.astype(np.float64))
    np.testing.assert_array_equal(found, expected)
    assert overflows == beyond > 0


@every_format
def test_subnormals_of_the_type_round_to_nearest_even(form: Format) -> None:
    smallest = form.magnitudes[1]
    row = (np.arange(0, 4 * 64 + 1) / 64 * smallest).astype(np.float32)
    found, overflows = form.encoded(np.concatenate([row, -row]))
    expected, _ = form.rounded(np.concatenate([row, -row]).astype(np.float64))
    np.testing.assert_array_equal(found, expected)
    assert overflows == 0


@every_format
def test_zeros_keep_their_sign_and_float32_subnormals_are_not_flushed_before_rounding(
    form: Format,
) -> None:
    tiny = np.array([1, 2, 0x7FFFFF], np.uint32).view(np.float32)
    row = np.concatenate([np.array([0.0, -0.0], np.float32), tiny, -tiny])
    found, _ = form.encoded(row)
    expected, _ = form.rounded(row.astype(np.float64))
    np.testing.assert_array_equal(found, expected)


@every_format
def test_nan_stays_nan_whatever_its_payload(form: Format) -> None:
    patterns = [0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF]
    bits = np.array([p | s for p in patterns for s in (0, 1 << 31)], np.uint32)
    found, overflows = form.encoded(bits.view(np.float32))
    assert np.isnan(found.view(form.dtype).astype(np.float32)).all()
    assert overflows == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bfloat16", [np.inf, -np.inf]),
        ("float16", [np.inf, -np.inf]),
        ("float8_e5m2", [np.inf, -np.inf]),
        ("float8_e4m3fn", [np.nan, np.nan]),
    ],
)
def test_infinity_stays_infinity_where_the_type_has_one(name: str, expected: list[float]) -> None:
    form = FORMATS[name]
    found, overflows = form.encoded(np.array([np.inf, -np.inf], np.float32))
    np.testing.assert_array_equal(found.view(form.dtype).astype(np.float32), expected)
    assert overflows == 0


@pytest.mark.parametrize(
    ("name", "largest", "limit"),
    [("float8_e4m3fn", 448.0, 464.0), ("float8_e5m2", 57344.0, 61440.0)],
)
def test_fp8_saturates_and_counts_what_rounds_beyond_the_largest(
    name: str, largest: float, limit: float
) -> None:
    form = FORMATS[name]
    inside = np.nextafter(np.float32(limit), np.float32(0))
    outside = np.nextafter(np.float32(limit), np.float32(np.inf))
    row = np.array([largest, inside, outside, 1e30, -1e30, -outside], np.float32)
    found, overflows = form.encoded(row)
    values = found.view(form.dtype).astype(np.float32)
    np.testing.assert_array_equal(values, [largest] * 4 + [-largest] * 2)
    assert overflows == 4


@pytest.mark.parametrize(
    ("name", "limit"), [("float16", 65520.0), ("bfloat16", float.fromhex("0x1.ffp127"))]
)
def test_16_bit_types_overflow_to_infinity_and_count_it(name: str, limit: float) -> None:
    form = FORMATS[name]
    inside = np.nextafter(np.float32(limit), np.float32(0))
    row = np.array([inside, -inside, limit, -limit, np.finfo(np.float32).max], np.float32)
    found, overflows = form.encoded(row)
    values = found.view(form.dtype).astype(np.float64)
    largest = form.magnitudes[-1]
    np.testing.assert_array_equal(values, [largest, -largest, np.inf, -np.inf, np.inf])
    assert overflows == 3


def narrowed(row: Array) -> Array:
    out = np.empty(row.size, np.float32)
    codecs.narrow_to_odd(row, out)
    return out


def float64_cases(form: Format, seed: int) -> Array:
    """Values that rounding twice gets wrong: a hair beside every midpoint, and random ones."""
    rng = np.random.default_rng(seed)
    grid = form.magnitudes
    middle = (grid[:-1] + grid[1:]) / 2
    hairs = [middle * (1 + sign * 2.0**-power) for sign in (1, -1) for power in (30, 40, 51)]
    spread = rng.choice(grid[1:], 20_000) * rng.uniform(0.9, 1.1, 20_000)
    random = rng.integers(0, 1 << 63, 50_000, dtype=np.uint64).view(np.float64)
    cases = np.concatenate([middle, *hairs, spread, random[np.isfinite(random)]])
    return np.concatenate([cases, -cases])


@every_format
def test_float64_is_rounded_once_on_its_way_to_a_narrow_type(form: Format) -> None:
    row = float64_cases(form, seed=2)
    found, overflows = form.encoded(narrowed(row))
    expected, beyond = form.rounded(row)
    np.testing.assert_array_equal(found, expected)
    assert overflows == beyond


def test_the_float64_cases_do_contain_some_that_rounding_twice_gets_wrong() -> None:
    form = FORMATS["bfloat16"]
    row = float64_cases(form, seed=2)
    with np.errstate(over="ignore"):
        twice, _ = form.encoded(row.astype(np.float32))
    expected, _ = form.rounded(row)
    assert np.count_nonzero(twice != expected) > 1000


def test_narrowing_to_odd_keeps_exact_values_and_specials() -> None:
    with np.errstate(invalid="ignore"):
        row = random_float32(100_000, seed=3).astype(np.float64)
    assert_same_floats(narrowed(row), row.astype(np.float32))


def test_narrowing_to_odd_picks_the_odd_one_of_the_two_neighbours() -> None:
    rng = np.random.default_rng(4)
    row = rng.standard_normal(100_000) * np.exp2(rng.uniform(-160, 120, 100_000))
    found = narrowed(row)
    assert (found.astype(np.float64) != row).mean() > 0.9
    assert (found.view(np.uint32) & 1)[found.astype(np.float64) != row].all()
    toward_zero = np.nextafter(found, np.float32(0)).astype(np.float64)
    away = np.nextafter(found, np.copysign(np.float32(np.inf), found)).astype(np.float64)
    assert (np.abs(toward_zero) < np.abs(row)).all()
    assert (np.abs(row) < np.abs(away)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nonfinite_values_are_counted(dtype: Any) -> None:
    row = np.array([0, 1, np.inf, -np.inf, np.nan, np.finfo(dtype).max], dtype)
    assert codecs.count_nonfinite(row) == 3
