"""Decompositions of products of factors against the dense ones, in every state of the factors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.adapters import linalg
from fusekit.adapters.linalg import product_singular_values, product_svd


def half_precision_factors(seed, rank=6):
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((rank, 50)), rng.standard_normal((70, rank))
    return [x.astype(ml_dtypes.bfloat16).astype(np.float32) for x in (A, B)]


def dense(svd):
    return (svd.U * svd.S) @ svd.Vt


def product_of(B, A):
    return B.astype(np.float64) @ A.astype(np.float64)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 6), half=st.booleans())
def test_products_are_cut_to_their_best_approximation(seed, rank, half):
    A, B = half_precision_factors(seed)
    if half:
        A, B = A.astype(ml_dtypes.bfloat16), B.astype(ml_dtypes.bfloat16)
    found = product_svd(B, A, rank)
    product = product_of(B, A)
    values = np.linalg.svd(product, compute_uv=False)
    np.testing.assert_allclose(found.S, values[:rank], rtol=1e-5 if half else 1e-6)
    best = np.linalg.norm(values[rank:])
    assert np.linalg.norm(product - dense(found)) <= best * (1 + 1e-6) + 1e-5 * values[0]
    np.testing.assert_allclose(found.U.T @ found.U, np.eye(rank), atol=1e-4 if half else 1e-6)
    np.testing.assert_allclose(found.Vt @ found.Vt.T, np.eye(rank), atol=1e-4 if half else 1e-6)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-3])
def test_factors_that_nearly_depend_on_each_other_lose_nothing(half, noise):
    A, B = half_precision_factors(1)
    rng = np.random.default_rng(2)
    A2 = A + noise * rng.standard_normal(A.shape).astype(np.float32)
    B2 = B + noise * rng.standard_normal(B.shape).astype(np.float32)
    stacked_a, stacked_b = np.concatenate([A, A2]), np.concatenate([B, -0.5 * B2], axis=1)
    if half:
        stacked_a, stacked_b = (x.astype(ml_dtypes.bfloat16) for x in (stacked_a, stacked_b))
    product = product_of(stacked_b, stacked_a)
    found = product_svd(stacked_b, stacked_a)
    scale = np.abs(product).max()
    np.testing.assert_allclose(dense(found), product, atol=1e-5 * scale)
    if noise == 0 or (half and noise < 1e-3):  # which bfloat16 cannot tell from none
        assert len(found.S) == 6


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("zero", ["a row of A", "a column of B", "everything"])
def test_pieces_without_effect_are_left_out(half, zero):
    A, B = half_precision_factors(3)
    if zero == "a row of A":
        A[2] = 0
    elif zero == "a column of B":
        B[:, 2] = 0
    else:
        B[:] = 0
    if half:
        A, B = A.astype(np.float16), B.astype(np.float16)
    found = product_svd(B, A)
    assert len(found.S) == (0 if zero == "everything" else 5)
    np.testing.assert_allclose(dense(found), product_of(B, A), atol=1e-4)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("coefficients", [[1, 1, 1, 1, 1, 1], [2, -0.5, 1, 3, -1, 1e-3], [0] * 6])
def test_coefficients_multiply_the_rows_of_a_factor(dtype, coefficients, monkeypatch):
    monkeypatch.setattr(linalg, "CACHED_ROWS", 7)
    A, B = (x.astype(dtype) for x in half_precision_factors(5))
    found = product_svd(B, A, None, np.asarray(coefficients))
    expected = product_of(B, np.asarray(coefficients)[:, None] * A.astype(np.float64))
    np.testing.assert_allclose(dense(found), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_tall_products_are_the_same_in_either_layout(dtype, monkeypatch):
    monkeypatch.setattr(linalg, "CACHED_ROWS", 7)
    rng = np.random.default_rng(0)
    tall = rng.standard_normal((50, 6)).astype(dtype)
    narrow = rng.standard_normal((6, 3))
    for laid_out in (tall, np.asfortranarray(tall)):
        found = linalg.tall_product(laid_out, narrow, np.float64)
        np.testing.assert_allclose(found, product_of(tall, narrow), atol=1e-5)
        gram = linalg.gram_matrix(laid_out)
        np.testing.assert_allclose(gram, product_of(tall.T, tall), rtol=1e-12)


def test_singular_values_of_a_product_need_no_vectors():
    A, B = half_precision_factors(4)
    expected = np.linalg.svd(B.astype(np.float64) @ A, compute_uv=False)[:6]
    np.testing.assert_allclose(product_singular_values(B, A), expected, rtol=1e-6)


def test_gram_matrices_add_up_over_pieces(monkeypatch):
    tall = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    whole = linalg.gram_matrix(tall)
    monkeypatch.setattr(linalg, "CACHED_ROWS", 7)
    np.testing.assert_allclose(linalg.gram_matrix(tall), whole, rtol=1e-12)
    np.testing.assert_allclose(whole, tall.astype(np.float64).T @ tall, rtol=1e-12)
