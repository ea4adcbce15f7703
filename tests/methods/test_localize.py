"""Localize-and-Stitch against golden values, a plain reference, and its invariants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit import merge_state_dicts
from fusekit.errors import RecipeError
from tests.vectors import assert_close, read_case

State = dict[str, np.ndarray]


def stitch(models: list[State], base: State, **options: Any) -> State:
    return merge_state_dicts(models, method="localize_and_stitch", base=base, **options)


def reference(models: list[State], base: State, density: float) -> State:
    """The whole model at once, in float64."""
    names = list(base)
    deltas = [np.concatenate([(m[n] - base[n]).ravel() for n in names]) for m in models]
    kept = []
    for delta in deltas:
        count = max(1, int(density * delta.size))
        kept.append(np.abs(delta) >= np.sort(np.abs(delta))[delta.size - count])
    total = sum(d * m for d, m in zip(deltas, kept, strict=True))
    flat = total / np.maximum(1, sum(m.astype(int) for m in kept))
    result, at = {}, 0
    for name in names:
        size = base[name].size
        result[name] = base[name] + flat[at : at + size].reshape(base[name].shape)
        at += size
    return result


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_golden_values_of_the_papers_rule(name: str) -> None:
    case = read_case("mergebench", name)
    assert case.base is not None
    taking_part = [tensor for tensor in case.base if "embed" not in tensor]
    models = [{tensor: model[tensor] for tensor in taking_part} for model in case.models]
    merged = stitch(
        models,
        {tensor: case.base[tensor] for tensor in taking_part},
        parameters={"density": case.about["ls_sparsity"]},
        granularity="model",
    )
    expected = case.group("out/localize_stitch_paper")
    assert_close({tensor: merged[tensor] for tensor in expected}, expected, 1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([0.05, 0.3, 0.75, 1.0]))
def test_a_plain_reference_gives_the_same(seed: int, count: int, density: float) -> None:
    generator = np.random.default_rng(seed)
    shapes = {"a.weight": (7, 5), "b.weight": (23,)}
    base = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    models = [
        {n: x + generator.normal(size=x.shape) for n, x in base.items()} for _ in range(count)
    ]
    merged = stitch(models, base, parameters={"density": density}, granularity="model")
    expected = reference(models, base, density)
    for name in base:
        np.testing.assert_allclose(merged[name], expected[name], rtol=1e-12)
    again = stitch(models[::-1], base, parameters={"density": density}, granularity="model")
    for name in base:
        np.testing.assert_allclose(again[name], merged[name], rtol=1e-12)


def test_identical_models_are_recovered_where_kept() -> None:
    generator = np.random.default_rng(0)
    base = {"w": generator.normal(size=40)}
    model = {"w": base["w"] + generator.normal(size=40)}
    np.testing.assert_allclose(
        stitch([model] * 3, base, parameters={"density": 1.0})["w"], model["w"], rtol=1e-12
    )
    merged = stitch([model] * 3, base)["w"]
    largest = np.argsort(-np.abs(model["w"] - base["w"]))
    np.testing.assert_allclose(merged[largest[:4]], model["w"][largest[:4]], rtol=1e-12)
    np.testing.assert_array_equal(merged[largest[4:]], base["w"][largest[4:]])


def test_disjoint_skills_are_put_together_whole() -> None:
    base = {"w": np.zeros(10)}
    models = [{"w": np.eye(10)[i] * 3} for i in (2, 7)]
    merged = stitch(models, base, parameters={"density": 0.1})["w"]
    np.testing.assert_array_equal(merged, models[0]["w"] + models[1]["w"])


def test_a_density_of_zero_and_a_missing_base_are_refused() -> None:
    model = {"w": np.ones(4)}
    with pytest.raises(RecipeError, match=r"density: found 0.0?, expected a number in \(0, 1\]"):
        stitch([model, model], model, parameters={"density": 0.0})
    with pytest.raises(RecipeError, match="base"):
        merge_state_dicts([model, model], method="localize_and_stitch")
