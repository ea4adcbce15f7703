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


def threshold_of(values: Array) -> float:
    """The median of the variances that are not 0."""
    variances = (values[:-1] - values[-1]).var(axis=0).astype(np.float32)
    return float(np.median(variances[variances > 0])) if variances.any() else 1.0


@pytest.mark.parametrize("ties", [-1, 0, 7, 10**9])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_squared_norms_over_the_kept_positions(count: int, size: int, ties: int) -> None:
    values, bits = with_equal_variances(count, size)
    threshold = threshold_of(values)
    left, expected_left = np.array([ties]), np.array([ties])
    rows = kept_rows(values, threshold, expected_left)
    out, expected = (np.empty((-(-size // 8192), count)) for _ in range(2))
    assert selected.squares(bits, 3, size, threshold, left, out)
    norms.sums(rows, norms.SQUARES, 8192, expected)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert left[0] == expected_left[0]


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_squares_beyond_float32_are_declined(scale: float) -> None:
    values, _ = operands(4, 3000, offset=0)
    bits = (values * scale).astype(ml_dtypes.bfloat16).view(np.uint16)
    left, out = np.array([-1]), np.empty((1, 3))
    assert not selected.squares(bits, 0, 3000, scale**2, left, out)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_squares_of_other_granules_are_known(count: int, bad: float) -> None:
    size = 3 * 8192
    values, bits = with_equal_variances(count, size)
    values[0, 9000], bits[0, 9003] = bad, np.float32(bad).astype(ml_dtypes.bfloat16).view(np.uint16)
    threshold = threshold_of(values[:, 10_000:])
    left, expected_left = np.array([7000]), np.array([7000])
    with np.errstate(invalid="ignore", over="ignore"):
        rows = kept_rows(values, threshold, expected_left)
    found, expected = np.empty((3, count)), np.empty((3, count))
    assert not selected.squares(bits, 3, size, threshold, left, found)
    norms.sums(rows, norms.SQUARES, 8192, expected)
    assert not np.isfinite(found[1]).all()
    np.testing.assert_allclose(found[::2], expected[::2], rtol=1e-6)
    assert left[0] == expected_left[0]


@pytest.mark.parametrize("ties", [-1, 0, 7, 10**9])
@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ballot_of_first", [1.0, 0.5])
def test_election_over_the_kept_positions(
    size: int, divide: bool, ties: int, ballot_of_first: float
) -> None:
    values, bits = with_equal_variances(3, size)
    threshold = threshold_of(values)
    left, expected_left = np.array([ties]), np.array([ties])
    rows = kept_rows(values, threshold, expected_left)
    choices = np.array([ballot_of_first, 1.0, 1.0]), np.array([0.2, 0.3, 0.5])
    out, expected = np.empty(size, np.uint16), np.empty(size, np.float32)
    rule = ballot.election(*choices, divide, 0.9)
    assert selected.elect_of_three(bits, 3, threshold, left, rule, out)
    merge = elect.MEAN if divide else elect.SUM
    work = np.empty((3, elect.CHUNK), np.float32)
    elect.elect_and_merge(rows, *choices, 0, 1, merge, values[3], 0.9, work, expected)
    np.testing.assert_array_equal(out, expected.astype(ml_dtypes.bfloat16).view(np.uint16))
    assert left[0] == expected_left[0]


@pytest.mark.parametrize("scale", [1.0, 1e-17, 1e-22, 1e16, 1e20])
@pytest.mark.parametrize("equal", [0.0, 0.02, 0.9])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 20])
def test_variances_are_counted_as_if_each_were_computed(
    count: int, equal: float, scale: float
) -> None:
    size = 5 * 1024 + 77
    rng = np.random.default_rng(count)
    values = (rng.standard_normal((count + 1, size)) * scale).astype(ml_dtypes.bfloat16)
    values[1:-1, rng.random(size) < equal] = 0.0
    values[0, (values[1:-1] == 0.0).all(axis=0)] = 0.0
    values[:count, 300:1500] = np.round(rng.standard_normal((count, 1200))) * scale
    values[count, 300:1500] = 0.0
    bits = np.zeros((count + 1, size + 3), np.uint16)
    bits[:, 3:] = values.view(np.uint16)
    decoded, variances = values.astype(np.float32), np.empty((1, size), np.float32)
    thin.variance(decoded[:-1] - decoded[-1], variances[0])
    keys = variances.view(np.uint32)
    ordered = np.sort(keys[0])
    wanted = [(0, 0, 0), (0, int(ordered[-1]), 20)]
    for share in (0.1, 0.5, 0.95, 1.0):
        at = int(share * (size - 1))
        wanted += [
            (int(ordered[at]), int(ordered[at]), 0),
            (int(ordered[at]), int(ordered[-1]), 16),
        ]
        wanted += [(int(ordered[max(at - 30, 0)]), int(ordered[at]), 3)]
    lengths = [((high - low) >> shift) + 1 for low, high, shift in wanted]
    firsts = np.cumsum([0, *lengths]).tolist()
    brackets = np.array([(0, *w, f) for w, f in zip(wanted, firsts, strict=False)], np.uint32)
    found, expected = (
        (np.zeros(firsts[-1], np.int64), np.zeros(len(wanted), np.int64)) for _ in range(2)
    )
    order.count_brackets(keys, brackets, *expected)
    assert selected.count_brackets(bits, 3, size, brackets, *found) == size
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_declined(bad: float, count: int) -> None:
    for model in range(count + 1):
        _, bits = operands(count + 1, 3000, offset=0)
        bits[model, 1100] = np.float32(bad).astype(ml_dtypes.bfloat16).view(np.uint16)
        left, out = np.array([-1]), np.empty(3000, np.uint16)
        assert not selected.squares(bits, 0, 3000, 0.5, left, np.empty((1, count)))
        counts = np.zeros((1, 5), np.uint32), np.zeros(1, np.int64), np.zeros(1, np.int64)
        assert selected.count_brackets(bits, 0, 3000, *counts) == 1024
        if count == 3:
            rule = ballot.election(np.ones(3), np.ones(3), True, 1.0)
            assert not selected.elect_of_three(bits, 0, 0.5, left, rule, out)
