"""The kernels of inspection against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.kernels import statistics


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
def test_powers_are_sums_of_powers(size: int) -> None:
    rows = np.random.default_rng(size).standard_normal((3, size)).astype(np.float32)
    out = np.empty((3, 4))
    statistics.powers(rows, out)
    wide = rows.astype(np.float64)
    expected = np.stack([(wide**p).sum(axis=1) for p in (1, 2, 3, 4)], axis=1)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)


def test_energy_counts_entries_at_the_threshold() -> None:
    row = np.array([3.0, -2.0, 1.0, 2.0, 0.5], np.float32)
    out = np.empty(3)
    statistics.energy_above(row, np.array([3.0, 2.0, 0.6]), out)
    np.testing.assert_array_equal(out, [9.0, 17.0, 18.0])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [1, 1023, 2500])
def test_products_add_to_the_upper_triangle_row_by_row(rows: int, size: int) -> None:
    values = np.random.default_rng(size).standard_normal((rows, size)).astype(np.float32)
    expected = (values.astype(np.float64) @ values.T)[np.triu_indices(rows)]
    out = np.ones(len(expected))
    statistics.products(values, out)
    np.testing.assert_allclose(out - 1, expected, rtol=1e-11, atol=1e-11)


@given(
    st.integers(1, 5), st.integers(1, 2500), st.integers(0, 2**32 - 1), st.sampled_from([0, 0.5])
)
@settings(max_examples=30, deadline=None)
def test_sign_counts_are_those_of_a_plain_loop(n: int, size: int, seed: int, zeros: float) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, size)).astype(np.float32)
    rows[rng.random(rows.shape) < zeros] = 0.0
    thresholds = rng.uniform(0.1, 1.5, n)
    both, opposed, positions = np.zeros((2, n, n)), np.zeros((2, n, n)), np.zeros(6)
    statistics.sign_counts(rows, thresholds, both, opposed, positions)
    signs = np.sign(rows)
    for plane, own in enumerate((signs, signs * (np.abs(rows) >= thresholds[:, None]))):
        for r in range(n):
            for s in range(r, n):
                assert both[plane, r, s] == np.count_nonzero(own[r] * own[s])
                assert opposed[plane, r, s] == np.count_nonzero(own[r] * own[s] < 0)
        voters = np.count_nonzero(own, axis=0)
        mixed = (own > 0).any(axis=0) & (own < 0).any(axis=0)
        assert positions[2 * plane] == np.count_nonzero(voters > 1)
        assert positions[2 * plane + 1] == np.count_nonzero(mixed)
    wide = rows.astype(np.float64)
    np.testing.assert_allclose(positions[statistics.MASS], np.abs(wide).sum(), rtol=1e-12)
    np.testing.assert_allclose(
        positions[statistics.NET], np.abs(wide.sum(axis=0)).sum(), rtol=1e-9, atol=1e-12
    )


def test_power_steps_over_blocks_of_rows_are_one_over_the_matrix() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((40, 17)).astype(np.float32)
    vectors = rng.standard_normal((2, 17)).astype(np.float32)
    out = np.zeros((2, 17), np.float32)
    for start in range(0, 40, 16):
        statistics.power_step(matrix[start : start + 16], vectors, out)
    np.testing.assert_allclose(out, vectors @ (matrix.T @ matrix), rtol=1e-4, atol=1e-4)
