"""Scores of bfloat16 task vectors from their bits: the same as from decoded rows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fusekit.kernels import compete, order

Array = np.ndarray[Any, np.dtype[Any]]

OFFSET = 5
SIZES = [1, 1000, compete.TILE, 3 * compete.TILE + 17]


def family(models: int, size: int, spread: float) -> tuple[Array, Array, Array, Array]:
    """(bits behind OFFSET other elements, decoded task vectors, lower and upper clips)."""
    rng = np.random.default_rng(size + models)
    base = rng.standard_normal(size + OFFSET).astype(np.float32)
    rows = [base + spread * rng.standard_normal(base.size) for _ in range(models)]
    values = np.stack([*rows, base]).astype(ml_dtypes.bfloat16)
    values[0, OFFSET::7] = values[-1, OFFSET::7]  # some entries did not change
    wide = values.astype(np.float32)
    deltas = wide[:-1, OFFSET:] - wide[-1, OFFSET:]
    sizes = np.abs(deltas)
    low = np.quantile(sizes, 0.1, axis=1).astype(np.float32)
    high = np.quantile(sizes, 0.95, axis=1).astype(np.float32)
    return values.view(np.uint16), deltas, low, high


def expected_keys(deltas: Array, low: Array, high: Array, comparison: int) -> Array:
    scores = np.empty_like(deltas)
    compete.scores(deltas, low, high, comparison, scores)
    keys = np.empty(scores.shape, np.uint32)
    for row, out in zip(scores, keys, strict=True):
        order.signed_keys(row.view(np.uint32), np.uint32(1 << 31), out)
    return keys


@pytest.mark.parametrize("comparison", [compete.RAW, compete.NORMALISED, compete.PAIRWISE])
@pytest.mark.parametrize("spread", [0.01, 0.1, 3.0])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("models", [1, 3])
def test_keys_are_those_of_the_scores(
    models: int, size: int, spread: float, comparison: int
) -> None:
    bits, deltas, low, high = family(models, size, spread)
    keys = np.zeros((models, size + 3), np.uint32)
    compete.score_keys(bits, OFFSET, size, low, high, comparison, keys, 2)
    np.testing.assert_array_equal(keys[:, 2:-1], expected_keys(deltas, low, high, comparison))
    assert not keys[:, :2].any()
    assert not keys[:, -1].any()


def test_scores_are_counted_as_their_keys() -> None:
    models, size = 3, 4 * compete.TILE + 100
    bits, deltas, low, high = family(models, size, 0.01)
    keys = expected_keys(deltas, low, high, compete.RAW)
    brackets, first = [], 0
    for row in range(models):
        bottom, top = np.sort(keys[row])[[size // 2, size // 2 + 300]].tolist()
        shift = max(0, (top - bottom).bit_length() - 9)
        brackets.append((row, bottom, top, shift, first))
        first += ((top - bottom) >> shift) + 1
    table = np.array(brackets, np.uint32)
    expected, found = ((np.zeros(first, np.int32), np.zeros(models, np.int64)) for _ in range(2))
    order.count_brackets(keys, table, *expected)
    largest = np.zeros((models, 2), np.int64)
    largest[2] = [0xFFFFFFFF, 4]  # one is known that is larger than all of these
    compete.count_scores(bits, OFFSET, size, low, high, compete.RAW, table, *found, largest)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    for row in range(2):
        assert largest[row].tolist() == [keys[row].max(), (keys[row] == keys[row].max()).sum()]
    assert largest[2].tolist() == [0xFFFFFFFF, 4]


@pytest.mark.parametrize("comparison", [compete.RAW, compete.NORMALISED, compete.PAIRWISE])
@pytest.mark.parametrize("spread", [0.01, 3.0])
@pytest.mark.parametrize("size", SIZES)
def test_the_mean_is_that_of_decoded_rows_to_one_rounding(
    size: int, spread: float, comparison: int
) -> None:
    bits, deltas, low, high = family(3, size, spread)
    scores = np.empty_like(deltas)
    compete.scores(deltas, low, high, comparison, scores)
    threshold = np.quantile(scores, 0.7, axis=1).astype(np.float32).astype(np.float64)
    factor = 1.0 / np.maximum(scores.max(axis=1) - threshold, 1e-20)
    weights = np.array([1.0, 0.5, -0.3])
    base = bits[-1, OFFSET:].view(ml_dtypes.bfloat16).astype(np.float32)
    expected = np.empty(size, np.float32)
    compete.scored_mean(deltas, scores, low, high, threshold, factor, weights, base, expected)
    settings = (threshold, factor, weights)
    narrow = [values.astype(np.float32) for values in settings]
    out = np.empty(size, np.uint16)
    assert compete.merge_scored(bits, OFFSET, low, high, comparison, *narrow, out)
    rounded = expected.astype(ml_dtypes.bfloat16).view(np.uint16)
    difference = np.abs(out.astype(np.int64) - rounded)
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= max(1, 2e-3 * size)
    assert (expected != base).any() or size == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_declined(bad: float) -> None:
    bits, _, low, high = family(3, 3000, 0.01)
    bits.view(ml_dtypes.bfloat16)[1, OFFSET + 2500] = bad
    ones, out = np.ones(3, np.float32), np.empty(3000, np.uint16)
    assert not compete.merge_scored(bits, OFFSET, low, high, compete.RAW, ones, ones, ones, out)
