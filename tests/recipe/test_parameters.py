"""Values of parameters per tensor: gradients, filters, levels, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fusekit import RecipeError, merge_state_dicts
from fusekit.checkpoint.memory import MemorySource
from fusekit.engine.plan import Plan
from fusekit.methods import find
from fusekit.recipe.parameters import gradient, read_level
from tests.engine.support import Array, plan_of

VECTORS = Path(__file__).parent.parent / "vectors/merge-recipe-yaml.json"


def state_dict(layers: int) -> dict[str, Array]:
    names = ["embed.w", *(f"h.{i}.{part}.w" for i in range(layers) for part in "ab"), "head.w"]
    return {name: np.ones(2, np.float32) for name in names}


def planned(layers: int, method: str = "linear", base: bool = False, **recipe: Any) -> Plan:
    source = MemorySource(state_dict(layers))
    return plan_of([source, source], method, source if base else None, **recipe)


def weights(layers: int, weight: Any, **recipe: Any) -> dict[str, list[float]]:
    """Tensor name -> the weight of every model."""
    parameters = {"weight": weight, "normalize": False, **recipe.pop("parameters", {})}
    plan = planned(layers, parameters=parameters, **recipe)
    return {p.name: p.tensor.each("weight") for p in plan.tensors}


# -- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "position", "expected"),
    [
        ([3.0], 0.0, 3.0),
        ([3.0], 1.0, 3.0),
        ([1.0, 2.0], 0.25, 1.25),
        ([0.0, 0.5, 0.3, 0.7, 1.0], 0.5, 0.3),
        ([0.0, 0.5, 0.3, 0.7, 1.0], 0.2, 0.4),
        ([0.0, 0.5, 0.3, 0.7, 1.0], 1.0, 1.0),
        ([1.0, 0.0, 1.0], 1 / 3, 1 / 3),
    ],
)
def test_gradients_interpolate_evenly_spaced_values(
    values: list[float], position: float, expected: float
) -> None:
    assert gradient(values, position) == pytest.approx(expected)


def test_a_gradient_runs_over_the_layers_and_starts_outside_them() -> None:
    found = weights(5, [0.0, 0.5, 0.3, 0.7, 1.0])
    for i, value in enumerate([0.0, 0.5, 0.3, 0.7, 1.0]):
        assert found[f"h.{i}.a.w"] == pytest.approx([value, value])
    assert found["embed.w"] == found["head.w"] == [0.0, 0.0]


def test_the_middle_of_three_layers_gets_the_middle_of_five_values() -> None:
    found = weights(3, [0, 0.5, 0.3, 0.7, 1])
    assert found["h.1.a.w"] == pytest.approx([0.3, 0.3])
    assert found["head.w"] == [0.0, 0.0]


def test_a_single_layer_gets_the_last_value() -> None:
    assert weights(1, [0.0, 0.25, 1.0])["h.0.a.w"] == [1.0, 1.0]


def test_a_gradient_of_one_value_is_that_value_everywhere() -> None:
    assert set(map(tuple, weights(4, [0.5]).values())) == {(0.5, 0.5)}


# -- filters and levels ---------------------------------------------------------------------------


def test_the_first_filter_that_is_part_of_the_name_applies() -> None:
    setting = [
        {"filter": ".a.", "value": 0.1},
        {"filter": "h.1", "value": 0.2},
        {"filter": "h", "value": 0.3},
        {"value": 0.4},
        {"filter": "embed", "value": 0.9},
    ]
    found = weights(2, setting)
    assert found["h.0.a.w"] == [0.1, 0.1]
    assert found["h.1.a.w"] == [0.1, 0.1]
    assert found["h.1.b.w"] == [0.2, 0.2]
    assert found["h.0.b.w"] == [0.3, 0.3]
    assert found["head.w"] == [0.3, 0.3]
    assert found["embed.w"] == [0.4, 0.4]


@pytest.mark.parametrize("pattern", ["*", None])
def test_a_star_or_no_filter_applies_to_everything(pattern: str | None) -> None:
    entry = {"value": 0.7} if pattern is None else {"filter": pattern, "value": 0.7}
    assert set(map(tuple, weights(2, [entry]).values())) == {(0.7, 0.7)}


def test_a_filter_may_hold_a_gradient() -> None:
    found = weights(3, [{"filter": ".a.", "value": [0.0, 1.0]}, {"value": 5.0}])
    assert [found[f"h.{i}.a.w"][0] for i in range(3)] == [0.0, 0.5, 1.0]
    assert found["h.1.b.w"] == found["embed.w"] == [5.0, 5.0]


def test_a_models_own_value_comes_before_the_global_one() -> None:
    found = weights(2, 0.5, model_parameters=[{"weight": 2.0}, {}])
    assert set(map(tuple, found.values())) == {(2.0, 0.5)}


def test_where_no_filter_applies_the_next_level_is_asked_then_the_default() -> None:
    own = [{"density": [{"filter": ".a.", "value": 0.9}]}, {}]
    top = {"density": [{"filter": "h.", "value": 0.6}]}
    plan = planned(2, "ties", base=True, parameters=top, model_parameters=own)
    found = {p.name: p.tensor.each("density") for p in plan.tensors}
    default = find("ties").parameter("density")
    assert default is not None
    assert found["h.0.a.w"] == [0.9, 0.6]
    assert found["h.0.b.w"] == [0.6, 0.6]
    assert found["embed.w"] == [default.default] * 2


def test_global_parameters_follow_filters_too() -> None:
    top = {"lambda": [{"filter": "h.0", "value": 0.5}, {"filter": "h.1", "value": 2}]}
    plan = planned(2, "task_arithmetic", base=True, parameters=top)
    found = {p.name: p.tensor["lambda"] for p in plan.tensors}
    assert (found["h.0.a.w"], found["h.1.b.w"], found["head.w"]) == (0.5, 2.0, 1.0)


def test_a_required_parameter_that_nothing_gives_is_named() -> None:
    with pytest.raises(RecipeError) as caught:
        planned(2, parameters={"weight": [{"filter": "h.", "value": 1.0}]})
    message = str(caught.value)
    assert message.startswith("models[0] (model 0): linear needs the parameter 'weight'")
    assert "'embed.w'" in message


@pytest.mark.parametrize("case", ["global_filters_gradient"])
def test_lookups_equal_those_of_the_reference(case: str) -> None:
    about = json.loads(VECTORS.read_text())["cases"][case]
    recipe = yaml.safe_load(about["yaml"])
    source = MemorySource({tensor["out"]: np.ones(1, np.float32) for tensor in about["tensors"]})
    plan = plan_of([source, source], recipe["merge_method"], parameters=recipe["parameters"])
    found = {p.name: p.tensor.parameters for p in plan.tensors}
    for tensor in about["tensors"]:
        assert found[tensor["out"]] == pytest.approx(tensor["params"]), tensor["out"]
    assert len({tuple(values.values()) for values in found.values()}) > 5


# -- what is refused ------------------------------------------------------------------------------


def refused(method: str, **parameters: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        read_level(parameters, find(method), "parameters")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("method", "name", "nearest"),
    [
        ("ties", "densty", "density"),
        ("linear", "wieght", "weight"),
        ("dare_ties", "lamda", "lambda"),
    ],
)
def test_a_misspelt_parameter_names_the_nearest(method: str, name: str, nearest: str) -> None:
    assert refused(method, **{name: 1}) == (
        f"parameters.{name}: {method} has no parameter {name!r} (did you mean {nearest!r}?)"
    )


def test_a_parameter_of_another_method_lists_the_known_ones() -> None:
    assert "(known: normalize, weight)" in refused("linear", zzzzzzzz=0.5)


@pytest.mark.parametrize(
    ("value", "found", "expected"),
    [
        (float("nan"), "nan", "a number"),
        (float("inf"), "inf", "a number"),
        (float("-inf"), "-inf", "a number"),
        (True, "True", "a number"),
        ("1", "'1'", "a number"),
        (None, "None", "a number"),
        ([], "[]", "a number"),
        ({"value": 1}, "{'value': 1}", "a number or a list of {filter, value}"),
    ],
)
def test_what_is_no_number(value: Any, found: str, expected: str) -> None:
    assert (
        refused("linear", weight=value) == f"parameters.weight: found {found}, expected {expected}"
    )


def test_a_number_beyond_float64() -> None:
    assert refused("linear", weight=10**400).endswith("expected a number")


@pytest.mark.parametrize(
    ("method", "name", "value", "expected"),
    [
        ("ties", "density", 0, "a number in (0, 1]"),
        ("ties", "density", 1.5, "a number in (0, 1]"),
        ("dare_linear", "density", -0.1, "a number in [0, 1]"),
        ("karcher", "weight", -1, "a number in [0, inf)"),
        ("karcher", "max_iter", 1.5, "an integer in [0, inf)"),
        ("karcher", "max_iter", float("inf"), "an integer in [0, inf)"),
        ("karcher", "max_iter", [1, 2], "an integer in [0, inf)"),
        ("linear", "normalize", 2, "true or false"),
        ("linear", "normalize", "yes", "true or false"),
        ("linear", "normalize", [True, False], "true or false"),
        ("ties", "zero", "zero", "'positive' or 'majority'"),
        ("ties", "merge", "median", "'mean' or 'sum' or 'max'"),
    ],
)
def test_values_out_of_range(method: str, name: str, value: Any, expected: str) -> None:
    message = refused(method, **{name: value})
    assert message == f"parameters.{name}: found {value!r}, expected {expected}"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ([1, "a"], "parameters.weight[1]: found 'a', expected a number"),
        ([[1]], "parameters.weight[0]: found [1], expected a number"),
        (
            [{"filter": "x"}],
            "parameters.weight[0]: found {'filter': 'x'}, expected {filter, value}",
        ),
        ([{"value": 1}, 2], "parameters.weight[1]: found 2, expected {filter, value}"),
        (
            [{"value": 1, "filtr": "x"}],
            "parameters.weight[0]: unknown key 'filtr' (did you mean 'filter'?)",
        ),
        (
            [{"filter": 3, "value": 1}],
            "parameters.weight[0].filter: found 3, expected a text",
        ),
        (
            [{"filter": "x", "value": "heavy"}],
            "parameters.weight[0].value: found 'heavy', expected a number",
        ),
        (
            [{"filter": "x", "value": [1, None]}],
            "parameters.weight[0].value[1]: found None, expected a number",
        ),
    ],
)
def test_malformed_gradients_and_filters(setting: Any, message: str) -> None:
    assert refused("linear", weight=setting) == message


def test_the_place_names_the_model() -> None:
    with pytest.raises(RecipeError, match=r"^models\[1\]\.parameters\.weight: found 'x'"):
        planned(1, model_parameters=[{"weight": 1}, {"weight": "x"}])


def test_aliases_are_accepted() -> None:
    spellings = [(True, "l1"), (False, "none"), (1.0, "l1"), (0, "none"), ("inverse", "inverse")]
    for spelling, meaning in spellings:
        level = read_level({"rescale": spelling}, find("dare_linear"), "parameters")
        assert level["rescale"].value("w", 0.0) == (True, meaning)


# -- models and bases -----------------------------------------------------------------------------


def merged(method: str, models: int, base: bool, **parameters: Any) -> dict[str, Array]:
    arrays = [{"w": np.full(3, float(i), np.float32)} for i in range(models + 1)]
    result: dict[str, Array] = merge_state_dicts(
        arrays[1:], method=method, base=arrays[0] if base else None, parameters=parameters
    )
    return result


FOR_MORE = "; for more see multislerp and karcher"


@pytest.mark.parametrize(
    ("method", "models", "base", "message"),
    [
        ("linear", 2, True, "base: linear has none; leave it out, or list it among the models"),
        ("ties", 2, False, "base_model is missing: ties merges differences from it"),
        ("slerp", 3, False, f"models: slerp merges 1 to 2 model(s), found 3{FOR_MORE}"),
        ("slerp", 2, True, f"models: slerp merges 1 to 2 model(s), found 3{FOR_MORE}"),
        (
            "nuslerp",
            3,
            True,
            f"models: nuslerp merges 1 to 2 model(s) besides its base, found 3{FOR_MORE}",
        ),
        ("passthrough", 2, False, "models: passthrough merges 1 model(s), found 2"),
        ("tise", 2, False, "unknown merge_method 'tise' (did you mean 'ties'?)"),
    ],
)
def test_wrong_numbers_of_models_and_bases(
    method: str, models: int, base: bool, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        merged(method, models, base)
    assert str(caught.value) == message


def test_slerp_starts_at_its_base() -> None:
    np.testing.assert_array_equal(merged("slerp", 1, True, t=0.0)["w"], [0.0, 0.0, 0.0])
    np.testing.assert_array_equal(merged("slerp", 1, True, t=1.0)["w"], [1.0, 1.0, 1.0])
