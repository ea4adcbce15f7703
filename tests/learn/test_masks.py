"""The search for mask thresholds finds what each task needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fusekit
from fusekit.errors import FusekitError, RecipeError
from fusekit.learn import choose_tall_lambda


def experts(where: Path) -> tuple[dict[str, object], dict[str, dict[str, np.ndarray]]]:
    """A recipe and the states of three experts of one base."""
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal((60, 50)).astype("f4")}
    states = {
        task: {"w": base["w"] + 0.1 * rng.standard_normal((60, 50)).astype("f4")}
        for task in ("red", "green", "blue")
    }
    for name, state in {"base": base, **states}.items():
        (where / name).mkdir()
        save_file(state, where / name / "model.safetensors")
    recipe: dict[str, object] = {
        "merge_method": "tall_masks",
        "base_model": str(where / "base"),
        "models": [{"model": str(where / task)} for task in states],
    }
    return recipe, states


def test_every_task_gets_the_threshold_that_scores_best(tmp_path: Path) -> None:
    recipe, states = experts(tmp_path)

    def closeness(folder: Path, task: str) -> float:
        found = load_file(folder / "model.safetensors")["w"]
        return -float(np.linalg.norm(found - states[task]["w"]))

    search = choose_tall_lambda(recipe, closeness, lambdas=(0.2, 0.6, 1.0, 2.0))
    # The mask is the nearest to the expert, in the L1 norm, where lambda is 1.
    assert set(search.chosen.values()) <= {0.6, 1.0}
    fusekit.merge(search.recipe, tmp_path / "merged")
    for task, value in search.chosen.items():
        rebuilt = fusekit.reconstruct(tmp_path / "merged", task).out
        assert closeness(rebuilt, task) == search.scores[task][value]
        assert search.scores[task][value] == max(search.scores[task].values())


def test_of_equal_scores_the_smallest_threshold_is_taken_and_nan_is_the_worst(
    tmp_path: Path,
) -> None:
    recipe, _ = experts(tmp_path)
    tried: list[str] = []

    def score(folder: Path, task: str) -> float:
        tried.append(task)
        return float("nan") if task == "red" and tried.count("red") == 1 else 0.5

    search = choose_tall_lambda(recipe, score, lambdas=(0.3, 0.4, 0.5))
    assert search.chosen == {"red": 0.4, "green": 0.3, "blue": 0.3}


def test_refuses_other_methods_and_no_thresholds(tmp_path: Path) -> None:
    recipe, _ = experts(tmp_path)
    with pytest.raises(RecipeError, match="found 'emr', expected 'tall_masks'"):
        choose_tall_lambda({**recipe, "merge_method": "emr"}, lambda folder, task: 0.0)
    with pytest.raises(FusekitError, match="lambdas: found none"):
        choose_tall_lambda(recipe, lambda folder, task: 0.0, lambdas=())
