"""State dicts that are none, and what is said of the values of those that are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fusekit
from fusekit import FusekitError

MODELS = [{"w": np.ones(3, np.float32)}, {"w": np.full(3, 3.0, np.float32)}]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "one state dict": ({"models": MODELS[0]}, "models: found dict, expected a list of state dicts"),
    "nothing": ({"models": None}, "models: found NoneType, expected a list of state dicts"),
    "a path": ({"models": [MODELS[0], "m"]}, "models[1]: found str, expected a mapping by name"),
    "no model": ({"models": [MODELS[0], None]}, "models[1]: found NoneType, expected a mapping"),
    "a number as name": (
        {"models": [MODELS[0], {3: MODELS[0]["w"]}]},
        "models[1]: found the name 3, expected a text",
    ),
    "base a list": ({"base": MODELS}, "base: found list, expected a mapping by name"),
    "parameters a list": ({"parameters": [1.0]}, "parameters: found list, expected a mapping"),
    "parameters of models a mapping": (
        {"model_parameters": {"weight": 1.0}},
        "model_parameters[0]: found str, expected a mapping by name",
    ),
    "too few parameters": (
        {"model_parameters": [{}]},
        "model_parameters: found 1 mappings, expected one for each of the 2 models",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_no_state_dict_is_refused_in_one_sentence(
    change: dict[str, Any], message: str
) -> None:
    arguments = {"models": MODELS, "method": "linear", "parameters": {"weight": 1.0}, **change}
    with pytest.raises(FusekitError) as caught:
        fusekit.merge_state_dicts(**arguments)
    assert str(caught.value).startswith(message)


def test_models_may_come_from_an_iterator_and_some_without_parameters() -> None:
    merged = fusekit.merge_state_dicts(
        iter(MODELS),  # type: ignore[arg-type]
        method="linear",
        parameters={"weight": np.float32(1.0)},
        model_parameters=[None, {"weight": 3}],
    )
    np.testing.assert_array_equal(merged["w"], np.full(3, 2.5, np.float32))


def test_values_beyond_the_range_of_the_result_are_warned_of() -> None:
    large = [{"w": np.array([1.0, 1e6], np.float32)}]
    with pytest.warns(UserWarning, match="tensor 'w': 1 merged values are beyond the range"):
        merged = fusekit.merge_state_dicts(
            large, method="linear", parameters={"weight": 1.0}, out_dtype="float16"
        )
    np.testing.assert_array_equal(merged["w"], np.array([1.0, np.inf], np.float16))


def test_nan_that_is_let_through_is_warned_of() -> None:
    broken = {"w": np.array([np.nan, 1.0, 1.0], np.float32)}
    with pytest.warns(UserWarning, match="model 1: tensor 'w' has 1 NaN or infinite values"):
        fusekit.merge_state_dicts(
            [MODELS[0], broken], method="linear", parameters={"weight": 1.0}, allow_nonfinite=True
        )
