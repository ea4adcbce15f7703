"""Divergences of softmax rows, by the short way in float32 and by the long one in float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fusekit.kernels import divergence

Array = np.ndarray[Any, np.dtype[Any]]

EPSILON = 1e-8


def by_definition(first: Array, second: Array) -> Array:
    """In long doubles."""

    def shares(rows: Array) -> Array:
        rows = rows.astype(np.longdouble)
        powers = np.exp(rows - rows.max(axis=1, keepdims=True))
        total: Array = powers / powers.sum(axis=1, keepdims=True) + EPSILON
        return total

    p, q = shares(second), shares(first)
    found: Array = (p * np.log(p / q)).sum(axis=1)
    return found


def near(first: Array, second: Array) -> Array:
    rows, length = first.shape
    out = np.empty(rows)
    complete = divergence.near(first.ravel(), second.ravel(), length, EPSILON, out)
    assert complete == bool(np.isfinite(out).all())
    return out


def pair(rows: int, length: int, scale: float, change: float) -> tuple[Array, Array]:
    rng = np.random.default_rng(length)
    first = rng.uniform(-scale, scale, (rows, length)).astype(np.float32)
    second = (first + rng.uniform(-change, change, first.shape)).astype(np.float32)
    return first, second


@pytest.mark.parametrize("length", [3, 15, 16, 17, 401, 1024, 3072, 20_000])
@pytest.mark.parametrize(("scale", "change"), [(0.05, 1e-4), (0.05, 0.06), (1.2, 0.01)])
def test_rows_that_differ_little_are_measured_in_float32(
    length: int, scale: float, change: float
) -> None:
    first, second = pair(7, length, scale, change)
    found = near(first, second)
    reachable = length * np.exp(2 * scale) < 4e4
    assert np.isfinite(found).all() == reachable
    if reachable:
        np.testing.assert_allclose(found, by_definition(first, second).astype(float), rtol=1e-6)


def test_the_bits_of_bfloat16_give_what_their_values_give() -> None:
    bits = [x.astype(ml_dtypes.bfloat16) for x in pair(9, 333, 0.3, 0.02)]
    first, second = (x.astype(np.float32) for x in bits)
    found = near(bits[0].view(np.uint16), bits[1].view(np.uint16))
    np.testing.assert_array_equal(found, near(first, second))
    np.testing.assert_allclose(found, by_definition(first, second).astype(float), rtol=1e-6)


def test_equal_rows_do_not_diverge() -> None:
    first, _ = pair(3, 100, 1.0, 0.0)
    np.testing.assert_array_equal(near(first, first), 0.0)


def far_rows() -> tuple[Array, Array]:
    """Rows that the short way must decline: large, much changed, moved as one, not finite."""
    first, second = pair(6, 90, 0.2, 0.01)
    first[0, 3] = 1.6
    second[1, 4] += 0.1
    second[2] = first[2] + np.float32(0.05)
    second[3, 5] = np.nan
    first[4, 6] = np.inf
    return first, second


def test_rows_beyond_the_bounds_are_left_open() -> None:
    found = near(*far_rows())
    np.testing.assert_array_equal(np.isnan(found), [True] * 5 + [False])


def test_open_rows_are_computed_in_float64_and_others_left() -> None:
    first, second = far_rows()
    out = np.array([np.nan, np.nan, np.nan, 7.0, 8.0, np.nan])
    divergence.softmax(first.ravel(), second.ravel(), 90, EPSILON, out)
    computed = [0, 1, 2, 5]
    expected = by_definition(first[computed], second[computed]).astype(float)
    np.testing.assert_array_equal(out[3:5], [7.0, 8.0])
    # What is measured of a row that moved as one are the roundings of its entries.
    np.testing.assert_allclose(out[computed], expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("scale", [1.0, 30.0, 600.0])
def test_divergences_of_wide_rows(scale: float) -> None:
    rng = np.random.default_rng(1)
    first = scale * rng.standard_normal((20, 257))
    second = first + 0.3 * scale * rng.standard_normal(first.shape)
    out = np.full(20, np.nan)
    divergence.softmax(first.ravel(), second.ravel(), 257, EPSILON, out)
    np.testing.assert_allclose(out, by_definition(first, second).astype(float), 1e-8, 1e-14)
