"""Uniform soups and interpolation of models that do not share every tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit import merge_state_dicts
from fusekit.errors import CheckpointError, RecipeError
from tests.vectors import assert_close, read_case

State = dict[str, np.ndarray]


def unival(models: list[State], weights: list[float] | None = None, **options: Any) -> State:
    each = None if weights is None else [{"weight": weight} for weight in weights]
    return merge_state_dicts(models, method="unival", model_parameters=each, parameters=options)


def test_uniform_soup_is_the_authors_mean() -> None:
    case = read_case("model-soups", "case0")
    soup = merge_state_dicts(case.models, method="model_soups")
    assert_close(soup, case.group("out/uniform"), 1e-7, 1e-5)


@given(st.integers(0, 1000), st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_a_soup_is_the_mean_in_any_order(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    models = [{"w": rng.normal(size=(3, 5))} for _ in range(count)]
    mean = np.mean([model["w"] for model in models], axis=0)
    for order in (models, models[::-1]):
        soup = merge_state_dicts(order, method="model_soups")["w"]
        np.testing.assert_allclose(soup, mean, atol=1e-12)


def test_integer_buffers_are_the_first_models() -> None:
    models = [{"w": np.ones(2), "steps": np.array([i])} for i in (5, 7)]
    for method in ("model_soups", "unival"):
        assert merge_state_dicts(models, method=method)["steps"] == 5
    with pytest.raises(CheckpointError, match="must be equal in all models"):
        merge_state_dicts(models, method="linear", parameters={"weight": 1.0})


def test_refuses_weights_that_cancel() -> None:
    with pytest.raises(RecipeError, match="sum to 0 and cannot be normalised"):
        merge_state_dicts(
            [{"w": np.ones(2)}] * 2,
            method="model_soups",
            model_parameters=[{"weight": 1.0}, {"weight": -1.0}],
        )


@pytest.mark.parametrize("name", ["case0", "case2"])
def test_averages_with_missing_skipped_and_misshapen_tensors(name: str) -> None:
    case = read_case("unival", name)
    skip = case.about["skip_keys"]
    options = {"skip_keys": "|".join(skip)} if skip else {}
    merged = unival(case.models, case.about["lambdas"], **options)
    assert_close(merged, case.group("out"), 1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_interpolates_between_two_models(weight: float) -> None:
    case = read_case("unival", "case1")
    merged = unival(case.models, [weight, 1 - weight])
    assert_close(merged, case.group(f"out/lambda_{weight:.2f}"), 1e-6)


def test_the_ends_of_an_interpolation_are_the_models() -> None:
    one, two = {"w": np.array([0.1, 0.2])}, {"w": np.array([0.3, 0.7])}
    assert_close(unival([one, two], [1.0, 0.0]), one, 0.0)
    assert_close(unival([one, two], [0.0, 1.0]), two, 0.0)
    assert_close(unival([one]), one, 0.0)


def test_tensors_only_later_models_have_are_left_out() -> None:
    with pytest.warns(UserWarning, match=r"left out, such as 'audio\.w'"):
        merged = unival([{"w": np.ones(2)}, {"w": np.ones(2), "audio.w": np.ones(3)}])
    assert list(merged) == ["w"]


def test_a_tensor_kept_from_the_first_model_takes_the_output_dtype() -> None:
    models = [{"w": np.ones(2, "f4"), "v": np.full(3, 0.1, "f4")}, {"w": np.ones(2, "f4")}]
    merged = merge_state_dicts(models, method="unival", out_dtype="float16")
    assert merged["v"].dtype == np.float16
    np.testing.assert_array_equal(merged["v"], np.full(3, 0.1, "f2"))


def test_refuses_a_broken_pattern() -> None:
    with pytest.raises(RecipeError, match="skip_keys: found '\\[', expected a regular expression"):
        unival([{"w": np.ones(2)}] * 2, skip_keys="[")
