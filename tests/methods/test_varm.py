"""Variation ratio merging against the authors' results and its own properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fusekit import merge_state_dicts
from fusekit.errors import RecipeError
from tests.vectors import assert_close, read_case

State = dict[str, np.ndarray]


def varm(models: list[State], base: State, granularity: Any = "tensor", **options: Any) -> State:
    return merge_state_dicts(
        models, method="varm", base=base, parameters=options, granularity=granularity
    )


@pytest.fixture
def models() -> tuple[list[State], State]:
    rng = np.random.default_rng(0)
    shapes = {"layers.0.mlp.up": (4, 3), "layers.0.mlp.down": (3, 4), "layers.0.norm": (3,)}
    base = {name: rng.normal(size=shape) for name, shape in [*shapes.items(), ("head", (2, 3))]}
    changed = [
        {name: v + s * rng.normal(size=v.shape) for name, v in base.items()} for s in (0.1, 0.3)
    ]
    return changed, base


@pytest.mark.parametrize(
    ("granularity", "group"),
    [("tensor", "param"), ("module", "module"), ("layer", "layer"), ("model", "model")],
)
def test_merges_as_the_authors_program(granularity: str, group: str) -> None:
    case = read_case("fusechat", "case3")
    merged = varm(case.models, case.base, granularity)
    assert_close(merged, case.group(f"out/{group}"), 1e-5)


def weight_of_second(merged: State, models: list[State], name: str) -> float:
    one, two = (model[name] for model in models)
    shares = (merged[name] - one) / (two - one)
    np.testing.assert_allclose(shares, shares.flat[0], rtol=1e-6)
    return float(shares.flat[0])


@pytest.mark.parametrize("measure", ["square", "abs", "signed"])
def test_modules_add_up_the_means_of_their_tensors(
    models: tuple[list[State], State], measure: str
) -> None:
    changed, base = models
    size = {
        "square": lambda d: (d**2).mean(),
        "abs": lambda d: np.abs(d).mean(),
        "signed": lambda d: abs(d.mean()),
    }[measure]
    degrees = [
        sum(size(m[name] - base[name]) for name in ("layers.0.mlp.up", "layers.0.mlp.down"))
        for m in changed
    ]
    merged = varm(changed, base, "module", measure=measure)
    expected = degrees[1] / sum(degrees)
    for name in ("layers.0.mlp.up", "layers.0.mlp.down"):
        assert weight_of_second(merged, changed, name) == pytest.approx(expected)
    assert weight_of_second(merged, changed, "layers.0.norm") != pytest.approx(expected)


def test_temperature_turns_shares_into_a_softmax(models: tuple[list[State], State]) -> None:
    changed, base = models
    degrees = [((m["head"] - base["head"]) ** 2).mean() for m in changed]
    expected = 1 / (1 + np.exp((degrees[0] - degrees[1]) / 0.05))
    merged = varm(changed, base, temperature=0.05)
    assert weight_of_second(merged, changed, "head") == pytest.approx(expected)


def test_weights_follow_the_square_of_an_updates_scale(models: tuple[list[State], State]) -> None:
    (model, _), base = models
    triple = {name: base[name] + 3 * (model[name] - base[name]) for name in base}
    merged = varm([model, triple], base)
    for name in base:
        assert weight_of_second(merged, [model, triple], name) == pytest.approx(0.9)


def test_outside_the_layers_a_layer_merge_is_the_mean(models: tuple[list[State], State]) -> None:
    changed, base = models
    merged = varm(changed, base, "layer")
    assert weight_of_second(merged, changed, "head") == pytest.approx(0.5)


@pytest.mark.parametrize("granularity", ["tensor", "module", "layer", "model"])
def test_where_a_model_did_not_change_all_weigh_the_same(granularity: str) -> None:
    base = {"layers.0.w": np.ones((3, 3))}
    changed = [{"layers.0.w": np.full((3, 3), 2.0)}, {"layers.0.w": np.ones((3, 3))}]
    np.testing.assert_allclose(varm(changed, base, granularity)["layers.0.w"], 1.5)


@pytest.mark.parametrize(("measure", "power"), [("square", 2), ("abs", 1), ("signed", 1)])
def test_elementwise_weights(models: tuple[list[State], State], measure: str, power: int) -> None:
    changed, base = models
    changed[0]["head"][0, 0] = changed[1]["head"][0, 0] = base["head"][0, 0]
    changed[0]["head"][1, 1] = base["head"][1, 1] + 1e-9
    changed[1]["head"][1, 1] = base["head"][1, 1] + 1e-9
    merged = varm(changed, base, elementwise=True, measure=measure)["head"]
    deltas = np.stack([m["head"] - base["head"] for m in changed])
    sizes = np.abs(deltas) ** power
    with np.errstate(invalid="ignore"):
        update = np.nan_to_num((sizes * deltas).sum(axis=0) / sizes.sum(axis=0))
    np.testing.assert_allclose(merged - base["head"], update, atol=1e-15)
    assert merged[0, 0] == base["head"][0, 0]


def test_identical_models_are_returned(models: tuple[list[State], State]) -> None:
    (model, _), base = models
    for granularity in ("tensor", "module", "layer", "model"):
        merged = varm([model, dict(model), dict(model)], base, granularity)
        assert_close(merged, model, 1e-12)


def test_the_model_is_one_vector_whose_mean_square_is_its_size(
    models: tuple[list[State], State],
) -> None:
    changed, base = models
    merged = varm(changed, base, "model", temperature=0.05)
    updates = [np.concatenate([(m[n] - base[n]).ravel() for n in base]) for m in changed]
    sizes = np.exp([(update**2).mean() / 0.05 for update in updates])
    share = weight_of_second(merged, changed, "head")
    assert share == pytest.approx(sizes[1] / sizes.sum())


def test_refuses_a_temperature_for_elementwise_weights(
    models: tuple[list[State], State],
) -> None:
    changed, base = models
    with pytest.raises(RecipeError, match="temperature does not apply with elementwise"):
        varm(changed, base, elementwise=True, temperature=1.0)
