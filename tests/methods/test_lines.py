"""Scaling a merge by depth: parity, its closed form, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit import merge_state_dicts
from fusekit.errors import RecipeError
from fusekit.methods.lines import Schedule, scale_layers
from fusekit.methods.registry import available
from tests.vectors import Case, assert_close, read_case

State = dict[str, np.ndarray]


def merged(case: Case, method: str, beta: float, alpha: Any = "auto", **options: Any) -> State:
    return merge_state_dicts(
        case.models,
        method=method,
        base=case.base,
        parameters=options,
        granularity="model",
        layer_scaling={"method": "lines", "alpha": alpha, "beta": beta},
    )


def test_scales_a_single_task_vector() -> None:
    case = read_case("lines", "case0")
    result = merged(case, "task_arithmetic", case.about["beta"], case.about["alpha"])
    assert_close(result, case.merged, 1e-6)


def test_scales_a_sum_by_the_computed_alpha() -> None:
    case = read_case("lines", "case1")
    assert_close(merged(case, "task_arithmetic", case.about["beta"]), case.merged, 1e-6)


def test_scales_ties_by_the_computed_alpha() -> None:
    case = read_case("lines", "case2")
    options = {"density": 0.2, "rule": "threshold", "zero": "majority"}
    assert_close(merged(case, "ties", case.about["beta"], **options), case.merged, 1e-6)


def state(rng: np.random.Generator, blocks: int = 4) -> State:
    names = ["embed.weight", *(f"layers.{i}.w" for i in range(blocks)), "norm", "head"]
    return {name: rng.normal(size=(5, 6)) for name in names}


def setting(seed: int, count: int = 2) -> tuple[list[State], State]:
    rng = np.random.default_rng(seed)
    base = state(rng)
    models = [
        {k: v + 0.1 * rng.normal(size=v.shape) for k, v in base.items()} for _ in range(count)
    ]
    return models, base


def scales(
    models: list[State], base: State, scaling: dict[str, Any], method: str = "task_arithmetic"
) -> dict[str, float]:
    """The factor by which every tensor's update was scaled."""
    plain = merge_state_dicts(models, method=method, base=base)
    scaled = merge_state_dicts(models, method=method, base=base, layer_scaling=scaling)
    found = {}
    for name in base:
        ratio = (scaled[name] - base[name]) / (plain[name] - base[name])
        np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-6)
        found[name] = round(float(ratio.flat[0]), 6)
    return found


def test_scale_grows_linearly_with_depth() -> None:
    found = scales(*setting(0), {"alpha": 0.25, "beta": 0.75})
    assert [found[f"layers.{i}.w"] for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert found["embed.weight"] == found["norm"] == found["head"] == 0.25


def test_tensors_outside_blocks_can_follow_the_last_block() -> None:
    outside: Any = [{"filter": "embed", "value": "alpha"}, {"filter": "norm", "value": 0.7}]
    found = scales(
        *setting(0), {"alpha": 0.2, "beta": 0.3, "outside": [*outside, {"value": "last"}]}
    )
    assert (found["embed.weight"], found["norm"], found["head"]) == (0.2, 0.7, 0.5)
    found = scales(*setting(0), {"alpha": 0.2, "beta": 0.3, "outside": "last"})
    assert found["embed.weight"] == found["head"] == 0.5


def encoder_decoder() -> tuple[list[State], State]:
    rng = np.random.default_rng(1)
    names = [f"{side}.block.{i}.w" for side in ("decoder", "encoder") for i in range(3)]
    base = {name: rng.normal(size=(3, 3)) for name in names}
    return [{k: v + rng.normal(size=v.shape) for k, v in base.items()}], base


def test_stacks_count_on_their_own_or_one_after_the_other() -> None:
    found = scales(*encoder_decoder(), {"alpha": 0.5, "beta": 0.5})
    assert [found[f"{side}.block.0.w"] for side in ("encoder", "decoder")] == [0.5, 0.5]
    found = scales(*encoder_decoder(), {"alpha": 0.5, "beta": 0.5, "stacks": "concatenate"})
    order = [found[f"{side}.block.{i}.w"] for side in ("encoder", "decoder") for i in range(3)]
    assert order == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    found = scales(*encoder_decoder(), {"alpha": 0.5, "beta": 0.5, "stack": "decoder"})
    assert found["encoder.block.2.w"] == 0.5
    assert found["decoder.block.2.w"] == 1.0


@given(st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_alpha_of_a_sum_is_one_over_the_number_of_models(seed: int, count: int) -> None:
    models, base = setting(seed, count)
    found = scales(models, base, {"beta": 0.0})
    assert set(found.values()) == {round(1 / count, 6)}


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_alpha_is_the_ratio_of_whole_model_norms(norm: str) -> None:
    models, base = setting(3, 3)
    plain = merge_state_dicts(models, method="ties", base=base)
    power = {"l1": 1, "l2": 2}[norm]

    def size(update: State) -> float:
        return sum((np.abs(values) ** power).sum() for values in update.values()) ** (1 / power)

    summed = {name: sum(m[name] - base[name] for m in models) for name in base}
    merged = {name: plain[name] - base[name] for name in base}
    scaled = merge_state_dicts(
        models, method="ties", base=base, layer_scaling={"beta": 0.0, "norm": norm}
    )
    expected = size(summed) / size(merged) / 3
    for name in base:
        update = base[name] + expected * merged[name]
        np.testing.assert_allclose(scaled[name], update, atol=1e-9)


def test_alpha_of_a_merge_that_changes_nothing_is_harmless() -> None:
    base = state(np.random.default_rng(4))
    models = [{name: values.copy() for name, values in base.items()}]
    result = merge_state_dicts(
        models, method="task_arithmetic", base=base, layer_scaling={"beta": 1.0}
    )
    assert_close(result, base, 1e-15)


def test_neutral_schedules_return_the_merge_and_the_base() -> None:
    models, base = setting(5)
    plain = merge_state_dicts(models, method="ties", base=base)
    one = merge_state_dicts(models, method="ties", base=base, layer_scaling={"alpha": 1, "beta": 0})
    zero = merge_state_dicts(
        models, method="ties", base=base, layer_scaling={"alpha": 0, "beta": 0}
    )
    assert_close(one, plain, 0.0)
    assert_close(zero, base, 0.0)


SCALABLE = [
    pytest.param(method.name, alpha, marks=[] if method.matrix is None else [pytest.mark.torch])
    for method in available().values()
    if method.base == "origin" and not method.continual
    for alpha in ([0.3, "auto"] if method.matrix is None else [0.3])
]


@pytest.mark.parametrize(("method", "alpha"), SCALABLE)
def test_every_method_with_a_base_can_be_scaled(method: str, alpha: Any) -> None:
    about = available()[method]
    if about.matrix is not None:
        pytest.importorskip("torch")
    models, base = setting(6, about.max_models or max(2, about.min_models))
    required = {p.name: 0.5 for p in about.parameters if p.required}
    options: dict[str, Any] = {"method": method, "base": base, "parameters": required}
    plain = merge_state_dicts(models, **options)
    scaled = merge_state_dicts(models, layer_scaling={"alpha": alpha, "beta": 0.5}, **options)
    name = "layers.3.w"
    update, before = scaled[name] - base[name], plain[name] - base[name]
    used = np.abs(before) > 1e-6
    ratio = update[used] / before[used]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    np.testing.assert_allclose(scaled["layers.0.w"] - base["layers.0.w"],
        (ratio[0] - 0.5) * (plain["layers.0.w"] - base["layers.0.w"]), atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_threads_do_not_change_the_measured_alpha(method: str) -> None:
    rng = np.random.default_rng(7)
    base = {f"layers.{i}.w": rng.normal(size=120_001).astype("f4") for i in range(3)}
    models = [{k: v + rng.normal(size=v.shape).astype("f4") for k, v in base.items()} for _ in "ab"]
    one, four = (
        merge_state_dicts(
            models, method=method, base=base, layer_scaling={"beta": 0.3}, threads=threads
        )
        for threads in (1, 4)
    )
    for name in base:
        np.testing.assert_array_equal(one[name], four[name])


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"alpha": "automatic", "beta": 1}, r"layer_scaling\.alpha: .*a number or 'auto'"),
        ({"alpha": 1}, r"layer_scaling\.beta is missing"),
        ({"beta": 1, "betta": 1}, r"unknown key 'layer_scaling\.betta' \(did you mean 'beta'"),
        ({"beta": 1, "outside": "first"}, r"outside.*: .*a number or 'alpha' or 'last'"),
        ({"beta": 1, "stack": "decoder"}, r"stack: no stack of blocks contains 'decoder'"),
        ({"beta": 1, "norm": "max"}, r"layer_scaling\.norm: found 'max', expected 'l1' or 'l2'"),
    ],
)
def test_refuses_what_it_cannot_do(scaling: dict[str, Any], message: str) -> None:
    models, base = setting(8)
    with pytest.raises(RecipeError, match=message):
        merge_state_dicts(models, method="task_arithmetic", base=base, layer_scaling=scaling)


def test_refuses_models_without_blocks() -> None:
    with pytest.raises(RecipeError, match="no tensor is in a numbered block"):
        merge_state_dicts(
            [{"w": np.ones(3)}],
            method="task_arithmetic",
            base={"w": np.zeros(3)},
            layer_scaling={"beta": 1.0},
        )


def test_refuses_a_method_without_a_base() -> None:
    models, _ = setting(9)
    with pytest.raises(RecipeError, match="linear has none here"):
        merge_state_dicts(
            models, method="linear", parameters={"weight": 1.0}, layer_scaling={"beta": 1.0}
        )


def test_refuses_to_measure_alpha_of_a_method_on_whole_matrices() -> None:
    models, base = setting(10)
    with pytest.raises(RecipeError, match="tsv merges whole matrices; give a number"):
        merge_state_dicts(models, method="tsv", base=base, layer_scaling={"beta": 1.0})


def test_refuses_a_method_that_goes_on_from_an_earlier_output() -> None:
    with pytest.raises(RecipeError, match="opcm sets the size of the merged update itself"):
        scale_layers(available()["opcm"], Schedule(0.3, "l1", {}))
