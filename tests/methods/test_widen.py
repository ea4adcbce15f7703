"""WIDEN against the authors' results and a plain reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fusekit import merge_state_dicts
from fusekit.errors import RecipeError
from tests.vectors import assert_close, read_case

State = dict[str, np.ndarray]


def widen(models: list[State], base: State, threads: int | None = None, **options: Any) -> State:
    return merge_state_dicts(models, method="widen", base=base, parameters=options, threads=threads)


@pytest.mark.parametrize("name", ["case0", "case1"])
@pytest.mark.parametrize("ties", ["average", "index"])
def test_merges_as_the_authors_program(name: str, ties: str) -> None:
    case = read_case("widen", name)
    options = {
        "t": case.about["above_average_value_ratio"],
        "s": case.about["score_calibration_value"],
        "ties": ties,
    }
    assert_close(widen(case.models, case.base, **options), case.merged, 2e-6)


def importance(values: np.ndarray, t: float, s: float) -> np.ndarray:
    columns = values.shape[1]
    ranks = np.argsort(np.argsort(values, axis=1, kind="stable"), axis=1, kind="stable")
    share = np.exp(ranks / columns)
    share /= share.sum(axis=0)
    return np.where(ranks > t * (columns - 1) / 2, s, share)


def reference(models: list[np.ndarray], base: np.ndarray, t: float, s: float) -> np.ndarray:
    stack, origin = np.stack(models).astype(np.float64), base.astype(np.float64)
    sizes, size = np.linalg.norm(stack, axis=1), np.linalg.norm(origin, axis=0)
    cosines = np.einsum("nrc,rc->nc", stack, origin) / (sizes * size)
    weights = importance(np.abs(sizes - size), t, s) + importance(1 - cosines, t, s)
    return origin + (0.5 * weights[:, None] * (stack - origin)).sum(axis=0)


@pytest.mark.parametrize(("t", "s"), [(1.0, 1.0), (1.5, 0.7), (2.0, 1.0)])
@pytest.mark.parametrize("shape", [(300, 201), (7, 1), (900, 64)])
def test_every_column_gets_the_mean_of_its_two_importances(
    shape: tuple[int, int], t: float, s: float
) -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=shape).astype(np.float32)
    models = [(base + d * rng.normal(size=shape)).astype(np.float32) for d in (0.01, 0.1, 0.05)]
    merged = widen([{"w": m} for m in models], {"w": base}, t=t, s=s)["w"]
    np.testing.assert_allclose(merged, reference(models, base, t, s), atol=2e-6)
    tokens = widen([{"wte.weight": m.T} for m in models], {"wte.weight": base.T}, t=t, s=s)
    np.testing.assert_array_equal(tokens["wte.weight"].T, merged)


def test_changes_far_below_float32_resolution_of_a_cosine_are_ranked() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(size=(64, 10)).astype(np.float64)
    turn = rng.normal(size=(64, 10))
    turn -= base * (turn * base).sum(axis=0) / (base * base).sum(axis=0)
    turn *= np.linalg.norm(base, axis=0) / np.linalg.norm(turn, axis=0)
    angles = 1e-7 * (1 + np.arange(10.0))
    model = base + turn * angles
    alone = widen([{"w": model}], {"w": base}, s=0.5, t=1.0)["w"]
    shares = np.linalg.norm(alone - base, axis=0) / np.linalg.norm(model - base, axis=0)
    np.testing.assert_allclose(shares, [1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5], atol=1e-6)


def test_one_model_is_returned_as_it_is() -> None:
    rng = np.random.default_rng(3)
    base = {"w": rng.normal(size=(9, 8)), "b": rng.normal(size=8), "s": np.array(2.0)}
    model = {name: values + rng.normal(size=values.shape) for name, values in base.items()}
    merged = widen([model], base)
    for name in base:
        np.testing.assert_allclose(merged[name], model[name], atol=1e-12)


def test_two_identical_models_overshoot_on_important_columns() -> None:
    rng = np.random.default_rng(4)
    base = rng.normal(size=(50, 10))
    model = base + 0.1 * rng.normal(size=(50, 10))
    merged = widen([{"w": model}, {"w": model.copy()}], {"w": base})["w"]
    share = ((merged - base) / (model - base)).mean(axis=0)
    assert set(np.round(share, 6)) <= {1.0, 1.5, 2.0}
    assert share.max() > 1.0


def test_an_unchanged_model_ranks_its_columns_equally_unless_asked_for_indices() -> None:
    rng = np.random.default_rng(5)
    base = rng.normal(size=(50, 10))
    model = base + 0.1 * rng.normal(size=(50, 10))
    models = [{"w": base.copy()}, {"w": model}]
    average = widen(models, {"w": base}, t=2.0)["w"]
    index = widen(models, {"w": base}, t=2.0, ties="index")["w"]
    assert np.abs(average - index).max() > 1e-4

    def shares(merged: np.ndarray) -> np.ndarray:
        return ((merged - base) / (model - base)).mean(axis=0)

    order = np.argsort(shares(average))
    assert shares(average)[order[0]] < 0.5 < shares(average)[order[-1]]


def test_columns_of_zeros_stay_finite() -> None:
    rng = np.random.default_rng(6)
    base = rng.normal(size=(20, 6))
    base[:, :2] = 0.0
    model = base + 0.1 * rng.normal(size=(20, 6))
    model[:, 0] = 0.0
    model[:, 3] = 0.0
    merged = widen([{"w": model}, {"w": base + 0.01}], {"w": base})["w"]
    assert np.isfinite(merged).all()


@pytest.mark.parametrize("what", ["appears", "vanishes", "turns round"])
def test_a_column_that_gains_loses_or_reverses_its_direction_has_changed_most(what: str) -> None:
    rng = np.random.default_rng(9)
    base = rng.normal(size=(20, 4))
    model = base * [1.0, 1.1, 1.2, 1.3] + 0.01 * rng.normal(size=(20, 4))
    if what == "turns round":
        model[:, 0] = -base[:, 0]
    else:
        base[:, 0], model[:, 0] = 0.0, 1e-6
    if what == "vanishes":
        base, model = model, base
    merged = widen([{"w": model}], {"w": base}, s=0.5)["w"]
    share = (merged - base)[:, 0] / (model - base)[:, 0]
    np.testing.assert_allclose(share, 0.75)  # the least changed in size: 1, the most in direction


def test_vectors_weigh_raw_changes() -> None:
    base = np.zeros(4)
    one, two = np.array([0.1, 0.2, 0.3, 1.0]), np.array([0.4, 0.1, 0.1, 0.1])
    merged = widen([{"b": one}, {"b": two}], {"b": base})["b"]
    soft = np.exp([one, two]) / np.exp([one, two]).sum(axis=0)
    soft[0, 3] = soft[1, 0] = 1.0
    np.testing.assert_allclose(merged, soft[0] * one + soft[1] * two)


def test_convolutions_count_as_matrices() -> None:
    rng = np.random.default_rng(7)
    base = rng.normal(size=(12, 5, 3, 2))
    models = [base + d * rng.normal(size=base.shape) for d in (0.1, 0.2)]
    merged = widen([{"w": m} for m in models], {"w": base})["w"]
    flat = widen([{"w": m.reshape(12, -1)} for m in models], {"w": base.reshape(12, -1)})["w"]
    np.testing.assert_array_equal(merged.reshape(12, -1), flat)


def test_excluded_tensors_keep_the_base() -> None:
    base = {"lm_head.weight": np.ones((3, 3)), "w": np.ones((3, 3))}
    model = {name: values * 2 for name, values in base.items()}
    merged = widen([model], base, exclude="lm_head|norm")
    np.testing.assert_array_equal(merged["lm_head.weight"], base["lm_head.weight"])
    np.testing.assert_allclose(merged["w"], model["w"])


def test_refuses_a_broken_pattern() -> None:
    base = {"w": np.ones((3, 3))}
    with pytest.raises(RecipeError, match=r"exclude: found '\(', expected a regular expression"):
        widen([dict(base)], base, exclude="(")


@pytest.mark.parametrize("name", ["w", "model.embed_tokens.weight"])
def test_threads_do_not_change_the_result(name: str) -> None:
    rng = np.random.default_rng(8)
    base = {name: rng.normal(size=(1300, 257)).astype("f4"), "b": np.ones(3, "f4")}
    models = [{k: v + rng.normal(size=v.shape).astype("f4") for k, v in base.items()} for _ in "ab"]
    one, four = (widen(models, base, threads=threads) for threads in (1, 4))
    np.testing.assert_array_equal(one[name], four[name])
