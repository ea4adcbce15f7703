"""Cut and dropped bfloat16 task vectors merged in registers, against decoded rows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fusekit.kernels import ballot, elect, linear, norms, order, tiles, trimmed
from fusekit.kernels.packed import Steps
from tests.kernels.test_direct import SIZES, operands

Array = np.ndarray[Any, np.dtype[Any]]

CUTS = [
    (tiles.KEEP_AT_LEAST, 0, 0.5),
    (tiles.KEEP_ABOVE, 1, 0.75),
    (tiles.DROP_AT_LEAST, 1, 2.0),
    (tiles.KEEP_FIRST, 2, 1.0),
    (tiles.DROP_FIRST, 2, 2.0),
]


def program(cuts: list[tuple[int, int, float]], left: list[int]) -> Steps:
    """The cuts and how many equal entries each has left."""
    kinds = np.array([cut[:2] for cut in cuts], np.int64).reshape(-1, 2)
    values = np.array([cut[2] for cut in cuts], np.float64)
    keys, flags = np.zeros(len(cuts), np.uint64), np.empty((0, 0), np.uint8)
    return Steps(kinds, values, keys, np.array(left, np.int64), flags)


def cut_rows(rows: Array, cuts: list[tuple[int, int, float]], left: Array) -> Array:
    """The same on decoded rows, one step after the other."""
    rows = np.ascontiguousarray(rows)
    for number, (kind, model, value) in enumerate(cuts):
        row, threshold = rows[model], np.float32(value)
        if kind == tiles.KEEP_AT_LEAST:
            order.keep_at_least(row, threshold)
        elif kind == tiles.KEEP_ABOVE:
            order.keep_above(row, threshold)
        elif kind == tiles.DROP_AT_LEAST:
            order.drop_at_least(row, threshold)
        elif kind == tiles.KEEP_FIRST:
            left[number] -= order.keep_first(row, threshold, left[number])
        else:
            left[number] -= order.drop_first(row, threshold, left[number])
    return rows


def rounded(values: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


@pytest.mark.parametrize("ties", [0, 10**9])
@pytest.mark.parametrize("size", SIZES)
def test_cut_task_vectors_are_summed(size: int, ties: int) -> None:
    values, bits = operands(4, size, seed=3)
    steps = program(CUTS, [0, 0, 0, ties, ties])
    remaining = steps.left.copy()
    rows = cut_rows(values[:3] - values[3], CUTS, remaining)
    weights = np.array([0.5, 1.5, -1.0])
    out, expected = np.empty(size, np.uint16), np.empty(size, np.float32)
    assert trimmed.weighted_sum(bits, 3, steps, weights, out) == size
    linear.weighted_sum(rows, weights, values[3], 1.0, expected)
    np.testing.assert_array_equal(out, rounded(expected))
    np.testing.assert_array_equal(steps.left, remaining)


@pytest.mark.parametrize("ties", [0, 10**9])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 3, 4])
def test_squares_of_what_is_cut(count: int, size: int, ties: int) -> None:
    values, bits = operands(count + 1, size, seed=5)
    cuts = [(tiles.KEEP_FIRST, model, 0.25 * model + 0.25) for model in range(count)]
    cuts.append((tiles.DROP_AT_LEAST, 0, 2.5))
    steps = program(cuts, [ties] * (count + 1))
    remaining = steps.left.copy()
    rows = cut_rows(values[:count] - values[count], cuts, remaining)
    out, expected = (np.empty((-(-size // 8192), count)) for _ in range(2))
    assert trimmed.squares(bits, 3, size, steps, out)
    norms.sums(rows, norms.SQUARES, 8192, expected)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    np.testing.assert_array_equal(steps.left, remaining)


@pytest.mark.parametrize("bad", [0.0, np.nan, 1e30])
@pytest.mark.parametrize("ties", [3, 2000, 3000])
def test_squares_of_other_granules_are_known(bad: float, ties: int) -> None:
    size = 3 * 8192
    values, bits = operands(4, size, seed=5)
    values[:3] = np.round(values[:3] * 4) / 4  # many equal entries: somewhere ties are split
    values[3], values[2, 9000] = 0.0, bad
    bits[:, 3:] = rounded(values)
    cuts = [(tiles.KEEP_FIRST, 0, 0.25), (tiles.DROP_FIRST, 0, 1.0), (tiles.KEEP_FIRST, 1, 0.5)]
    cuts.append((tiles.KEEP_ABOVE, 2, 0.25))
    steps = program(cuts, [ties, 2 * ties, ties, 0])
    remaining = steps.left.copy()
    rows = cut_rows(values[:3], cuts, remaining)
    found, expected = np.empty((3, 3)), np.empty((3, 3))
    assert trimmed.squares(bits, 3, size, steps, found) == (bad == 0.0)
    norms.sums(rows, norms.SQUARES, 8192, expected)
    known = np.isfinite(found).all(axis=1)
    assert known.tolist() == [True, bad == 0.0, True]
    np.testing.assert_allclose(found[known], expected[known], rtol=1e-6)
    np.testing.assert_array_equal(steps.left, remaining)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_squares_beyond_float32_are_declined(scale: float) -> None:
    values, _ = operands(4, 3000, offset=0)
    bits, out = rounded(values * scale), np.empty((1, 3))
    cuts = [(tiles.KEEP_AT_LEAST, model, scale) for model in range(3)]
    assert not trimmed.squares(bits, 0, 3000, program(cuts, [0] * 3), out)


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ballots", [(1.0, 0.7, 0.4), (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("cancel", [False, True])
def test_election_of_three(
    size: int, divide: bool, ballots: tuple[float, ...], cancel: bool
) -> None:
    values, bits = operands(4, size, seed=8)
    if cancel:  # few different values: many votes add up to 0
        values = np.round(values)
        bits[:, 3:] = rounded(values)
    steps = program(CUTS, [0, 0, 0, 10**9, 10**9])
    rows = cut_rows(values[:3] - values[3], CUTS, steps.left.copy())
    weights = np.array([0.5, 1.0, 2.0])
    out, expected = np.empty(size, np.uint16), np.empty(size, np.float32)
    rule = ballot.election(np.array(ballots), weights, divide, 0.7)
    assert trimmed.elect_of_three(bits, 3, steps, rule, out) == size
    merge = elect.MEAN if divide else elect.SUM
    work = np.empty((3, elect.CHUNK), np.float32)
    voting = np.array(ballots), weights, 0, 1, merge
    elect.elect_and_merge(rows, *voting, values[3], 0.7, work, expected)
    np.testing.assert_array_equal(out, rounded(expected))


@pytest.mark.parametrize("kind", [tiles.KEEP_FIRST, tiles.DROP_FIRST])
def test_runs_stop_where_ties_are_split(kind: int) -> None:
    size = 4096
    bits = np.zeros((4, size), np.uint16)
    bits[:3] = rounded(np.ones(1))
    cuts = [(kind, model, 1.0) for model in range(3)]
    out = np.zeros(size, np.uint16)
    steps = program(cuts, [1500, 5000, 5000])
    rule = ballot.election(np.ones(3), np.ones(3), True, 1.0)
    assert trimmed.elect_of_three(bits, 0, steps, rule, out) == 1024
    np.testing.assert_array_equal(steps.left, [476, 3976, 3976])
    steps = program(cuts, [1500, 5000, 5000])
    assert trimmed.weighted_sum(bits, 0, steps, np.ones(3), out) == 1024
    np.testing.assert_array_equal(steps.left, [476, 3976, 3976])
    squared = np.empty((1, 3))
    keeps = kind == tiles.KEEP_FIRST  # others may leave entries of any size
    assert trimmed.squares(bits, 0, size, program(cuts, [1500, 5000, 5000]), squared) == keeps
    np.testing.assert_array_equal(squared[0], [1500, size, size] if keeps else [np.nan] * 3)
    steps = program(cuts, [1024, 5000, 0])
    assert trimmed.weighted_sum(bits, 0, steps, np.ones(3), out) == size
    found = out.view(ml_dtypes.bfloat16).astype(np.float32)
    kept = [2.0, 1.0] if kind == tiles.KEEP_FIRST else [1.0, 2.0]
    np.testing.assert_array_equal(found, np.repeat(kept, [1024, 3072]))


@pytest.mark.parametrize("cut", [tiles.KEEP_ABOVE, tiles.DROP_AT_LEAST])
def test_a_cut_at_zero_or_at_infinity_may_leave_nothing(cut: int) -> None:
    _, bits = operands(2, 1500, offset=0)
    limit = np.inf if cut == tiles.KEEP_ABOVE else 0.0
    steps = program([(cut, 0, limit)], [0])
    out = np.empty(1500, np.uint16)
    assert trimmed.weighted_sum(bits, 0, steps, np.ones(1), out) == 1500
    np.testing.assert_array_equal(out, bits[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_what_is_not_finite_is_left_to_the_tiles(bad: float) -> None:
    values, bits = operands(4, 3000, offset=0)
    values[1, 2900] = bad
    bits[1] = rounded(values[1])
    steps = program([], [])
    assert not trimmed.squares(bits, 0, 3000, steps, np.empty((1, 3)))
    weights, out = np.full(3, 2.0), np.empty(3000, np.uint16)
    assert trimmed.weighted_sum(bits, 0, steps, weights, out) == 2048
    rule = ballot.election(np.ones(3), weights, False, 1.0)
    assert trimmed.elect_of_three(bits, 0, steps, rule, out) == 2048
