"""Positions kept by their variance over bfloat16 models, against decoded rows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fusekit.kernels import ballot, elect, norms, order, selected, thin
from tests.kernels.test_direct import SIZES, operands

Array = np.ndarray[Any, np.dtype[Any]]


def with_equal_variances(count: int, size: int) -> tuple[Array, Array]:
    """Models whose task vectors take few values: many variances are equal."""
    values, bits = operands(count + 1, size, seed=4)
    steps = np.random.default_rng(4).integers(-2, 3, (count, size)) / 4
    values[count] = np.round(values[count])
    values[:count] = values[count] + steps
    bits[:, 3:] = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return values, bits


def kept_rows(values: Array, threshold: float, left: Array) -> Array:
    rows = values[:-1] - values[-1]
    chosen = np.empty(values.shape[1], np.float32)
    thin.variance(rows, chosen)
    if left[0] < 0:
        order.keep_at_least(chosen, np.float32(threshold))
    else:
        left[0] -= order.keep_first(chosen, np.float32(threshold), left[0])
    return np.where(chosen != 0, rows, np.float32(0))


@pytest.mark.parametrize("ties", [-1, 0, 7, 10**9])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_squared_norms_over_the_kept_positions(count: int, size: int, ties: int) -> None:
    values, bits = with_equal_variances(count, size)
    threshold = float(np.median((values[:-1] - values[-1]).var(axis=0).astype(np.float32)))
    left, expected_left = np.array([ties]), np.array([ties])
    rows = kept_rows(values, threshold, expected_left)
    out, expected = (np.empty((-(-size // 8192), count)) for _ in range(2))
    assert selected.squares(bits, 3, size, threshold, left, out)
    norms.sums(rows, norms.SQUARES, 8192, expected)
    np.testing.assert_allclose(out, expected, rtol=1e-12)
    assert left[0] == expected_left[0]


@pytest.mark.parametrize("ties", [-1, 0, 7, 10**9])
@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_election_over_the_kept_positions(size: int, divide: bool, ties: int) -> None:
    values, bits = with_equal_variances(3, size)
    threshold = float(np.median((values[:-1] - values[-1]).var(axis=0).astype(np.float32)))
    left, expected_left = np.array([ties]), np.array([ties])
    rows = kept_rows(values, threshold, expected_left)
    choices = np.ones(3), np.array([0.2, 0.3, 0.5])
    out, expected = np.empty(size, np.uint16), np.empty(size, np.float32)
    rule = ballot.election(*choices, divide, 0.9)
    assert selected.elect_of_three(bits, 3, threshold, left, rule, out)
    merge = elect.MEAN if divide else elect.SUM
    work = np.empty((3, elect.CHUNK), np.float32)
    elect.elect_and_merge(rows, *choices, 0, 1, merge, values[3], 0.9, work, expected)
    np.testing.assert_array_equal(out, expected.astype(ml_dtypes.bfloat16).view(np.uint16))
    assert left[0] == expected_left[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_declined(bad: float) -> None:
    _, bits = operands(4, 3000, offset=0)
    bits[1, 2900] = np.float32(bad).astype(ml_dtypes.bfloat16).view(np.uint16)
    left, out = np.array([-1]), np.empty(3000, np.uint16)
    assert not selected.squares(bits, 0, 3000, 0.5, left, np.empty((1, 3)))
    rule = ballot.election(np.ones(3), np.ones(3), True, 1.0)
    assert not selected.elect_of_three(bits, 0, 0.5, left, rule, out)
