"""How merging scales with the number of experts: methods x counts x random subsets of a suite."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusekit.errors import FusekitError
from fusekit.evaluate.runner import run_suite
from fusekit.evaluate.suite import Suite


@dataclass(frozen=True)
class StudyCell:
    """One merge: of the experts of `subset`, by a method with its default parameters.

    `held_in` is relative to the experts on the tasks of the subset, `held_out` relative to the base
    on the suite's forgetting tasks (None without any).
    """

    method: str
    count: int
    subset: tuple[str, ...]
    held_in: float
    held_out: float | None


@dataclass(frozen=True)
class Curve:
    """Mean and standard deviation over subsets for one method and number of experts."""

    method: str
    count: int
    held_in: float
    held_in_std: float
    held_out: float | None


def draw_subsets(tasks: Sequence[str], count: int, number: int, seed: int) -> list[tuple[str, ...]]:
    """At most `number` different subsets of `count` tasks, in the order of the tasks.

    The draw depends on the tasks, the count and the seed alone, so that methods and models are
    compared on the same subsets.

    Raises:
        FusekitError: a count that is not between 1 and the number of tasks.
    """
    if not 1 <= count <= len(tasks):
        raise FusekitError(f"count {count}: expected between 1 and the suite's {len(tasks)} tasks")
    generator = np.random.default_rng([seed, count])
    total = math.comb(len(tasks), count)
    chosen = sorted(generator.choice(total, size=min(number, total), replace=False).tolist())
    subsets = list(itertools.combinations(tasks, count))
    return [subsets[i] for i in chosen]


def run_study(
    suite: Suite,
    methods: Sequence[str],
    counts: Sequence[int],
    out: Path,
    *,
    subsets: int = 3,
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> list[StudyCell]:
    """Merge random subsets of a suite's experts and score them held-in and held-out.

    Every method sees the same subsets. Results are cached below `out` as those of `run_suite`.
    Sizes and base qualities are compared by running the study on several suites.

    Args:
        suite: its forgetting tasks are the held-out ones.
        methods: names of methods that can merge every one of the counts.
        counts: numbers of experts.
        out: folder for results.
        subsets: per count, fewer if there are not so many.
        seed: of the subsets and of random methods.
        on_progress: called with the name of what is about to be computed.

    Raises:
        FusekitError: an impossible count, or a method that cannot merge or fails.

    References:
        What Matters for Model Merging at Scale?, arXiv 2410.03617.
    """
    cells = []
    for count in counts:
        for subset in draw_subsets(suite.tasks, count, subsets, seed):
            part = dataclasses.replace(
                suite, experts={task: suite.experts[task] for task in subset}
            )
            result = run_suite(
                part, methods, out / "-".join(subset), budget=1, seed=seed, on_progress=on_progress
            )
            refused = {skip.method: skip.reason for skip in result.skipped} | dict(result.failed)
            for method, reason in refused.items():
                raise FusekitError(f"{method}, {count} experts: {reason}")
            cells += [
                StudyCell(row.method, count, subset, row.normalised, row.retained)
                for row in result.rows
            ]
    return cells


def curves(cells: Sequence[StudyCell]) -> list[Curve]:
    """Means over subsets: a curve's points by method, then by number of experts."""
    grouped: dict[tuple[str, int], list[StudyCell]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.method, cell.count)):
        grouped.setdefault((cell.method, cell.count), []).append(cell)
    return [_curve(method, count, each) for (method, count), each in grouped.items()]


def _curve(method: str, count: int, cells: Sequence[StudyCell]) -> Curve:
    inside = [cell.held_in for cell in cells]
    outside = [cell.held_out for cell in cells if cell.held_out is not None]
    return Curve(
        method,
        count,
        float(np.mean(inside)),
        float(np.std(inside)),
        float(np.mean(outside)) if outside else None,
    )


def markdown(cells: Sequence[StudyCell]) -> str:
    """Held-in (and held-out) means by method and number of experts, with the slope."""
    points = {(curve.method, curve.count): curve for curve in curves(cells)}
    counts = sorted({count for _, count in points})
    trend = slopes(cells)
    lines = [
        f"| method | {' | '.join(f'{count} experts' for count in counts)} | slope |",
        f"|---|{'---:|' * (len(counts) + 1)}",
    ]
    for method in trend:
        shown = " | ".join(_point(points.get((method, count))) for count in counts)
        lines.append(f"| {method} | {shown} | {trend[method]:+.3f} |")
    return "\n".join(lines) + "\n"


def _point(curve: Curve | None) -> str:
    if curve is None:
        return "-"
    outside = "" if curve.held_out is None else f" / {curve.held_out:.3f}"
    return f"{curve.held_in:.3f} ± {curve.held_in_std:.3f}{outside}"


def slopes(cells: Sequence[StudyCell]) -> Mapping[str, float]:
    """Per method the least-squares slope of the held-in score against the number of experts.

    Negative: every further expert costs the others. NaN where there is only one count.
    """
    result = {}
    for method in dict.fromkeys(cell.method for cell in cells):
        own = [cell for cell in cells if cell.method == method]
        x = np.array([cell.count for cell in own], dtype=float)
        y = np.array([cell.held_in for cell in own])
        spread = float(np.square(x - x.mean()).sum())
        covariance = float(((x - x.mean()) * (y - y.mean())).sum())
        result[method] = covariance / spread if spread > 0 else math.nan
    return result
