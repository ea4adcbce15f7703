"""Drops whose probability grows with the rank, without a rank."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fusekit.kernels import ballot, elect, lottery, random

Array = np.ndarray[Any, np.dtype[Any]]


def padded(sizes: Array) -> Array:
    room = np.zeros(-(-sizes.size // lottery.LANES) * lottery.LANES, sizes.dtype)
    room[: sizes.size] = sizes
    return room


def draw(
    model: Array,
    base: Array,
    key: int,
    shape: tuple[int, int],
    ends: tuple[float, float],
    start: int = 0,
    kind: Any = np.float32,
) -> tuple[Array, Array]:
    """(keep flags, sums) of elements from position `start` on, in rows of (length, stride)."""
    sizes = padded(np.zeros(shape[0], kind))
    keys = sizes.view(np.uint32 if kind == np.float32 else np.uint64)
    packed = np.zeros(-(-(start + model.size) // 8), np.uint8)
    totals = np.zeros(2)
    lottery.draw(model, base, np.uint64(key), start, *shape, *ends, sizes, keys, packed, totals)
    flags = np.unpackbits(packed, bitorder="little").astype(bool)
    assert not flags[:start].any()
    assert not flags[start + model.size :].any()
    return flags[start : start + model.size], totals


NO_BASE = np.empty(0, np.float32)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("length", [2, 5, 64, 100])
def test_an_entry_beats_the_share_of_tickets_that_its_rank_is_of_the_others(
    length: int, kind: Any
) -> None:
    rng = np.random.default_rng(length)
    sizes = rng.integers(0, length, length).astype(kind)  # some are equal
    ranks = np.argsort(np.argsort(sizes, kind="stable"))
    room = padded(sizes)
    keys = room.view(np.uint32 if kind == np.float32 else np.uint64)
    first, tickets, draws = np.uint32(1 << 30), np.uint32((1 << 30) + 12345), 40 * (length - 1)
    share = lottery.rivals_per_ticket(length - 1, tickets)
    kept = np.empty(room.size // lottery.LANES, np.uint64)
    won = np.zeros(length, int)
    for number in range(draws):
        ticket = int(first) + int((number + 0.5) / draws * int(tickets))
        bits = np.full(room.size, ticket, np.uint32)
        lottery.settle(keys, bits, first, tickets, *share, kept)
        won += np.unpackbits(kept.view(np.uint8), bitorder="little")[:length]
    np.testing.assert_array_equal(won, 40 * ranks)


def test_numbers_before_and_behind_the_tickets_decide_alone() -> None:
    room = padded(np.arange(64, dtype=np.float32))
    bits = np.where(np.arange(64) % 2, 999, 2000).astype(np.uint32)
    kept = np.empty(1, np.uint64)
    share = lottery.rivals_per_ticket(63, np.uint32(1000))
    lottery.settle(room.view(np.uint32), bits, np.uint32(1000), np.uint32(1000), *share, kept)
    assert int(kept[0]) == 0xAAAAAAAAAAAAAAAA


def test_entries_are_kept_independently_with_the_probability_of_their_rank() -> None:
    sizes = np.array([3, 1, 4, 1, 5, 9, 2, 6], np.float32)
    ranks = np.argsort(np.argsort(sizes, kind="stable"))
    times = 20_000
    kept = np.array([draw(sizes, NO_BASE, key, (8, 1), (0.2, 0.8))[0] for key in range(times)])
    chances = 0.2 + 0.6 * ranks / 7
    deviations = (chances * (1 - chances) / times) ** 0.5
    assert (np.abs(kept.mean(axis=0) - chances) < 5 * deviations).all()
    correlations = np.corrcoef(kept.T) - np.eye(8)
    assert np.abs(correlations).max() < 5 / times**0.5


@pytest.mark.parametrize("start", [0, 8, 3, 61, 127])
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (64, 1), (401, 1), (30, 15)])
def test_flags_and_sums_do_not_depend_on_where_a_run_begins(
    shape: tuple[int, int], start: int
) -> None:
    delta = np.random.default_rng(0).standard_normal(6 * shape[0] * shape[1]).astype(np.float32)
    kept, totals = draw(delta, NO_BASE, 5, shape, (0.3, 0.7), start)
    sums = np.abs(delta.astype(np.float64))
    np.testing.assert_allclose(totals, [sums.sum(), sums[kept].sum()], rtol=1e-7)
    half = 3 * shape[0] * shape[1]
    again, _ = draw(delta[half:], NO_BASE, 5, shape, (0.3, 0.7), start + half)
    np.testing.assert_array_equal(again, kept[half:])


def test_bits_of_bfloat16_are_drawn_from_as_their_differences() -> None:
    rng = np.random.default_rng(1)
    base = rng.standard_normal(1200).astype(ml_dtypes.bfloat16)
    model = (base.astype(np.float32) + 0.1 * rng.standard_normal(1200)).astype(base.dtype)
    delta = model.astype(np.float32) - base.astype(np.float32)
    for shape in ((300, 1), (30, 10)):
        packed = draw(model.view(np.uint16), base.view(np.uint16), 3, shape, (0.1, 0.9))
        decoded = draw(delta, NO_BASE, 3, shape, (0.1, 0.9))
        np.testing.assert_array_equal(packed[0], decoded[0])
        np.testing.assert_array_equal(packed[1], decoded[1])


@pytest.mark.parametrize("length", [64, 100, 300])
def test_sums_may_exceed_the_type_of_what_is_summed(length: int) -> None:
    delta = np.full(length, 3e38, np.float32)
    kept, totals = draw(delta, NO_BASE, 5, (length, 1), (0.3, 0.7))
    np.testing.assert_allclose(totals, [length * 3e38, np.count_nonzero(kept) * 3e38], rtol=1e-6)


def test_sums_of_given_survivors() -> None:
    rng = np.random.default_rng(2)
    delta, mask = rng.standard_normal(1000).astype(np.float32), rng.random(1000) < 0.4
    packed, totals = np.packbits(mask, bitorder="little"), np.zeros(2)
    for start, stop in ((0, 300), (300, 1000)):
        part = delta[start:stop]
        lottery.add_sizes(part, NO_BASE, start, 150, padded(delta[:150]), packed, totals)
    sums = np.abs(delta.astype(np.float64))
    np.testing.assert_allclose(totals, [sums.sum(), sums[mask].sum()], rtol=1e-7)


@pytest.mark.parametrize("size", [1, 64, 1000, 1024, 3001])
@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("given_ballots", [(1.0, 2.0, -0.5), (1.0, 1.0, 1.0)])
def test_survivors_are_elected_from_as_by_definition(
    size: int, divide: bool, given_ballots: tuple[float, ...]
) -> None:
    rng = np.random.default_rng(size)
    values = rng.standard_normal((4, size + 5)).astype(ml_dtypes.bfloat16)
    position = 16
    flags = rng.random((3, position + size)) < 0.5
    packed = np.packbits(flags, axis=1, bitorder="little")
    factors = np.array([1.5, 1.0, 0.25], np.float32)
    ballots, weights = np.array(given_ballots), np.array([1.0, 2.0, 0.5])
    out = np.empty(size, np.uint16)
    rule = ballot.election(ballots, weights, divide, 0.7)
    given = values.view(np.uint16), 5, position, packed, factors, rule, out
    assert lottery.elect_of_three(*given)
    summed = np.empty(size, np.uint16)
    assert lottery.sum_of_three(values.view(np.uint16), 5, position, packed, weights, summed)
    base = values[3, 5:].astype(np.float64)
    kept_updates = (values[:3, 5:].astype(np.float64) - base).astype(np.float32)
    kept_updates = np.where(flags[:, position:], kept_updates, np.float32(0))
    steps = (weights[0] * kept_updates[0] + weights[1] * kept_updates[1]) + weights[
        2
    ] * kept_updates[2]
    rounded = (steps + base).astype(np.float32).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(summed, rounded.view(np.uint16))
    updates = (values[:3, 5:].astype(np.float64) - base) * factors[:, None] * flags[:, position:]
    sign = np.where(ballots @ updates < 0, -1.0, 1.0)
    agree = weights[:, None] * updates * sign > 0
    merged = (weights[:, None] * updates * agree).sum(axis=0)
    if divide:
        kept = weights @ agree
        merged /= np.where(kept != 0, kept, 1.0)
    expected = (base + 0.7 * merged).astype(np.float32)
    found = out.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("operand", range(4))
def test_values_that_are_not_finite_are_declined_even_if_they_are_dropped(
    operand: int, bad: float
) -> None:
    values = np.ones((4, 2000), ml_dtypes.bfloat16)
    values[operand, 1500] = bad
    packed, ones = np.zeros((3, 250), np.uint8), np.ones(3)
    rule, out = ballot.election(ones, ones, True, 1.0), np.empty(2000, np.uint16)
    given, factors = (values.view(np.uint16), 0, 0), ones.astype(np.float32)
    assert not lottery.elect_of_three(*given, packed, factors, rule, out)
    assert not lottery.sum_of_three(*given, packed, ones, out)
    keys, never = np.zeros(3, np.uint64), np.zeros(3)
    assert not lottery.drop_and_elect(*given, keys, never, factors, rule, out)


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("size", [1, 8192, 10_001, 1 << 18])
def test_election_of_three_after_random_drops(size: int, divide: bool) -> None:
    rng = np.random.default_rng(12)
    encoded = rng.standard_normal((4, size + 3)).astype(ml_dtypes.bfloat16)
    bits, values = encoded.view(np.uint16), encoded[:, 3:].astype(np.float32)
    keys, position = np.array([5, 6, 7], np.uint64), 3 * 8192
    # Half a step between 16-bit draws, so that second draws count; the third drops nothing.
    densities = np.array([0.4 + 0.5 / 65536, 2000.5 / 65536, 1.0])
    factors = np.array([2.5, 3.0, 1.0], np.float32)
    rows = values[:3] - values[3]
    for row, density, key, factor in zip(rows, densities, keys, factors, strict=True):
        random.drop(row, density, key, position)
        row *= factor
    ballots, weights = np.array([1.0, 0.7, 0.4]), np.array([0.5, 1.0, 2.0])
    out, expected = np.empty(size, np.uint16), np.empty(size, np.float32)
    rule = ballot.election(ballots, weights, divide, 0.7)
    assert lottery.drop_and_elect(bits, 3, position, keys, densities, factors, rule, out)
    merge = elect.MEAN if divide else elect.SUM
    work = np.empty((3, elect.CHUNK), np.float32)
    elect.elect_and_merge(rows, ballots, weights, 0, 1, merge, values[3], 0.7, work, expected)
    rounded = expected.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(out, rounded)
