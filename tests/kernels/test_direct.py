"""bfloat16 straight from its bits: the same as decoding, computing in float64 and encoding."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numba import njit

from fusekit.kernels import direct, floats, gram, linear, norms, order, random, thin, tiles
from fusekit.kernels.packed import BF16, Packed

Array = np.ndarray[Any, np.dtype[Any]]

SIZES = [1, 511, 1024, 1025, 8192, 20_000]


def operands(count: int, size: int, seed: int = 0, offset: int = 3) -> tuple[Array, Array]:
    """(operands, size) float32 values and, behind `offset` other elements, their bits."""
    values = np.random.default_rng(seed).standard_normal((count, size)).astype(ml_dtypes.bfloat16)
    bits = np.zeros((count, size + offset), np.uint16)
    bits[:, offset:] = values.view(np.uint16)
    return values.astype(np.float32), bits


@njit
def _through_bf16(values: Array, bits: Array, back: Array) -> None:
    for i in range(values.size):
        bits[i] = floats.to_bf16(values[i])
        back[i] = floats.from_bf16(bits[i])


def test_a_value_is_rounded_to_the_nearest_bfloat16() -> None:
    values = np.random.default_rng(1).standard_normal(5000).astype(np.float32)
    values[:3] = [1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, -0.0]  # ties to even, and a sign
    bits, back = np.empty(5000, np.uint16), np.empty(5000, np.float32)
    _through_bf16(values, bits, back)
    np.testing.assert_array_equal(bits, values.astype(ml_dtypes.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(back, values.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 9])
def test_a_weighted_sum_is_rounded_once(count: int, size: int) -> None:
    values, bits = operands(count, size)
    weights = np.random.default_rng(2).standard_normal(count)
    out = np.empty(size, np.uint16)
    assert direct.weighted_sum(bits, 3, weights, out)
    expected = (weights[:, None] * values.astype(np.float64)).sum(axis=0).astype(np.float32)
    found = out.view(ml_dtypes.bfloat16)
    agree = found == expected.astype(ml_dtypes.bfloat16)
    assert np.count_nonzero(~agree) <= 1e-4 * size  # the order of summation shows at a tie
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("count", [2, 6])
def test_a_sum_beyond_the_finite_range_is_declined(count: int, bad: float) -> None:
    values, bits = operands(count, 3000, offset=0)
    values[1, 2900] = bad
    bits[1] = values[1].astype(ml_dtypes.bfloat16).view(np.uint16)
    assert not direct.weighted_sum(bits, 0, np.full(count, 2.0), np.empty(3000, np.uint16))


@pytest.mark.parametrize("deltas", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [2, 3])
def test_inner_products_of_few_models(count: int, size: int, deltas: bool) -> None:
    values, bits = operands(count + 1, size, seed=5)
    rows = values[:count] - values[count] if deltas else values[:count]
    shape = -(-size // 8192), count * (count + 1) // 2
    out, expected = np.empty(shape), np.empty(shape)
    direct.products(bits if deltas else bits[:count], 3, size, deltas, out)
    gram.gram(np.ascontiguousarray(rows), expected)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6 * size**0.5)


@pytest.mark.parametrize("what", [norms.SQUARES, norms.MAGNITUDES, norms.VALUES])
@pytest.mark.parametrize("size", SIZES)
def test_sums_of_task_vectors_are_those_of_decoded_rows(size: int, what: int) -> None:
    values, bits = operands(3, size, seed=9)
    out, expected = np.empty((-(-size // 8192), 2)), np.empty((-(-size // 8192), 2))
    direct.sums(bits, 3, size, what, out)
    norms.sums(values[:2] - values[2], what, 8192, expected)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("size", SIZES)
def test_random_drops_are_those_of_decoded_rows(size: int) -> None:
    values, bits = operands(4, size, seed=10)
    keys, position = np.array([5, 6, 7], np.uint64), 3 * 8192
    # The second density is half a step between 16-bit draws; the third drops nothing.
    densities, weights = np.array([0.4, 2000.5 / 65536, 1.0]), np.array([0.5, 3.0, -1.0])
    deltas = values[:3] - values[3]
    before, after = np.empty((-(-size // 8192), 3)), np.empty((-(-size // 8192), 3))
    norms.sums(deltas, norms.MAGNITUDES, 8192, before)
    for row, density, key in zip(deltas, densities, keys, strict=True):
        random.drop(row, density, key, position)
    norms.sums(deltas, norms.MAGNITUDES, 8192, after)
    out = np.empty((-(-size // 8192), 6))
    direct.drop_sums(bits, 3, size, position, keys, densities, out)
    np.testing.assert_allclose(out, np.hstack([before, after]), rtol=1e-6)
    merged, expected = np.empty(size, np.uint16), np.empty(size, np.float32)
    assert direct.drop_weighted_sum(bits, 3, position, keys, densities, weights, merged)
    linear.weighted_sum(deltas, weights, values[3], 1.0, expected)
    np.testing.assert_array_equal(merged, expected.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_ties_of_the_first_draw_are_settled_by_the_second() -> None:
    size, density = 1 << 20, 30_000.5 / 65536
    bits = np.zeros((2, size), np.uint16)
    bits[0] = np.float32(1.0).astype(ml_dtypes.bfloat16).view(np.uint16)
    keys, row = np.array([11], np.uint64), np.ones(size, np.float32)
    random.drop(row, density, keys[0], 0)
    merged, out = np.empty(size, np.uint16), np.empty((size // 8192, 2))
    assert direct.drop_weighted_sum(bits, 0, 0, keys, np.array([density]), np.ones(1), merged)
    direct.drop_sums(bits, 0, size, 0, keys, np.array([density]), out)
    np.testing.assert_array_equal(merged != 0, row != 0)
    np.testing.assert_array_equal(out[:, 1], row.reshape(-1, 8192).sum(axis=1))
    sure = np.ones(size, np.float32)
    random.drop(sure, 30_001 / 65536, keys[0], 0)
    assert 0 < np.count_nonzero(sure != row) < 40  # one in 65,536 depends on the second draw


@pytest.mark.parametrize("size", SIZES)
def test_magnitudes_are_counted_in_brackets(size: int) -> None:
    values, bits = operands(3, size, seed=6)
    keys = np.abs(values[:2] - values[2]).view(np.uint32)
    low = int(np.quantile(keys, 0.3))
    high = int(np.quantile(keys, 0.6))
    shift = 12
    width = ((high - low) >> shift) + 1
    brackets = np.array([[0, low, high, shift, 0], [1, low, high, shift, width]], np.uint32)
    bins, above = np.zeros(2 * width, np.int32), np.zeros(2, np.int64)
    expected_bins, expected_above = bins.copy(), above.copy()
    assert direct.count_brackets(bits, 3, size, brackets, bins, above) == size
    order.count_brackets(keys, brackets, expected_bins, expected_above)
    np.testing.assert_array_equal(bins, expected_bins)
    np.testing.assert_array_equal(above, expected_above)
    assert bins.sum() > 0 or size < 100


def test_counting_stops_before_what_is_not_finite() -> None:
    _, bits = operands(3, 5000, offset=0)
    bits[1, 3500] = 0x7FC0
    brackets = np.array([[0, 0, 0x7F7FFFFF, 20, 0]], np.uint32)
    bins, above = np.zeros(1 << 12, np.int32), np.zeros(1, np.int64)
    assert direct.count_brackets(bits, 0, 5000, brackets, bins, above) == 3072
    assert bins.sum() == 3072


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", SIZES)
def test_variances_over_models_are_those_of_decoded_rows(size: int, count: int) -> None:
    values, bits = operands(count + 1, size, seed=13)
    out, expected = np.empty(size, np.float32), np.empty(size, np.float32)
    assert direct.variance(bits, 3, out) == size
    thin.variance(values[:count] - values[count], expected)
    np.testing.assert_array_equal(out, expected)
    decoded = np.empty(size, np.float32)
    tiles.variance(Packed(bits, BF16, 3, np.zeros(count + 1, np.int64)), count, decoded)
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_allclose(
        out, (values[:count] - values[count]).astype(np.float64).var(axis=0), rtol=1e-5, atol=1e-12
    )
