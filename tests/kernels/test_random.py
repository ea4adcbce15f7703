"""The counter-based generator: uniform, independent, and the same however a range is cut."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.kernels import random

Array = np.ndarray[Any, np.dtype[Any]]

KEYS = [0, 1, 2, 0xDEADBEEF, 0xFFFFFFFFFFFFFFFF]
COUNT = 1 << 18


def bits_of(key: int, start: int = 0, count: int = COUNT) -> Array:
    out = np.zeros(count, np.uint32)
    random.uniform_bits(np.uint64(key), start, out)
    return out


def assert_uniform(categories: Array, bins: int) -> None:
    """Pearson's chi-square within five standard deviations of its mean."""
    counts = np.bincount(categories, minlength=bins)
    expected = categories.size / bins
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = bins - 1
    assert abs(statistic - degrees) < 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("start", [0, 1 << 33])
def test_upper_bits_are_uniform(key: int, start: int) -> None:
    bits = bits_of(key, start)
    assert_uniform(bits >> 24, 256)
    assert_uniform(bits >> 20 & 0xFF, 256)
    assert_uniform(bits >> 16, 1 << 16)


@pytest.mark.parametrize("key", KEYS)
def test_every_single_bit_is_a_fair_coin(key: int) -> None:
    bits = bits_of(key)
    for bit in range(32):
        ones = np.count_nonzero(bits >> bit & 1)
        assert abs(ones - COUNT / 2) < 5 * np.sqrt(COUNT / 4)


@pytest.mark.parametrize("lag", [1, 2, 7, 64, 1024, 8192, 8193])
def test_neighbouring_positions_are_independent(lag: int) -> None:
    bits = bits_of(12345) >> 28
    assert_uniform(bits[:-lag] * 16 + bits[lag:], 256)


@pytest.mark.parametrize(
    ("first", "second"), [(0, 1), (1, 2), (7, 7 | 1 << 63), (3, 3 ^ 1 << 32), (10, 11)]
)
def test_keys_are_independent_of_each_other(first: int, second: int) -> None:
    a, b = bits_of(first) >> 28, bits_of(second) >> 28
    assert_uniform(a * 16 + b, 256)
    assert np.count_nonzero(bits_of(first) == bits_of(second)) <= 3


def test_no_two_granules_repeat_each_other() -> None:
    granules = bits_of(5).reshape(-1, 8192)
    assert len(np.unique(granules[:, 0])) == len(granules)
    assert len(np.unique(granules[:, 4096])) == len(granules)


@settings(max_examples=60, deadline=None)
@given(
    key=st.integers(0, 2**64 - 1),
    start=st.integers(0, 1 << 40),
    cuts=st.lists(st.integers(0, 20_000), max_size=5),
)
def test_a_position_has_the_same_bits_however_the_range_is_cut(
    key: int, start: int, cuts: list[int]
) -> None:
    whole = bits_of(key, start, 20_000)
    edges = [0, *sorted(cuts), 20_000]
    pieces = [bits_of(key, start + a, b - a) for a, b in itertools.pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def kept(density: float, key: int, start: int = 0, count: int = COUNT) -> Array:
    row = np.ones(count, np.float32)
    random.drop(row, density, np.uint64(key), start)
    return row


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_kept_fraction_is_the_density(density: float, key: int) -> None:
    sigma = np.sqrt(COUNT * density * (1 - density))
    assert abs(kept(density, key).sum() - COUNT * density) < 4 * sigma


def test_density_zero_drops_everything() -> None:
    assert not kept(0.0, key=3).any()


def test_what_a_smaller_density_keeps_a_larger_one_keeps_too() -> None:
    few, many = kept(0.2, key=9), kept(0.6, key=9)
    assert (few <= many).all()


def test_a_density_between_two_sixteen_bit_draws_is_met() -> None:
    """Half a step above 3/65536: the second draw decides one entry in 65,536."""
    density, count = 3.5 / 65536, 1 << 24
    expected = count * density
    assert abs(kept(density, key=21, count=count).sum() - expected) < 4 * np.sqrt(expected)
    below = kept(3 / 65536, key=21, count=count).sum()
    assert below < kept(density, key=21, count=count).sum() < kept(4 / 65536, 21, 0, count).sum()


@pytest.mark.parametrize("lag", [1, 2, 512, 1024, 4096, 8192])
def test_drops_at_a_distance_are_independent(lag: int) -> None:
    keep = kept(0.5, key=77).astype(np.int64)
    assert_uniform(keep[:-lag] * 2 + keep[lag:], 4)


@settings(max_examples=40, deadline=None)
@given(
    key=st.integers(0, 2**64 - 1),
    start=st.integers(0, 1 << 40),
    cuts=st.lists(st.integers(0, 12_000), max_size=5),
)
def test_drops_are_the_same_however_the_range_is_cut(key: int, start: int, cuts: list[int]) -> None:
    whole = kept(0.4, key, start, 12_000)
    edges = [0, *sorted(cuts), 12_000]
    pieces = [kept(0.4, key, start + a, b - a) for a, b in itertools.pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kept_entries_are_unchanged_and_dropped_ones_zero(dtype: Any) -> None:
    row = np.random.default_rng(0).standard_normal(5000).astype(dtype)
    dropped = row.copy()
    random.drop(dropped, 0.3, np.uint64(1), 8000)
    mask = kept(0.3, key=1, start=8000, count=5000) > 0
    np.testing.assert_array_equal(dropped, np.where(mask, row, 0))
