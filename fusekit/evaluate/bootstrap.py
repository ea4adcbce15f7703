"""Paired bootstrap over examples: how sure a score, and a difference between two merges, is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusekit.evaluate.scores import Average, as_summed, from_mean

Outcomes = Mapping[str, NDArray[Any]]
"""dataset -> what every example scored, in a fixed order."""

Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Resamples:
    """The same resampled examples for every model, so that comparisons are paired.

    `counts[dataset]` is (resamples, examples): how often an example was drawn.
    """

    counts: Mapping[str, NDArray[np.float64]]
    average: Average = "arithmetic"

    def ratios(
        self, outcomes: Outcomes, reference: Outcomes, groups: Mapping[str, Sequence[str]]
    ) -> NDArray[np.float64]:
        """(resamples,) mean over groups of the mean over datasets of score / reference's score."""
        by_group = [
            np.mean([self._ratios(name, outcomes, reference) for name in names], axis=0)
            for names in groups.values()
        ]
        return np.asarray(np.mean(by_group, axis=0))

    def _ratios(self, name: str, outcomes: Outcomes, reference: Outcomes) -> NDArray[np.float64]:
        scored, expected = self._scores(name, outcomes), self._scores(name, reference)
        return np.divide(scored, expected, out=np.zeros_like(scored), where=expected > 0)

    def _scores(self, name: str, outcomes: Outcomes) -> NDArray[np.float64]:
        counts, values = self.counts[name], as_summed(outcomes[name], self.average)
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
        sizes: examples per dataset.
        shared: datasets of one size look at the same examples, which are then drawn together.
        average: how a dataset's score is made of its examples' scores.
    """
    drawn: dict[tuple[int, str], NDArray[np.float64]] = {}
    for name, size in sizes.items():
        key = (size, "" if shared else name)
        if key not in drawn:
            generator = np.random.default_rng([seed, size, len(drawn)])
            drawn[key] = generator.multinomial(size, np.full(size, 1 / size), size=count).astype(
                np.float64
            )
    counts = {name: drawn[size, "" if shared else name] for name, size in sizes.items()}
    return Resamples(counts, average)


def interval(values: NDArray[np.float64], level: float = 0.95) -> Interval:
    """The central interval that holds this share of the resampled values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
