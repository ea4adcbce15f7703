"""TALL masks of bfloat16 models in registers, against decoded rows."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fusekit.kernels import linear, masks, needed, norms
from tests.kernels.test_direct import SIZES, operands


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_sums_masks_and_consensus_are_those_of_decoded_rows(count: int, size: int) -> None:
    values, bits = operands(count + 1, size, seed=21)
    rows, base = values[:count] - values[count], values[count]
    ratios = np.linspace(0.3, 0.8, count)
    padded = -(-size // 8) * 8
    update, merged = np.empty(size, np.float32), np.empty(size, np.float32)
    expected, keep = (np.full((count, padded), 9, np.uint8) for _ in range(2))
    linear.weighted_sum(rows, np.ones(count), base[:0], 0.0, update)
    masks.stand_out(rows, update, ratios, expected)
    linear.weighted_sum(update[np.newaxis], np.ones(1), base, 1.0, merged)
    out = np.empty(size, np.uint16)
    assert needed.sum_and_masks(bits, 3, ratios, keep, out)
    np.testing.assert_array_equal(keep, expected)
    np.testing.assert_array_equal(out, merged.astype(ml_dtypes.bfloat16).view(np.uint16))
    for tasks in range(1, count + 2):
        masks.add_needed(update, expected, tasks, 0.7, base, merged)
        assert needed.consensus(bits, 3, ratios, tasks, 0.7, out)
        np.testing.assert_array_equal(out, merged.astype(ml_dtypes.bfloat16).view(np.uint16))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_declined(bad: float) -> None:
    _, bits = operands(4, 3000, offset=0)
    bits[1, 2900] = bits[2, 2900] = np.float32(bad).astype(ml_dtypes.bfloat16).view(np.uint16)
    out, keep = np.empty(3000, np.uint16), np.empty((3, 3000), np.uint8)
    assert not needed.sum_and_masks(bits, 0, np.ones(3), keep, out)
    assert not needed.consensus(bits, 0, np.zeros(3), 1, 1.0, out)
    assert not needed.unified(bits, 0, keep, out)
    assert not needed.agreement(bits, 0, 3000, np.empty((1, 6)))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_sums_of_other_granules_are_known(bad: float, count: int) -> None:
    size = 3 * 8192
    _, bits = operands(count + 1, size, offset=0)
    known, found = np.empty((3, 2 * count)), np.empty((3, 2 * count))
    assert needed.agreement(bits, 0, size, known)
    bits[0, 9000:17000:1024] = np.float32(bad).astype(ml_dtypes.bfloat16).view(np.uint16)
    assert not needed.agreement(bits, 0, size, found)
    np.testing.assert_array_equal(np.isfinite(found).all(axis=1), [True, False, True])
    np.testing.assert_array_equal(found[::2], known[::2])


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_unified_vector_is_that_of_decoded_rows(count: int, size: int, cancel: bool) -> None:
    values, bits = operands(count + 1, size, seed=22)
    if cancel:  # few different values: many sums are 0
        values = np.round(values)
        bits[:, 3:] = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    rows, base = values[:count] - values[count], values[count]
    padded = -(-size // 8) * 8
    update, merged = np.empty(size, np.float32), np.empty(size, np.float32)
    expected, keep = (np.full((count, padded), 9, np.uint8) for _ in range(2))
    masks.unify(rows, update, expected)
    linear.weighted_sum(update[np.newaxis], np.ones(1), base, 1.0, merged)
    out = np.empty(size, np.uint16)
    assert needed.unified(bits, 3, keep, out)
    np.testing.assert_array_equal(keep, expected)
    np.testing.assert_array_equal(out, merged.astype(ml_dtypes.bfloat16).view(np.uint16))
    granules = -(-size // 8192)
    found, sizes, kept = (np.empty((granules, n * count)) for n in (2, 1, 1))
    assert needed.agreement(bits, 3, size, found)
    norms.sums(rows, norms.MAGNITUDES, 8192, sizes)
    masks.kept_sums(update, expected, 8192, kept)
    np.testing.assert_allclose(found, np.hstack([sizes, kept]), rtol=1e-7)
