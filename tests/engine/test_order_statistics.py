"""The k-th largest value is exact, whatever the data, the sizes and the way work is split."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.methods.base import (
    Block,
    Combine,
    Copy,
    Method,
    OrderStatistics,
    OrderValue,
    ShareOfNonzero,
    Tensor,
)
from tests.engine.support import execute

Array = np.ndarray[Any, np.dtype[Any]]
Found = tuple[tuple[OrderValue, ...], ...]


@dataclass(frozen=True)
class Largest(OrderStatistics):
    """Ranks of the models themselves, by magnitude or by value."""

    wanted: tuple[tuple[int | ShareOfNonzero, ...], ...]
    by_magnitude: bool

    @property
    def absolute(self) -> bool:  # type: ignore[override]
        return self.by_magnitude

    @property
    def ranks(self) -> tuple[tuple[int | ShareOfNonzero, ...], ...]:
        return self.wanted

    def values(self, block: Block) -> Array:
        return block.rows


def measured(
    tensors: Sequence[Array],
    ranks: Sequence[Sequence[int | ShareOfNonzero]],
    *,
    absolute: bool = True,
    engine: dict[str, Any] | None = None,
) -> list[Found]:
    """What a rule receives, per tensor, for a group of (models, ...) arrays."""
    received: dict[str, Found] = {}

    def rule(tensor: Tensor) -> Generator[Largest, Found, Combine]:
        received[tensor.name] = yield Largest(tuple(map(tuple, ranks)), absolute)
        return Copy(0)

    method = Method("ranks", "", "", "", (), (), rule, base=None)
    count = len(tensors[0])
    models = [{f"t{i}": rows[m] for i, rows in enumerate(tensors)} for m in range(count)]
    execute(models, method, granularity="model", engine={"threads": 2, **(engine or {})})
    return [received[f"t{i}"] for i in range(len(tensors))]


def expected(values: Array, rank: int, absolute: bool) -> OrderValue:
    """By sorting."""
    flat = np.abs(values) if absolute else values
    value = np.sort(flat)[flat.size - rank]
    greater, equal = (int(np.count_nonzero(which)) for which in (flat > value, flat == value))
    return OrderValue(float(value), greater, equal, rank)


def check(
    values: Array,
    ranks: Sequence[int],
    *,
    absolute: bool = True,
    engine: dict[str, Any] | None = None,
) -> None:
    ((found,),) = measured([values[None]], [ranks], absolute=absolute, engine=engine)
    for rank, value in zip(ranks, found, strict=True):
        assert value == expected(values, rank, absolute), rank


def some_ranks(size: int) -> list[int]:
    spread = {1, 2, size // 10, size // 5, size // 2, size - 1, size}
    return sorted(rank for rank in spread if 1 <= rank <= size)


def normal(size: int, dtype: Any = np.float32, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(size).astype(dtype)


SIZES = [1, 2, 8191, 8192, 8193, (1 << 17) - 1, 1 << 17, (1 << 17) + 1, (1 << 20) + 1]
BIG = 200_003
"""More values than are ever selected from directly."""


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_around_every_boundary(size: int, dtype: Any) -> None:
    check(normal(size, dtype), some_ranks(size))


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("size", [1000, BIG])
class TestData:
    def test_ties(self, size: int, absolute: bool) -> None:
        values = np.random.default_rng(1).integers(-5, 6, size).astype(np.float32)
        check(values, some_ranks(size), absolute=absolute)

    def test_zeros_of_both_signs(self, size: int, absolute: bool) -> None:
        values = np.where(np.random.default_rng(2).random(size) < 0.9, 0.0, normal(size))
        values[::3] *= np.float32(-1)
        assert np.signbit(values[values == 0]).any()
        check(values.astype(np.float32), some_ranks(size), absolute=absolute)

    @pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-45, 3e38])
    def test_all_equal(self, size: int, absolute: bool, value: float) -> None:
        check(np.full(size, value, np.float32), some_ranks(size), absolute=absolute)

    @pytest.mark.parametrize("step", [1, -1])
    def test_sorted(self, size: int, absolute: bool, step: int) -> None:
        check(np.sort(normal(size))[::step].copy(), some_ranks(size), absolute=absolute)

    def test_all_negative(self, size: int, absolute: bool) -> None:
        check(-np.abs(normal(size)) - 1, some_ranks(size), absolute=absolute)

    def test_every_magnitude_from_subnormal_to_huge(self, size: int, absolute: bool) -> None:
        rng = np.random.default_rng(3)
        values = np.exp2(rng.uniform(-149, 127, size)) * rng.choice([-1, 1], size)
        check(values.astype(np.float32), some_ranks(size), absolute=absolute)

    def test_one_outlier(self, size: int, absolute: bool) -> None:
        values = np.zeros(size, np.float32)
        values[size // 3] = 7.0
        check(values, [1, 2, size], absolute=absolute)


def in_every_granule(first: Array, rest: Array) -> Array:
    """`first` where a position's offset in its run of 8192 is below 1024, else `rest`."""
    return np.where(np.arange(first.size) % 8192 < 1024, first, rest)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("large_first", [True, False])
def test_samples_at_regular_places_may_mislead_but_the_result_is_exact(
    large_first: bool, absolute: bool, dtype: Any
) -> None:
    small, large = normal(BIG, dtype, 4), normal(BIG, dtype, 5) * 1000 + 5000
    values = in_every_granule(large, small) if large_first else in_every_granule(small, large)
    check(values, some_ranks(BIG), absolute=absolute)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize(("first", "rest"), [(1.0, 2.0), (2.0, 1.0)])
def test_ranks_at_the_very_edge_of_what_the_samples_say(
    first: float, rest: float, absolute: bool, dtype: Any
) -> None:
    values = in_every_granule(np.full(BIG, first, dtype), np.full(BIG, rest, dtype))
    twos = int(np.count_nonzero(values == 2.0))
    check(values, [twos - 1, twos, twos + 1], absolute=absolute)


def test_a_narrow_peak_between_two_sampled_values() -> None:
    # What is sampled says: nothing between 1 and 2. All the ranks asked for lie there.
    ends = np.where(np.arange(BIG) % 2 == 0, 1.0, 2.0)
    values = in_every_granule(ends, np.random.default_rng(6).uniform(1.4, 1.4001, BIG))
    check(values.astype(np.float32), some_ranks(BIG))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_several_ranks_per_row_and_rows_without_any(dtype: Any) -> None:
    rows = np.stack([normal(BIG, dtype, seed) * (seed + 1) for seed in range(3)])
    ranks: list[list[int]] = [[BIG // 2, 5, BIG], [], [1, 1]]
    (found,) = measured([rows], ranks)
    for row, wanted, values in zip(rows, ranks, found, strict=True):
        assert list(values) == [expected(row, rank, True) for rank in wanted]


@pytest.mark.parametrize("size", [1, 1000, BIG])
@pytest.mark.parametrize("zeros", [0.0, 0.02, 0.7, 0.9999, 1.0])
@pytest.mark.parametrize("threads", [1, 3])
def test_shares_of_the_values_that_are_not_zero(size: int, zeros: float, threads: int) -> None:
    values = np.where(np.random.default_rng(8).random(size) < zeros, 0.0, normal(size))
    values = values.astype(np.float32)
    shares = [1e-6, 0.0007, 0.1, 0.5, 0.999, 1.0]
    ranks: list[int | ShareOfNonzero] = [*map(ShareOfNonzero, shares), size]
    ((found,),) = measured([values[None]], [ranks], engine={"threads": threads})
    for share, value in zip(shares, found, strict=False):
        rank = int(share * np.count_nonzero(values))
        wanted = expected(values, rank, True) if rank else OrderValue(math.inf, 0, 0, 0)
        assert value == wanted, share
    assert found[-1] == expected(values, size, True)


@pytest.mark.parametrize("sizes", [[5, 3], [70_000, 1, 8192, 90_001], [300_000, 10, 8193]])
def test_a_group_is_ranked_as_one_row_over_all_its_tensors(sizes: list[int]) -> None:
    tensors = [normal(size, seed=size)[None] * np.float32(i + 1) for i, size in enumerate(sizes)]
    everything = np.concatenate([rows[0] for rows in tensors])
    ranks = some_ranks(everything.size)
    for found in measured(tensors, [ranks]):
        assert list(found[0]) == [expected(everything, rank, True) for rank in ranks]


@pytest.mark.parametrize(
    "engine",
    [
        {"threads": 1},
        {"threads": 3, "block_elements": 8192, "resident_bytes": 0},
        {"threads": 2, "block_elements": 1 << 20, "resident_bytes": 0},
        {"threads": 1, "block_elements": 3 * 8192, "resident_bytes": 1 << 40},
    ],
)
@pytest.mark.parametrize("size", [100_000, (1 << 20) + 12_345])
def test_blocks_threads_and_residency_change_nothing(size: int, engine: dict[str, Any]) -> None:
    values = np.round(normal(size) * 50).astype(np.float32) / 50
    check(values, some_ranks(size), engine=engine)


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 140_000),
    levels=st.integers(1, 1 << 16),
    share=st.floats(0, 1),
    absolute=st.booleans(),
    wide=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_any_size_rank_and_number_of_distinct_values(
    size: int, levels: int, share: float, absolute: bool, wide: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(-levels, levels + 1, size) * 0.37
    rank = 1 + int(share * (size - 1))
    check(values.astype(np.float64 if wide else np.float32), [rank], absolute=absolute)
