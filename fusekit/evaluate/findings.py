"""The findings of What Matters at Scale as statements that a study's paired cells can test."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fusekit.evaluate.study import StudyCell, slopes

SIZE, QUALITY = "size", "base_quality"

Verdict = Literal["pass", "fail", "undecided"]

Score = Callable[[StudyCell], float | None]


@dataclass(frozen=True)
class Finding:
    """A statement and how it fares: effects above 0 speak for it.

    Attributes:
        statement: in words.
        verdict: `pass` where at least 80 % of the effects are positive and their mean exceeds two
            standard errors, `fail` where the same holds of their negatives, else `undecided`.
        pairs, holding: effects, and how many are positive.
        effect, standard_error: mean of the effects, and of that mean.
    """

    statement: str
    verdict: Verdict
    pairs: int
    holding: int
    effect: float
    standard_error: float


def findings(cells: Sequence[StudyCell]) -> list[Finding]:
    """Every finding that the suites of a study allow to test.

    Base quality and size need suites that differ in that axis alone; comparisons are between
    neighbouring values, with method and subset of experts the same.

    References:
        What Matters for Model Merging at Scale?, arXiv 2410.03617.
    """
    strongest = _top(cells, QUALITY)
    effects = {
        "a better base: more held-in": _rises(cells, QUALITY, _held_in),
        "a larger model: more held-in": _rises(cells, SIZE, _held_in),
        "a larger model: more held-out": _rises(cells, SIZE, _held_out),
        "merges beat the base held-out": [
            score - 1.0 for cell in cells if (score := cell.held_out) is not None
        ],
        "the most experts on the best and largest base beat multitask training held-out": [
            cell.held_out - cell.multitask_held_out
            for cell in _most_experts(_top(strongest, SIZE))
            if cell.held_out is not None and cell.multitask_held_out is not None
        ],
        "every further expert costs held-in": [
            -slope for slope in slopes(cells).values() if not math.isnan(slope)
        ],
        "a better base: experts cost less": _flatter(cells, QUALITY),
        "a larger model: experts cost less": _flatter(cells, SIZE),
        "a larger model (best base): methods differ less": _closer_methods(strongest),
    }
    return [_judge(name, values) for name, values in effects.items() if values]


def _judge(statement: str, effects: Sequence[float]) -> Finding:
    values = np.array(effects)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf
    mean, holding = float(values.mean()), int((values > 0).sum())
    verdict: Verdict = "undecided"
    if holding >= 0.8 * len(values) and mean > 2 * error:
        verdict = "pass"
    elif (values < 0).sum() >= 0.8 * len(values) and -mean > 2 * error:
        verdict = "fail"
    return Finding(statement, verdict, len(values), holding, mean, error)


def _held_in(cell: StudyCell) -> float | None:
    return cell.held_in


def _held_out(cell: StudyCell) -> float | None:
    return cell.held_out


def _rises(cells: Sequence[StudyCell], axis: str, score: Score) -> list[float]:
    """Differences of a score between neighbouring values of an axis, all else equal."""
    groups: dict[object, dict[float, float]] = {}
    for cell in cells:
        value = score(cell)
        if axis in cell.axes and value is not None:
            key = (_others(cell, axis), cell.method, cell.subset)
            groups.setdefault(key, {})[cell.axes[axis]] = value
    return _steps(groups.values())


def _flatter(cells: Sequence[StudyCell], axis: str) -> list[float]:
    """Differences of the slope against the number of experts, as `_rises`."""
    by_suite = {cell.suite: cell for cell in cells}
    groups: dict[object, dict[float, float]] = {}
    for (suite, method), slope in slopes(cells).items():
        cell = by_suite[suite]
        if axis in cell.axes and not math.isnan(slope):
            groups.setdefault((_others(cell, axis), method), {})[cell.axes[axis]] = slope
    return _steps(groups.values())


def _closer_methods(cells: Sequence[StudyCell]) -> list[float]:
    """By how much the range over methods of the held-in score shrinks from size to size."""
    scores: dict[object, dict[float, list[float]]] = {}
    for cell in cells:
        if SIZE in cell.axes:
            by_size = scores.setdefault((_others(cell, SIZE), cell.subset), {})
            by_size.setdefault(cell.axes[SIZE], []).append(cell.held_in)
    return _steps(
        {size: -float(np.ptp(values)) for size, values in by_size.items() if len(values) > 1}
        for by_size in scores.values()
    )


def _steps(groups: Iterable[dict[float, float]]) -> list[float]:
    """Differences between neighbours, by rising position."""
    return [
        each[high] - each[low] for each in groups for low, high in itertools.pairwise(sorted(each))
    ]


def _others(cell: StudyCell, axis: str) -> frozenset[tuple[str, float]]:
    return frozenset((name, value) for name, value in cell.axes.items() if name != axis)


def _top(cells: Sequence[StudyCell], axis: str) -> list[StudyCell]:
    """Cells of suites with the largest value of an axis; all where no suite has one."""
    known = [cell.axes[axis] for cell in cells if axis in cell.axes]
    return [cell for cell in cells if not known or cell.axes.get(axis) == max(known)]


def _most_experts(cells: Sequence[StudyCell]) -> list[StudyCell]:
    largest = max((cell.count for cell in cells), default=0)
    return [cell for cell in cells if cell.count == largest]
