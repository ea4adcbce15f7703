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


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 6), half=st.booleans())
def test_products_are_cut_to_their_best_approximation(seed, rank, half):
    A, B = half_precision_factors(seed)
    found = product_svd(B, A, rank, half_precision=half)
    product = B.astype(np.float64) @ A.astype(np.float64)
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
    product = stacked_b.astype(np.float64) @ stacked_a.astype(np.float64)
    found = product_svd(stacked_b, stacked_a, half_precision=half)
    scale = np.abs(product).max()
    np.testing.assert_allclose(dense(found), product, atol=1e-5 * scale)
    if noise == 0:
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
    found = product_svd(B, A, half_precision=half)
    assert len(found.S) == (0 if zero == "everything" else 5)
    np.testing.assert_allclose(dense(found), B @ A, atol=1e-4)


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
