"""Sign election and disjoint merging against plain float64 NumPy."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fusekit.kernels import ballot, elect

Array = np.ndarray[Any, np.dtype[Any]]

ELECTIONS = [elect.MASS, elect.COUNT, elect.SQUARE, elect.LARGEST]
MERGES = [elect.MEAN, elect.SUM, elect.MAX]


def sparse_deltas(n: int, size: int, seed: int, dtype: Any = np.float32) -> Array:
    """Small integers with many zeros and ties, so that votes often cancel exactly."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-3, 4, (n, size)) * (rng.random((n, size)) < 0.7)).astype(dtype)


def reference_votes(deltas: Array, ballots: Array, election: int) -> Array:
    d = deltas.astype(np.float64)
    if election == elect.LARGEST:
        share = np.abs(ballots)[:, None] * d**2
        best = share.argmax(axis=0)
        won = share.max(axis=0) > 0
        return np.where(won, np.sign(ballots)[best] * d[best, np.arange(d.shape[1])], 0.0)
    ballot = {elect.MASS: d, elect.COUNT: np.sign(d), elect.SQUARE: d * np.abs(d)}[election]
    return (ballots[:, None] * ballot).sum(axis=0)


def reference_merge(
    deltas: Array, weights: Array, sign: Array, merge: int, base: Array, scale: float
) -> Array:
    weighted = weights[:, None] * deltas.astype(np.float64)
    kept = np.sign(weighted) * sign > 0
    if merge == elect.MAX:
        magnitude = np.where(kept, np.abs(weighted), 0.0)
        merged = sign * magnitude.max(axis=0)
    else:
        merged = np.where(kept, weighted, 0.0).sum(axis=0)
        if merge == elect.MEAN:
            divisor = np.where(kept, weights[:, None], 0.0).sum(axis=0)
            merged = merged / np.where(divisor != 0, divisor, 1.0)
    return base.astype(np.float64) + scale * merged


WORK = np.empty((3, elect.CHUNK))


@pytest.mark.parametrize("election", ELECTIONS)
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_votes(n: int, election: int) -> None:
    deltas = sparse_deltas(n, 3000, seed=n)
    ballots = np.array([1.0, 0.5, -2.0, 1.0, 0.25])[:n]
    total = np.full(3000, np.nan)
    elect.votes(deltas, 0, ballots, election, total)
    np.testing.assert_array_equal(total, reference_votes(deltas, ballots, election))


_exponents = st.integers(-130, 120)


@given(
    parts=st.lists(st.tuples(st.integers(-255, 255), _exponents), min_size=2, max_size=2),
    rest=st.tuples(st.integers(-3, 3), _exponents),
    order=st.permutations(range(3)),
)
def test_equal_votes_of_three_models_are_added_without_rounding(
    parts: list[tuple[int, int]], rest: tuple[int, int], order: list[int]
) -> None:
    x, y = (np.float32(np.ldexp(*part)) for part in parts)
    z = np.float32(-(x + y)) + np.float32(np.ldexp(*rest))  # close to cancelling
    assume(np.isfinite(z))  # x + y may round to infinity
    updates = np.array([x, y, z], np.float32)[order]
    exact = sum(map(Fraction, updates.tolist()))
    total = np.empty(1)
    elect.votes(updates[:, np.newaxis], 0, np.ones(3), elect.MASS, total)
    assert np.sign(total[0]) == (exact > 0) - (exact < 0)
    assert ballot.summed_sign(*updates) == (-1 if exact < 0 else 1)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_votes_that_overflow_keep_their_sign(order: tuple[int, ...]) -> None:
    for signs in product([-1, 1], repeat=2):
        updates = np.array([3e38 * signs[0], 2.5e38 * signs[0], 1e38 * signs[1]], np.float32)
        assert ballot.summed_sign(*updates[list(order)]) == signs[0]


@pytest.mark.parametrize("election", ELECTIONS)
@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 4000])
def test_sign_balance_is_the_sum_of_the_elected_signs(size: int, election: int) -> None:
    deltas = sparse_deltas(3, size, seed=size)
    ballots = np.ones(3)
    expected = np.sign(reference_votes(deltas, ballots, election)).sum()
    assert elect.sign_balance(deltas, ballots, election) == expected


@pytest.mark.parametrize(
    ("dtype", "precision", "rtol"),
    [
        (np.float32, np.float32, 2e-5),  # where base and update cancel
        (np.float32, np.float64, 1e-6),
        (np.float64, np.float64, 1e-14),
    ],
)
@pytest.mark.parametrize("tie_sign", [-1, 0, 1])
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("election", ELECTIONS)
def test_elect_and_merge(
    election: int, merge: int, tie_sign: int, dtype: Any, precision: Any, rtol: float
) -> None:
    deltas = sparse_deltas(3, 2500, seed=7, dtype=dtype)
    ballots, weights = np.array([1.0, 1.0, 2.0]), np.array([0.5, 1.0, 2.0])
    base = np.random.default_rng(8).standard_normal(2500).astype(dtype)
    out, work = np.full(2500, np.nan, dtype), np.empty((3, elect.CHUNK), precision)
    elect.elect_and_merge(
        deltas, ballots, weights, election, tie_sign, merge, base, 0.75, work, out
    )
    total = reference_votes(deltas, ballots, election)
    assert np.count_nonzero(total == 0) > 50
    sign = np.where(total == 0, tie_sign, np.sign(total))
    expected = reference_merge(deltas, weights, sign, merge, base, 0.75)
    np.testing.assert_allclose(out, expected, rtol=rtol, atol=1e-7 if rtol > 1e-6 else 0)


@pytest.mark.parametrize("merge", MERGES)
def test_a_negative_weight_flips_the_sign_an_entry_counts_with(merge: int) -> None:
    deltas = np.array([[2.0, -2.0, 1.0], [-1.0, -1.0, 1.0]], np.float32)
    weights = np.array([1.0, -1.0])
    out = np.empty(3, np.float32)
    base = np.zeros(3, np.float32)
    elect.elect_and_merge(deltas, weights, weights, elect.MASS, 1, merge, base, 1.0, WORK, out)
    sign = np.array([1, -1, 1])  # 2 + 1, -2 + 1, and 1 - 1 tied
    np.testing.assert_array_equal(
        out, reference_merge(deltas, weights, sign, merge, base, 1.0).astype(np.float32)
    )


def test_among_equal_shares_the_first_model_votes() -> None:
    first = np.linspace(0.1, 0.9, 1000)
    deltas = np.stack([-first, first[::-1]])  # the only entry of each is all of its norm
    for column in range(1000):
        ballots = 1.0 / deltas[:, column] ** 2
        total = np.empty(1)
        elect.votes(deltas[:, column : column + 1].copy(), 0, ballots, elect.LARGEST, total)
        assert total[0] < 0


def test_where_no_entry_is_kept_the_base_stays() -> None:
    deltas = np.zeros((2, 4), np.float32)
    base = np.array([1.0, -2.0, 0.0, 5.0], np.float32)
    out = np.empty(4, np.float32)
    ones = np.ones(2)
    elect.elect_and_merge(deltas, ones, ones, elect.MASS, 1, elect.MEAN, base, 1.0, WORK, out)
    np.testing.assert_array_equal(out, base)
