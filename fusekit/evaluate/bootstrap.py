"""Paired bootstrap over examples: how sure a score, and a difference between two merges, is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusekit.evaluate.scores import Average, as_summed, from_mean

Outcomes = Mapping[str, NDArray[Any]]
"""task -> what every example scored, in a fixed order."""

Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Resamples:
    """The same resampled examples for every model, so that comparisons are paired.

    `counts[task]` is (resamples, examples): how often an example was drawn.
    """

    counts: Mapping[str, NDArray[np.float64]]
    average: Average = "arithmetic"

    def ratios(self, outcomes: Outcomes, reference: Outcomes) -> NDArray[np.float64]:
        """(resamples,) mean over tasks of the score divided by the reference's score."""
        each = []
        for task in self.counts:
            scored, expected = self._scores(task, outcomes), self._scores(task, reference)
            each.append(np.divide(scored, expected, out=np.zeros_like(scored), where=expected > 0))
        return np.asarray(np.mean(each, axis=0))

    def _scores(self, task: str, outcomes: Outcomes) -> NDArray[np.float64]:
        counts, values = self.counts[task], as_summed(outcomes[task], self.average)
        return from_mean(counts @ values / counts.shape[1], self.average)


def resample(
    sizes: Mapping[str, int],
    count: int,
    seed: int,
    shared: bool,
    average: Average = "arithmetic",
) -> Resamples:
    """Draw examples with replacement, `count` times.

    Args:
        sizes: examples per task.
        shared: tasks of one size look at the same examples, which are then drawn together.
        average: how a task's score is made of its examples' scores.
    """
    drawn: dict[tuple[int, str], NDArray[np.float64]] = {}
    for task, size in sizes.items():
        key = (size, "" if shared else task)
        if key not in drawn:
            generator = np.random.default_rng([seed, size, len(drawn)])
            drawn[key] = generator.multinomial(size, np.full(size, 1 / size), size=count).astype(
                np.float64
            )
    counts = {task: drawn[size, "" if shared else task] for task, size in sizes.items()}
    return Resamples(counts, average)


def interval(values: NDArray[np.float64], level: float = 0.95) -> Interval:
    """The central interval that holds this share of the resampled values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
