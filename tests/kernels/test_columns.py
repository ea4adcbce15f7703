"""Gram matrices per column and per row against plain float64 NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fusekit.kernels import columns

Array = np.ndarray[Any, np.dtype[Any]]


def matrices(n: int, shape: tuple[int, int], dtype: Any = np.float32) -> Array:
    rng = np.random.default_rng(shape[1])
    return rng.standard_normal((n, *shape)).astype(dtype)


def pairs_along(models: Array, axis: int) -> Array:
    wide = models.astype(np.float64)
    n = len(wide)
    return np.array([(wide[r] * wide[s]).sum(axis) for r in range(n) for s in range(r, n)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (100, 64), (3, 300)])
def test_column_grams(n: int, shape: tuple[int, int], dtype: Any) -> None:
    models = matrices(n, shape, dtype)
    state = np.zeros((n * (n + 1) // 2, shape[1]))
    columns.add_column_gram(models.reshape(n, -1), 0, state)
    np.testing.assert_allclose(state, pairs_along(models, 0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", [1, 5, 13, 14, 40])
def test_column_grams_are_the_same_bits_however_the_matrix_is_cut(step: int) -> None:
    rows = matrices(2, (31, 13)).reshape(2, -1)
    whole, cut = np.zeros((3, 13)), np.zeros((3, 13))
    columns.add_column_gram(rows, 0, whole)
    for start in range(0, rows.shape[1], step):
        columns.add_column_gram(rows[:, start : start + step], start, cut)
    np.testing.assert_array_equal(cut, whole)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 100), (5, 64), (4, 63), (4, 65)])
def test_row_grams(n: int, shape: tuple[int, int], dtype: Any) -> None:
    models = matrices(n, shape, dtype)
    state = np.full((n * (n + 1) // 2, shape[0]), np.nan)
    columns.add_row_gram(models.reshape(n, -1), 0, shape[1], state)
    np.testing.assert_allclose(state, pairs_along(models, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_row_grams_of_some_rows_land_at_their_place(at_once: int) -> None:
    models = matrices(2, (9, 65))
    rows = models.reshape(2, -1)
    whole, cut = np.zeros((3, 9)), np.zeros((3, 9))
    columns.add_row_gram(rows, 0, 65, whole)
    for row in range(0, 9, at_once):
        part = rows[:, row * 65 : (row + at_once) * 65]
        columns.add_row_gram(part, row * 65, 65, cut)
    np.testing.assert_array_equal(cut, whole)
