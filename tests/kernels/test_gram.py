"""Inner products and sums per granule against plain float64 NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fusekit.kernels import GRANULE, gram, norms

Array = np.ndarray[Any, np.dtype[Any]]

SIZES = [1, 5, 255, 256, 257, GRANULE - 1, GRANULE, GRANULE + 1, 3 * GRANULE + 777]


def rows_of(n: int, size: int, dtype: Any = np.float32) -> Array:
    rng = np.random.default_rng(size)
    return (rng.standard_normal((n, size)) + 0.1).astype(dtype)


def granules(size: int) -> list[slice]:
    return [slice(start, min(start + GRANULE, size)) for start in range(0, size, GRANULE)]


def gram_of(rows: Array) -> Array:
    n, size = rows.shape
    out = np.full((len(granules(size)), n * (n + 1) // 2), np.nan)
    gram.gram(rows, out)
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_gram_is_the_upper_triangle_per_granule(n: int, size: int, dtype: Any) -> None:
    rows = rows_of(n, size, dtype)
    found = gram_of(rows)
    upper = np.triu_indices(n)
    for granule, part in enumerate(granules(size)):
        wide = rows[:, part].astype(np.float64)
        bound = 1e-15 * (np.abs(wide) @ np.abs(wide).T)[upper] * 8
        assert (np.abs(found[granule] - (wide @ wide.T)[upper]) <= bound).all()


def test_products_are_summed_in_float64() -> None:
    # In float32 the small terms vanish beside the large one.
    row = np.full((1, 5000), 2.0**-13, np.float32)
    row[0, 0] = 1024.0
    assert gram_of(row)[0, 0] == 2.0**20 + 4999 * 2.0**-26


def test_the_sum_of_a_granule_does_not_depend_on_the_granules_around_it() -> None:
    rows = rows_of(3, 4 * GRANULE)
    whole = gram_of(rows)
    for granule, part in enumerate(granules(rows.shape[1])):
        alone = gram_of(np.ascontiguousarray(rows[:, part]))
        np.testing.assert_array_equal(alone[0], whole[granule])


@pytest.mark.parametrize("size", SIZES)
def test_absolute_sums_per_granule(size: int) -> None:
    rows = rows_of(3, size)
    out = np.full((len(granules(size)), 3), np.nan)
    norms.sums(rows, norms.MAGNITUDES, GRANULE, out)
    expected = [np.abs(rows[:, part].astype(np.float64)).sum(axis=1) for part in granules(size)]
    np.testing.assert_allclose(out, expected, rtol=1e-14)


def test_partial_sums_are_added_strictly_in_order() -> None:
    rows = np.array([[1e16, 1.0], [1.0, 1.0], [-1e16, 1.0]])
    total = np.array([0.0, 10.0])
    gram.add_rows(rows, total)
    np.testing.assert_array_equal(total, [0.0, 13.0])  # (1e16 + 1) - 1e16 in float64


def test_running_sums_are_those_before_each_row() -> None:
    rows = np.arange(12.0).reshape(4, 3)
    total, before = np.array([100.0, 0.0, -1.0]), np.full((4, 3), np.nan)
    start = total.copy()
    gram.running_sums(rows, total, before)
    np.testing.assert_array_equal(before, start + np.vstack([np.zeros(3), rows.cumsum(0)[:-1]]))
    np.testing.assert_array_equal(total, start + rows.sum(0))
