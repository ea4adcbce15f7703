"""Magnitudes near a threshold and elected means against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.kernels import factors

sizes = st.sampled_from([1, 63, 64, 65, 1024, 1025, 2500])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), size=sizes, levels=st.sampled_from([1, 3, 2000]))
def test_magnitudes_of_one_upper_half_are_collected_in_order(
    seed: int, size: int, levels: int
) -> None:
    rng = np.random.default_rng(seed)
    row = (1 + rng.integers(0, levels, size) / 2000).astype(np.float32)
    row *= rng.choice(np.float32([-1, 1]), size)
    magnitudes = np.abs(row).view(np.uint32)
    upper = int(magnitudes[size // 2] >> 16)
    found = np.zeros(size, np.uint32)
    count = factors.collect(row.view(np.uint32), upper, found)
    expected = magnitudes[magnitudes >> 16 == upper]
    assert count == expected.size > 0
    np.testing.assert_array_equal(found[:count], expected)


@pytest.mark.parametrize("by_sign", [False, True])
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    size=sizes,
    weights=st.lists(st.sampled_from([1.0, 0.5, -2.0, 0.0]), min_size=3, max_size=3),
)
def test_entries_of_the_elected_sign_are_averaged(
    by_sign: bool, seed: int, size: int, weights: list[float]
) -> None:
    rows = np.random.default_rng(seed).integers(-3, 4, (3, size)).astype(np.float32)
    out = np.empty(size, np.float32)
    factors.mean_of_agreeing(rows, np.float32(weights), by_sign, out)
    votes = (np.sign(rows) if by_sign else rows).sum(axis=0)
    agrees = np.sign(rows) == np.where(votes >= 0, 1, -1)
    total = (np.float32(weights)[:, None] * rows * agrees).sum(axis=0)
    np.testing.assert_allclose(out, total / np.maximum(1, agrees.sum(axis=0)), rtol=1e-6)
