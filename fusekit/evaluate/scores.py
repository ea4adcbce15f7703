"""Scores of merged models relative to their experts or their base."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fusekit.errors import FusekitError

Scores = Mapping[str, Mapping[str, float]]
"""task -> dataset -> score, higher is better."""


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
