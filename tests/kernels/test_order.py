"""Order-preserving keys, counting, and thresholding of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusekit.kernels import order

Array = np.ndarray[Any, np.dtype[Any]]

KEYS = {np.float32: np.uint32, np.float64: np.uint64}
both_widths = pytest.mark.parametrize("dtype", KEYS)


def row_of(dtype: Any) -> Any:
    width = 8 * np.dtype(dtype).itemsize
    floats = st.floats(width=width, allow_nan=False)
    return arrays(dtype, st.integers(1, 50), elements=floats)


def magnitude_keys(row: Array) -> Array:
    key = KEYS[row.dtype.type]
    keys = np.empty(row.size, key)
    order.magnitude_keys(row.view(key), key(np.iinfo(key).max >> 1), keys)
    return keys


def signed_keys(row: Array) -> Array:
    key = KEYS[row.dtype.type]
    keys = np.empty(row.size, key)
    order.signed_keys(row.view(key), key(1 << (np.iinfo(key).bits - 1)), keys)
    return keys


@both_widths
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_magnitude_keys_compare_like_magnitudes(dtype: Any, data: st.DataObject) -> None:
    row = data.draw(row_of(dtype))
    keys, magnitude = magnitude_keys(row), np.abs(row)
    np.testing.assert_array_equal(
        keys[:, None] < keys[None, :], magnitude[:, None] < magnitude[None, :]
    )


@both_widths
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_signed_keys_compare_like_values(dtype: Any, data: st.DataObject) -> None:
    row = data.draw(row_of(dtype))
    keys = signed_keys(row)
    np.testing.assert_array_equal(keys[:, None] < keys[None, :], row[:, None] < row[None, :])


@pytest.mark.parametrize("shift", [0, 1, 5])
def test_keys_in_a_bracket_are_counted_per_bin_and_those_above_together(shift: int) -> None:
    keys = np.random.default_rng(0).integers(0, 2000, 10_000).astype(np.uint32)
    low, high = 300, 1100
    bins = np.ones((high - low >> shift) + 1, np.int32)
    above = order.count_bracket(keys, np.uint32(low), np.uint32(high), np.uint32(shift), bins)
    inside = keys[(keys >= low) & (keys <= high)].astype(np.int64)
    expected = 1 + np.bincount(inside - low >> shift, minlength=bins.size)
    np.testing.assert_array_equal(bins, expected)
    assert above == np.count_nonzero(keys > high)


ROW = np.array([3, -1, 0, 2, -2, 2, -0.0, -3, 2, 0.5], np.float32)


@both_widths
def test_entries_of_one_magnitude_are_counted(dtype: Any) -> None:
    assert order.count_equal(ROW.astype(dtype), dtype(2)) == 4
    assert order.count_equal(ROW.astype(dtype), dtype(0)) == 2
    assert order.count_equal(ROW.astype(dtype), dtype(7)) == 0


@both_widths
def test_keep_at_least_keeps_the_threshold_itself(dtype: Any) -> None:
    row = ROW.astype(dtype)
    order.keep_at_least(row, dtype(2))
    np.testing.assert_array_equal(row, [3, 0, 0, 2, -2, 2, 0, -3, 2, 0])


@both_widths
def test_keep_above_drops_the_threshold_itself(dtype: Any) -> None:
    row = ROW.astype(dtype)
    order.keep_above(row, dtype(2))
    np.testing.assert_array_equal(row, [3, 0, 0, 0, 0, 0, 0, -3, 0, 0])


@both_widths
@pytest.mark.parametrize("budget", range(6))
def test_of_equal_entries_the_first_ones_are_kept(dtype: Any, budget: int) -> None:
    row = ROW.astype(dtype)
    used = order.keep_first(row, dtype(2), budget)
    expected = np.array([3, 0, 0, 2, -2, 2, 0, -3, 2, 0], dtype)
    equal = np.flatnonzero(np.abs(expected) == 2)
    expected[equal[budget:]] = 0
    np.testing.assert_array_equal(row, expected)
    assert used == min(budget, equal.size)
