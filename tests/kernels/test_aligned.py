"""Pruned and elected sums of aligned coordinates against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.kernels import aligned

sizes = st.sampled_from([1, 7, 1024, 1025, 2500])


def rows_of(seed: int, size: int) -> np.ndarray:
    """Small integers, so that sums are exact and often cancel."""
    return np.random.default_rng(seed).integers(-3, 4, (3, size)).astype(np.float32)


def reference(
    rows: np.ndarray, thresholds: np.ndarray, weights: np.ndarray, tie: float
) -> tuple[np.ndarray, int]:
    kept = np.where(np.abs(rows) >= thresholds[:, None], rows, 0)
    votes = kept.sum(axis=0)
    cancels = (votes == 0) & (kept != 0).any(axis=0)
    sign = np.where(cancels, tie, np.sign(votes))
    agreeing = kept * (np.sign(kept) == sign) * (sign != 0) * weights[:, None]
    count = np.maximum(1, (agreeing != 0).sum(axis=0))
    return agreeing.sum(axis=0) / count, int(cancels.sum())


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    size=sizes,
    thresholds=st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=3, max_size=3),
    weights=st.lists(st.sampled_from([1.0, 0.5, -2.0, 0.0]), min_size=3, max_size=3),
    tie=st.sampled_from([-1.0, 0.0, 1.0]),
)
def test_elected_entries_are_averaged(
    seed: int, size: int, thresholds: list[float], weights: list[float], tie: float
) -> None:
    rows, limits, shares = rows_of(seed, size), np.float32(thresholds), np.float32(weights)
    out = np.empty(size, np.float32)
    ties = aligned.mean_of_elected(rows, limits, shares, tie, out)
    expected, cancelling = reference(rows, limits, shares, tie)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert ties == cancelling


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), size=sizes, threshold=st.sampled_from([0.0, 2.0, 9.0]))
def test_kept_entries_are_summed(seed: int, size: int, threshold: float) -> None:
    rows, weights = rows_of(seed, size), np.float32([1, -0.5, 2])
    out = np.empty(size, np.float32)
    aligned.sum_kept(rows, np.full(3, threshold, np.float32), weights, out)
    kept = np.where(np.abs(rows) >= threshold, rows, 0)
    np.testing.assert_array_equal(out, weights @ kept)


@pytest.mark.parametrize("shift", [16, 20])
def test_magnitudes_are_counted_by_their_leading_bits(shift: int) -> None:
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    bins = np.zeros(1 << (31 - shift), np.int64)
    aligned.count_magnitudes(values.view(np.uint32), shift, bins)
    keys = np.abs(values).view(np.uint32) >> np.uint32(shift)
    np.testing.assert_array_equal(bins, np.bincount(keys, minlength=bins.size))
