"""Importances of entries, counted and compared without storing them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fusekit.kernels import direct, order, pairs

Array = np.ndarray[Any, np.dtype[Any]]

LENGTH = 401
START = 150
"""Where in the tensor the elements begin: inside a row."""


def operands(kind: str) -> tuple[Array, Array, Array, Array]:
    """Two operands as kernels get them, their values' importances and the rows' factors."""
    rng = np.random.default_rng(3)
    size = 20 * LENGTH
    first = rng.standard_normal(size).astype(np.float32)
    second = first + 0.1 * rng.standard_normal(size).astype(np.float32)
    factors = rng.uniform(0.5, 2.0, 21)
    factors[[4, 7]] = [0.0, -1e-6]
    if kind == "bfloat16":
        bits = [x.astype(ml_dtypes.bfloat16) for x in (first, second)]
        first, second = (x.astype(np.float32) for x in bits)
        given: tuple[Array, ...] = tuple(x.view(np.uint16) for x in bits)
    else:
        given = (first, second)
    own = np.repeat(factors.astype(np.float32), LENGTH)[START : START + size]
    scores: Array = np.abs(second - first) * own
    return given[0], given[1], scores, factors


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_importance_is_the_change_times_the_factor_of_its_row(kind: str) -> None:
    first, second, scores, factors = operands(kind)
    out = np.empty(first.size, np.float32)
    pairs.importance(first, second, factors, START, LENGTH, out)
    np.testing.assert_array_equal(out, scores)


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_importances_are_counted_as_their_keys(kind: str) -> None:
    first, second, scores, factors = operands(kind)
    keys = np.empty((1, scores.size), np.uint32)
    order.signed_keys(scores.view(np.uint32), np.uint32(1 << 31), keys[0])
    ends = np.sort(keys[0])[[100, 900, 4000, 4100, 7000, 7001]].reshape(3, 2)
    brackets, first_bin = [], 0
    for low, high in ends.tolist():
        shift = max(0, (high - low).bit_length() - 10)
        brackets.append((0, low, high, shift, first_bin))
        first_bin += ((high - low) >> shift) + 1
    table = np.array(brackets, np.uint32)
    expected, found = ((np.zeros(first_bin, np.int32), np.zeros(3, np.int64)) for _ in range(2))
    order.count_brackets(keys, table, *expected)
    pairs.count_importances(first, second, factors, START, LENGTH, table, *found)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])
    assert expected[0].sum() > 900


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_the_second_is_taken_from_the_threshold_on(kind: str) -> None:
    first, second, scores, factors = operands(kind)
    least = np.sort(scores)[[6000]]
    out = np.empty_like(first)
    pairs.choose(first, second, factors, START, LENGTH, least, out)
    np.testing.assert_array_equal(out, np.where(scores >= least[0], second, first))


@pytest.mark.parametrize("size", [1, 1024, 10_001])
def test_bounded_moves_of_bfloat16_models(size: int) -> None:
    rng = np.random.default_rng(size)
    encoded = rng.standard_normal((2, size + 3)).astype(ml_dtypes.bfloat16)
    bits, values = encoded.view(np.uint16), encoded[:, 3:].astype(np.float32)
    decoded, out = np.empty(size, np.float32), np.empty(size, np.uint16)
    pairs.move_at_most(values[0], values[1], 0.8, 0.3, decoded)
    assert direct.move_at_most(bits, 3, 0.8, 0.3, out)
    np.testing.assert_array_equal(out, decoded.astype(ml_dtypes.bfloat16).view(np.uint16))
    moved = decoded - values[0]
    assert np.abs(moved).max() <= 0.3 + 1e-6
    for operand in range(2):
        for bad in (np.nan, np.inf):
            spoilt = bits.copy()
            spoilt[operand, -1] = np.float32(bad).astype(ml_dtypes.bfloat16).view(np.uint16)
            assert not direct.move_at_most(spoilt, 3, 0.8, 0.3, out)
