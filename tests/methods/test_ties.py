"""TIES: what is trimmed, who elects the sign, and what is merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit import merge_state_dicts
from fusekit.methods.sce import energy_weights

Array = np.ndarray[Any, np.dtype[Any]]


def ties(deltas: Sequence[Any], weights: Sequence[float] = (), **options: Any) -> Array:
    """The merged task vector of task vectors, all kept unless a density is given."""
    models = [{"w": np.asarray(delta, np.float64)} for delta in deltas]
    each = [{"weight": weight} for weight in weights or [1.0] * len(models)]
    parameters = options if "mask_rate" in options else {"density": 1.0, **options}
    merged: Array = merge_state_dicts(
        models,
        method="ties",
        base={"w": np.zeros_like(models[0]["w"])},
        parameters=parameters,
        model_parameters=each,
    )["w"]
    return merged


# -- trimming -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "kept"), [(0.04, 1), (0.2, 2), (0.35, 3), (0.9, 9)])
def test_exactly_the_density_is_kept_but_at_least_one_entry(density: float, kept: int) -> None:
    delta = np.array([3.0, -1, 10, 2, -9, 5, 8, -7, 4, 6])
    cut = np.sort(np.abs(delta))[-kept]
    expected = np.where(np.abs(delta) >= cut, delta, 0)
    np.testing.assert_array_equal(ties([delta], density=density), expected)


@pytest.mark.parametrize(("density", "kept"), [(0.04, 1), (0.2, 3), (0.35, 4), (0.95, 10)])
def test_a_threshold_keeps_the_entry_at_the_cut_too(density: float, kept: int) -> None:
    delta = np.array([3.0, -1, 10, 2, -9, 5, 8, -7, 4, 6])
    out = ties([delta], density=density, rule="threshold")
    assert np.count_nonzero(out) == kept


def test_among_equal_magnitudes_the_first_are_kept_or_all() -> None:
    delta = np.array([1.0, -2, 2, -1, 2, 2])
    np.testing.assert_array_equal(ties([delta], density=0.5), [0, -2, 2, 0, 2, 0])
    np.testing.assert_array_equal(ties([delta], density=0.5, rule="threshold"), [0, -2, 2, 0, 2, 2])
    np.testing.assert_array_equal(ties([delta], mask_rate=0.2), delta)


def test_models_are_trimmed_each_to_its_own_density() -> None:
    delta = np.arange(1.0, 11)
    model = {"w": delta}
    each = [{"density": 0.1}, {"density": 0.5}]
    merged = merge_state_dicts(
        [model, model], method="ties", base={"w": 0 * delta}, model_parameters=each,
        parameters={"merge": "sum"},
    )  # fmt: skip
    np.testing.assert_array_equal(merged["w"], [0] * 5 + [6, 7, 8, 9, 20])


def test_l1_rescaling_gives_back_the_sum_of_magnitudes_where_there_is_one() -> None:
    delta = np.array([4.0, -3, 2, -1])
    np.testing.assert_allclose(ties([delta], density=0.5, rescale="l1"), [40 / 7, -30 / 7, 0, 0])
    tiny = 1e-9 * delta
    np.testing.assert_allclose(ties([tiny], density=0.5, rescale="l1"), [4e-9, -3e-9, 0, 0])


# -- election and merge ---------------------------------------------------------------------------

DELTAS = np.array([[3.0, 1, 2, -1, 0, 4], [-1.0, 2, -2, -4, 0, 4], [-1.0, -4, 0, 6, 5, -8]])
# column sums:      1,    -1, 0,  1, 5, 0


def test_entries_of_the_elected_sign_are_averaged() -> None:
    np.testing.assert_array_equal(ties(DELTAS), [3, -4, 2, 6, 5, 4])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"merge": "sum"}, [3, -4, 2, 6, 5, 8]),
        ({"normalize": False}, [3, -4, 2, 6, 5, 8]),
        ({"normalize": False, "merge": "mean"}, [3, -4, 2, 6, 5, 4]),
        ({"merge": "max"}, [3, -4, 2, 6, 5, 4]),
        ({"election": "count", "merge": "sum"}, [-2, 3, 2, -5, 5, 8]),
        ({"election": "count", "merge": "max"}, [-1, 2, 2, -4, 5, 4]),
        ({"lambda": -0.5}, [-1.5, 2, -1, -3, -2.5, -2]),
    ],
)
def test_choices(options: dict[str, Any], expected: list[float]) -> None:
    np.testing.assert_array_equal(ties(DELTAS, **options), expected)


@pytest.mark.parametrize(
    ("others", "cancelled"), [([1.0, 1, -1], 2.0), ([1.0, -1, -1], -2.0), ([1.0, -1, 0], 0.0)]
)
def test_where_votes_cancel_the_majority_decides(others: list[float], cancelled: float) -> None:
    deltas = np.array([[2.0, *others], [-2.0, *others]])
    assert ties(deltas, zero="majority")[0] == cancelled
    assert ties(deltas, zero="positive")[0] == 2.0


def test_weights_take_part_in_the_election_unless_told_otherwise() -> None:
    deltas, weights = [[1.0], [-2.0]], [3.0, 1.0]
    assert ties(deltas, weights) == [1.0]
    assert ties(deltas, weights, weights_in_election=False) == [-2.0]


def test_a_weighted_mean_divides_by_the_weights_that_were_kept() -> None:
    deltas, weights = [[1.0, 1], [4.0, -4], [2.0, 2]], [1.0, 0.5, 2.0]
    np.testing.assert_allclose(ties(deltas, weights), [7 / 3.5, 5 / 3])
    np.testing.assert_allclose(ties(deltas, weights, normalize=False), [7, 5])


@pytest.mark.parametrize("election", ["normmass", "normfrac"])
def test_shares_of_the_squared_norm_elect_whatever_the_size_of_a_model(election: str) -> None:
    small, large = [0.3, 0.1, 0.1], [-1.0, -10.0, 10.0]
    np.testing.assert_allclose(ties([small, large], election=election), [0.3, -10, 5.05])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.floats(0.05, 1.0))
def test_every_entry_lies_among_those_of_its_sign(seed: int, n: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    deltas = rng.standard_normal((n, 40))
    out = ties(deltas, density=density)
    assert (out <= np.maximum(deltas.max(axis=0), 0) + 1e-12).all()
    assert (out >= np.minimum(deltas.min(axis=0), 0) - 1e-12).all()
    again = ties(deltas[rng.permutation(n)], density=density)
    np.testing.assert_allclose(again, out, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(ties(3 * deltas, density=density), 3 * out, rtol=1e-12)
    identical, alone = ties([deltas[0]] * n, density=density), ties(deltas[:1], density=density)
    np.testing.assert_allclose(identical, alone, rtol=1e-12)


def test_sce_weighs_equally_below_a_mean_square() -> None:
    assert energy_weights([3.0, 1.0], 100, 0.05) == (0.5, 0.5)
    assert energy_weights([3.0, 1.0], 100, 0.03) == (0.75, 0.25)
