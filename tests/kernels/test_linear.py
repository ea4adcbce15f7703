"""Linear combinations against plain float64 NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fusekit.kernels import linear

Array = np.ndarray[Any, np.dtype[Any]]

SIZES = [1, 7, 1023, 1024, 1025, 5000]
both_widths = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def data(n: int, size: int, dtype: Any) -> tuple[Array, Array]:
    rng = np.random.default_rng(size + n)
    rows = rng.standard_normal((n, size)).astype(dtype)
    return rows, rng.standard_normal(size).astype(dtype)


def in_order(weights: Array, rows: Array, first: Array) -> Array:
    """first + w_0 r_0 + w_1 r_1 + ... in float64."""
    total = first
    for weight, row in zip(weights, rows, strict=True):
        total = total + weight * row.astype(np.float64)
    return total


@both_widths
@pytest.mark.parametrize("size", SIZES)
def test_task_vectors_are_models_minus_base(size: int, dtype: Any) -> None:
    rows, base = data(3, size, dtype)
    expected = rows - base
    linear.subtract(rows, base)
    np.testing.assert_array_equal(rows, expected)


@both_widths
@pytest.mark.parametrize("n", [0, 1, 3, 6])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("base_weight", [None, 1.0, -0.7])
def test_weighted_sum_accumulates_in_float64_and_rounds_once(
    n: int, size: int, dtype: Any, base_weight: float | None
) -> None:
    rows, base = data(n, size, dtype)
    weights = np.random.default_rng(n).uniform(-2, 2, n)
    out = np.full(size, np.nan, dtype)
    if base_weight is None:
        linear.weighted_sum(rows, weights, base[:0], 0.0, out)
        expected = in_order(weights, rows, np.zeros(size))
    else:
        linear.weighted_sum(rows, weights, base, base_weight, out)
        expected = in_order(weights, rows, np.zeros(size))
        expected += base_weight * base.astype(np.float64)
    np.testing.assert_array_max_ulp(out, expected.astype(dtype), 1 if dtype == np.float32 else 16)


def test_weighted_sum_does_not_lose_what_float32_would() -> None:
    rows = np.array([[1e8], [1.0], [-1e8]], np.float32)
    out = np.empty(1, np.float32)
    linear.weighted_sum(rows, np.ones(3), rows[0, :0], 0.0, out)
    assert out[0] == 1.0


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize(("columns", "repeat"), [(37, 1), (5, 37), (1, 1), (64, 1), (3, 1024)])
@pytest.mark.parametrize("start", [0, 11, 400])
def test_indexed_sum_weighs_every_column_or_row_by_its_own_weights(
    columns: int, repeat: int, start: int, with_base: bool
) -> None:
    rows, base = data(3, 2000, np.float32)
    weights = np.random.default_rng(columns).uniform(-1, 1, (4, columns))
    out = np.full(2000, np.nan, np.float32)
    linear.indexed_sum(rows, weights, base if with_base else base[:0], start, repeat, out)
    which = (np.arange(start, start + 2000) // repeat) % columns
    expected = (weights[:3, which] * rows.astype(np.float64)).sum(axis=0)
    if with_base:
        expected = weights[3, which] * base + expected
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-7)


def test_indexed_sum_gives_the_same_bits_however_the_range_is_cut() -> None:
    rows, base = data(2, 3000, np.float32)
    weights = np.random.default_rng(0).uniform(-1, 1, (3, 77))
    whole = np.empty(3000, np.float32)
    linear.indexed_sum(rows, weights, base, 0, 1, whole)
    for cut in (1, 76, 77, 1500):
        pieces = np.empty(3000, np.float32)
        for part in (slice(0, cut), slice(cut, 3000)):
            linear.indexed_sum(rows[:, part], weights, base[part], part.start, 1, pieces[part])
        np.testing.assert_array_equal(pieces, whole)


@pytest.mark.parametrize("scale", [0.0, 1.0, 0.3, -2.0])
def test_rescaling_an_update_scales_the_difference_from_the_base(scale: float) -> None:
    (out,), base = data(1, 500, np.float32)
    merged = out.astype(np.float64)
    linear.rescale_update(base, scale, out)
    np.testing.assert_allclose(out, base + scale * (merged - base), rtol=1e-6, atol=1e-7)
