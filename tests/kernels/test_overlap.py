"""Changes of one model alone and of several, from the bits of bfloat16 models."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fusekit.kernels import overlap

Array = np.ndarray[Any, np.dtype[Any]]

EPSILON = 0.05


def operands(count: int, size: int) -> tuple[Array, Array]:
    """Models with few changes and their base: values from element 3 on, and all bits."""
    rng = np.random.default_rng(size)
    base = rng.standard_normal(size + 3)
    changes = rng.standard_normal((count, size + 3)) * (rng.random((count, size + 3)) < 0.4)
    encoded = np.vstack([base + changes, base]).astype(ml_dtypes.bfloat16)
    return encoded[:, 3:].astype(np.float32), encoded.view(np.uint16)


@pytest.mark.parametrize("boosts", [(1.0, 1.0, 1.0), (1.1, 1.0, 2.5), (1.0,), (1.5,) * 5])
@pytest.mark.parametrize("size", [1, 1024, 10_001])
def test_changes_of_one_model_are_boosted_and_those_of_several_averaged(
    size: int, boosts: tuple[float, ...]
) -> None:
    values, bits = operands(len(boosts), size)
    deltas, base = values[:-1] - values[-1], values[-1]
    changed = np.abs(deltas) > EPSILON
    kept = np.where(changed, deltas, 0.0).astype(np.float64)
    count = changed.sum(axis=0)
    alone = (np.array(boosts)[:, None] * kept).sum(axis=0)
    change = np.where(count == 1, alone, kept.sum(axis=0) / np.maximum(count, 1))
    expected = (base + change).astype(np.float32)
    decoded, out = np.empty(size, np.float32), np.empty(size, np.uint16)
    overlap.reinforce(deltas, EPSILON, np.array(boosts), base, decoded)
    np.testing.assert_array_equal(decoded, expected)
    assert overlap.reinforce_bits(bits, 3, EPSILON, np.array(boosts), out)
    np.testing.assert_array_equal(out, expected.astype(ml_dtypes.bfloat16).view(np.uint16))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 1024, 10_001])
def test_changes_are_counted_by_whether_others_made_them_too(size: int, count: int) -> None:
    values, bits = operands(count, size)
    deltas = values[:-1] - values[-1]
    changed = np.abs(deltas) > EPSILON
    alone = (changed & (changed.sum(axis=0) == 1)).sum(axis=1)
    expected = np.concatenate([alone, changed.sum(axis=1) - alone])
    out = np.full(2 * count, np.nan)
    overlap.count_overlap(deltas, EPSILON, out)
    np.testing.assert_array_equal(out, expected)
    out[:] = np.nan
    assert overlap.count_overlap_of_bits(bits, 3, size, EPSILON, out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_declined(bad: float, count: int) -> None:
    for model in range(count + 1):
        _, bits = operands(count, 3000)
        bits[model, 2900] = np.float32(bad).astype(ml_dtypes.bfloat16).view(np.uint16)
        out, counts = np.empty(3000, np.uint16), np.empty(2 * count)
        assert not overlap.reinforce_bits(bits, 0, 0.0, np.ones(count), out)
        assert not overlap.count_overlap_of_bits(bits, 0, 3000, 0.0, counts)


@pytest.mark.parametrize("epsilon", [0.1, 0.25, 0.3])
def test_a_change_must_exceed_epsilon(epsilon: float) -> None:
    at, one = np.float32(epsilon), np.uint16(0x3F80)
    around = [np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(1))]
    deltas = np.array([around, np.zeros(3), np.zeros(3)], np.float32)
    out = np.empty(6)
    overlap.count_overlap(deltas, epsilon, out)
    assert out[0] == sum(float(value) > epsilon for value in around)
    step = np.uint16(0x3E80)  # 0.25, all of it an update of a base of 0
    bits = np.array([[step, one], [0, 0], [0, 0], [0, 0]], np.uint16)
    assert overlap.count_overlap_of_bits(bits, 0, 2, epsilon, out)
    assert out[0] == 1 + (epsilon < 0.25)


def test_sums_beyond_the_largest_number_are_declined() -> None:
    bits = np.zeros((2, 100), np.uint16)
    bits[0] = np.float32(3e38).astype(ml_dtypes.bfloat16).view(np.uint16)
    assert not overlap.reinforce_bits(bits, 0, 0.0, np.array([2.0]), np.empty(100, np.uint16))
