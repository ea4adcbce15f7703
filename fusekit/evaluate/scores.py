"""Scores of merged models relative to their experts or their base."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fusekit.errors import FusekitError

Scores = Mapping[str, Mapping[str, float]]
"""task -> dataset -> score, higher is better."""


Average = Literal["arithmetic", "geometric"]
"""How a task's score is made of its examples' scores; the geometric mean wants positive ones."""


def average_score(examples: NDArray[Any], average: Average) -> float:
    """The mean of what single examples scored, or exp of the mean of its logarithm.

    Raises:
        FusekitError: a geometric mean of scores that are not positive.
    """
    return float(from_mean(np.mean(as_summed(examples, average)), average))


def as_summed(examples: NDArray[Any], average: Average) -> NDArray[np.float64]:
    """What is averaged: the scores, or their logarithms (see `average_score`)."""
    values = np.asarray(examples, dtype=np.float64)
    if average == "arithmetic":
        return values
    if not np.all(values > 0):
        raise FusekitError(
            f"an example scored {float(values.min())}, expected more than 0 for a geometric mean"
        )
    return np.log(values)


def from_mean(means: Any, average: Average) -> NDArray[np.float64]:
    """Scores from means of `as_summed`."""
    return np.asarray(means) if average == "arithmetic" else np.exp(means)


@dataclass(frozen=True)
class RelativeScore:
    """A mean of ratios.

    Attributes:
        value: mean over tasks.
        by_task: mean over the task's datasets of score / reference.
        dropped: `task/dataset` without a positive reference, left out of the means.
    """

    value: float
    by_task: Mapping[str, float]
    dropped: tuple[str, ...]


def relative_score(
    scores: Scores, reference: Scores, tasks: Iterable[str] | None = None
) -> RelativeScore:
    """mean over tasks of mean over datasets of scores[task][dataset] / reference[task][dataset].

    With the experts' own scores as the reference and the experts' tasks this is MergeBench's
    normalised performance and the held-in score of What Matters at Scale; with the base's scores
    and other tasks it is normalised generalisation (1: nothing forgotten) and the held-out score.

    Args:
        scores: of the model.
        reference: what 1 means; a dataset whose reference is missing or not positive is dropped.
        tasks: which of the tasks count; default all of `scores`.

    Raises:
        FusekitError: a task or dataset that was not scored, or nothing left to average.

    References:
        MergeBench: A Benchmark for Merging Domain-Specialized LLMs, arXiv 2505.10833.
        What Matters for Model Merging at Scale?, arXiv 2410.03617.
    """
    by_task: dict[str, float] = {}
    dropped: list[str] = []
    for task in scores if tasks is None else tasks:
        ratios = []
        expected = reference.get(task, {})
        for dataset in dict.fromkeys([*expected, *scores.get(task, {})]):
            if not expected.get(dataset, 0.0) > 0:
                dropped.append(f"{task}/{dataset}")
            elif dataset not in scores.get(task, {}):
                raise FusekitError(f"task {task!r}: dataset {dataset!r} has no score")
            else:
                ratios.append(scores[task][dataset] / expected[dataset])
        if ratios:
            by_task[task] = math.fsum(ratios) / len(ratios)
    if not by_task:
        raise FusekitError("no task has a positive reference score: nothing to normalise by")
    return RelativeScore(math.fsum(by_task.values()) / len(by_task), by_task, tuple(dropped))
