"""TALL masks chosen by what the rebuilt experts can do: one threshold per task."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusekit.engine.reconstruct import reconstruct, tasks_of
from fusekit.engine.run import merge
from fusekit.errors import FusekitError, RecipeError

LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.6)
"""The thresholds that the authors try."""


@dataclass(frozen=True)
class MaskThresholds:
    """What a search found.

    Attributes:
        chosen: task -> its best `tall_lambda`; of equals the smallest.
        scores: task -> the score of its rebuilt expert under every threshold.
        recipe: the recipe with the chosen thresholds as parameters of its models.
    """

    chosen: Mapping[str, float]
    scores: Mapping[str, Mapping[float, float]]
    recipe: Mapping[str, Any]


def choose_tall_lambda(
    recipe: Mapping[str, Any],
    evaluate: Callable[[Path, str], float],
    *,
    lambdas: Sequence[float] = LAMBDAS,
    threads: int | None = None,
) -> MaskThresholds:
    """Find every task's `tall_lambda` by the score of the expert rebuilt from its mask.

    One merge per threshold; one expert at a time lies on disk, in a temporary folder.

    Args:
        recipe: of the method `tall_masks`, its models listed in `models`.
        evaluate: (folder of a rebuilt expert, its task) -> score on validation data; larger is
            better, NaN the worst.
        lambdas: thresholds to try, in ascending order.
        threads: worker threads of the merges.

    Raises:
        FusekitError: another method, or no thresholds.

    References:
        Wang et al., Localizing Task Information for Improved Model Merging and Compression,
        ICML 2024, arXiv 2405.07813.
    """
    if recipe.get("merge_method") != "tall_masks":
        found = recipe.get("merge_method")
        raise RecipeError(f"merge_method: found {found!r}, expected 'tall_masks'")
    if not lambdas:
        raise FusekitError("lambdas: found none, expected at least one threshold")
    scores: dict[str, dict[float, float]] = {}
    for value in lambdas:
        with tempfile.TemporaryDirectory() as folder:
            merged = Path(folder) / "merged"
            merge(_with(recipe, [value] * len(recipe["models"])), merged, threads=threads)
            for number, task in enumerate(tasks_of(merged)):
                expert = Path(folder) / f"expert{number}"
                reconstruct(merged, task, expert)
                scores.setdefault(task, {})[value] = evaluate(expert, task)
    chosen = {task: _best(tried) for task, tried in scores.items()}
    return MaskThresholds(chosen, scores, _with(recipe, list(chosen.values())))


def _best(tried: Mapping[float, float]) -> float:
    return max(tried, key=lambda value: -math.inf if math.isnan(tried[value]) else tried[value])


def _with(recipe: Mapping[str, Any], values: Sequence[float]) -> dict[str, Any]:
    """The recipe with a threshold for each of its models."""
    parameters = {k: v for k, v in recipe.get("parameters", {}).items() if k != "tall_lambda"}
    models = [
        {**model, "parameters": {**model.get("parameters", {}), "tall_lambda": value}}
        for model, value in zip(recipe["models"], values, strict=True)
    ]
    return {**recipe, "parameters": parameters, "models": models}
