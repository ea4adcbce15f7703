"""Advice follows from planted situations, names existing methods, and gives its reasons."""

from __future__ import annotations

import numpy as np
import pytest

from fusekit.inspection.advice import RULES, Situation, _runs, advise
from fusekit.inspection.result import Advice, Group
from fusekit.inspection.run import inspect
from fusekit.inspection.statistics import Statistics
from fusekit.methods import find
from fusekit.recipe.schema import load_recipe
from tests.inspection.support import base_model, mixed, moved, noise

BASE = base_model()
FIRST, SECOND = noise(BASE, 1), noise(BASE, 2)


def advice_for(*deltas: dict[str, np.ndarray]) -> tuple[Advice, ...]:
    return inspect([moved(BASE, delta) for delta in deltas], base=BASE).advice


def first_method(advice: tuple[Advice, ...]) -> str:
    return next(a.recipe["merge_method"] for a in advice if a.recipe and "merge_method" in a.recipe)


def test_orthogonal_task_vectors_are_to_be_added() -> None:
    advice = advice_for(FIRST, SECOND)
    assert first_method(advice) == "task_arithmetic"
    assert "lambda 0.3-0.5" in advice[0].text
    assert any("sign agreement" in reason for reason in advice[0].reasons)


def test_parallel_task_vectors_are_to_be_averaged() -> None:
    assert first_method(advice_for(FIRST, mixed(FIRST, SECOND, 0.9))) == "linear"


def test_opposed_task_vectors_are_told_apart_from_orthogonal_ones() -> None:
    advice = advice_for(FIRST, mixed(FIRST, SECOND, -0.7))
    assert first_method(advice) == "ties"
    assert "undo each other" in advice[0].text


def test_strangers_and_copies_do_not_count_in_the_choice_of_a_method() -> None:
    models = [moved(BASE, FIRST), base_model(99), moved(BASE, FIRST), moved(BASE, SECOND)]
    advice = inspect(models, base=BASE).advice
    texts = " ".join(each.text for each in advice)
    assert "Leave out model 2" in texts and "Drop model 3" in texts
    assert first_method(advice) == "task_arithmetic"
    assert not any("would dominate" in each.text for each in advice)
    alone = inspect(models[1:3], base=BASE).advice
    assert [each.recipe for each in alone] == [None]


def test_conflicts_on_shared_weights_call_for_sign_election() -> None:
    rng = np.random.default_rng(0)
    other = {k: v * np.where(rng.random(v.shape) < 0.45, -1, 1) for k, v in FIRST.items()}
    advice = advice_for(FIRST, {k: v.astype(np.float32) for k, v in other.items()})
    assert first_method(advice) == "ties"
    assert "compete for the same weights" in advice[0].text


def test_partly_aligned_task_vectors_get_a_scale_between_mean_and_equal_length() -> None:
    advice = advice_for(FIRST, mixed(FIRST, SECOND, 0.4))
    assert first_method(advice) == "task_arithmetic"
    # 1 / 2 and 1 / sqrt(2 + 2 * 0.4)
    assert "lambda 0.50-0.60" in advice[0].text


def test_a_model_that_moved_further_gets_less_weight() -> None:
    large = {name: (4 * delta).astype(np.float32) for name, delta in SECOND.items()}
    (found,) = [a for a in advice_for(FIRST, large) if "would dominate" in a.text]
    assert found.recipe is not None
    weights = {m["model"]: m["parameters"]["weight"] for m in found.recipe["models"]}
    assert weights == {"model 1": 1.0, "model 2": 0.25}


def test_layers_that_one_model_dominates_are_named() -> None:
    second = dict(SECOND)
    for name in second:
        if "layers.1" in name or "layers.2" in name:
            second[name] = (0.05 * second[name]).astype(np.float32)
    texts = [a.text for a in advice_for({k: v * 0.5 for k, v in FIRST.items()}, second)]
    assert any("Layers 1-2 are dominated by model 1" in text for text in texts)


def test_concentrated_task_vectors_may_be_trimmed() -> None:
    sparse = {}
    for name, delta in SECOND.items():
        keep = np.random.default_rng(1).random(delta.shape) < 0.02
        sparse[name] = np.where(keep, 10 * delta, 0.01 * delta).astype(np.float32)
    (found,) = [a for a in advice_for(FIRST, sparse) if "Trimming" in a.text]
    assert "for model 2:" in found.text


@pytest.mark.parametrize("cosine", [-0.9, -0.4, 0.0, 0.1, 0.3, 0.5, 0.7, 0.95])
def test_advised_recipes_are_valid(cosine: float) -> None:
    found = inspect([moved(BASE, FIRST), moved(BASE, mixed(FIRST, SECOND, cosine))], base=BASE)
    advised = [dict(a.recipe) for a in found.advice if a.recipe and "merge_method" in a.recipe]
    assert advised
    for keys in advised:
        models = [{"model": name} for name in found.models]
        recipe = load_recipe({**keys, "models": models, "base_model": "base"})
        for name, value in keys.get("parameters", {}).items():
            parameter = find(recipe.merge_method).parameter(name)
            assert parameter is not None
            assert parameter.check(value) == value


def test_rules_are_silent_where_nothing_is_known() -> None:
    nothing = Situation(("a", "b"), None, (), (), has_base=True)
    assert advise(nothing) == ()
    zero = Statistics(
        elements=4.0,
        gram=np.diag([1.0, 0.0, 0.0]),
        powers=np.zeros((2, 4)),
        both=np.zeros((2, 2, 2)),
        opposed=np.zeros((2, 2, 2)),
        positions=np.zeros(6),
        top_energy=np.zeros((2, 3)),
    )
    unmoved = Group("whole model", 1, zero, np.full(2, np.nan), np.full(2, np.nan))
    assert advise(Situation(("a", "b"), unmoved, (), (), has_base=True)) == ()
    assert len(RULES) >= 8


def test_runs_of_layers_are_abbreviated() -> None:
    assert _runs([f"m.layers.{i}" for i in (20, 21, 22, 24)]) == "20-22, 24"
    assert _runs(["encoder.0", "decoder.0"]) == "0 of encoder; 0 of decoder"
