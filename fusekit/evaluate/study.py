"""How merging scales: methods x numbers of experts x random subsets, over one or several suites.

Suites that differ in size or in the quality of their base say so in their `axes`; the findings of
What Matters at Scale are then tested on the paired results.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from fusekit import __version__
from fusekit.errors import FusekitError
from fusekit.evaluate.building import MULTITASK
from fusekit.evaluate.cells import write_whole
from fusekit.evaluate.measured_merge import Workers
from fusekit.evaluate.result import Reference
from fusekit.evaluate.runner import run_suite
from fusekit.evaluate.suite import Suite

SCHEMA = "fusekit-study/1"


@dataclass(frozen=True)
class StudyCell:
    """One merge: of the experts of `subset`, by a method with its default parameters.

    `held_in` is relative to the experts on the tasks of the subset, `held_out` relative to the base
    on the suite's forgetting datasets (None without any); `multitask_held_out` is what the suite's
    multitask model scores there (None without one). `scores` are what the ratios are made of.
    """

    suite: str
    axes: Mapping[str, float]
    method: str
    count: int
    subset: tuple[str, ...]
    held_in: float
    held_out: float | None
    multitask_held_out: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """Mean and standard deviation over subsets for one suite, method and number of experts."""

    suite: str
    method: str
    count: int
    held_in: float
    held_in_std: float
    held_out: float | None


@dataclass(frozen=True)
class Study:
    """All cells, and what could not be computed: `suite, method, count` -> the reason."""

    cells: tuple[StudyCell, ...]
    failed: Mapping[str, str]
    seed: int

    def to_dict(self) -> dict[str, object]:
        """JSON types only."""
        return {"schema": SCHEMA, "version": __version__, **asdict(self)}


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
    suites: Sequence[Suite],
    methods: Sequence[str],
    counts: Sequence[int],
    out: Path,
    *,
    subsets: int = 3,
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> Study:
    """Merge random subsets of suites' experts and score them held-in and held-out.

    Every method and suite sees the same subsets. Results are cached below `out` as those of
    `run_suite`; `study.json` holds every cell. A method that cannot merge a number of experts, or
    fails, is listed and the others go on.

    Args:
        suites: with different names; their forgetting datasets are the held-out ones.
        methods: names of methods or of sets (`scale`).
        counts: numbers of experts.
        out: folder for results.
        subsets: per count, fewer if there are not so many.
        seed: of the subsets and of random methods.
        on_progress: called with the name of what is about to be computed.

    Raises:
        FusekitError: an impossible count, two suites of one name, or nothing that could be merged.

    References:
        What Matters for Model Merging at Scale?, arXiv 2410.03617.
    """
    names = [suite.name for suite in suites]
    for name in names:
        if names.count(name) > 1:
            raise FusekitError(f"suites: {names.count(name)} are called {name!r}; rename them")
    drawn = {
        suite.name: [
            subset for count in counts for subset in draw_subsets(suite.tasks, count, subsets, seed)
        ]
        for suite in suites
    }
    say = on_progress or (lambda name: None)
    cells: list[StudyCell] = []
    failed: dict[str, str] = {}
    with Workers() as workers:
        for suite in suites:
            for subset in drawn[suite.name]:
                place = out / suite.name / "-".join(subset)
                found, refused = _run_subset(suite, subset, methods, place, seed, workers, say)
                cells += found
                failed |= refused
    if not cells:
        raise FusekitError("; ".join(f"{what}: {reason}" for what, reason in failed.items()))
    study = Study(tuple(cells), failed, seed)
    write_whole(out / "study.json", json.dumps(study.to_dict(), indent=1) + "\n")
    return study


def _run_subset(
    suite: Suite,
    subset: tuple[str, ...],
    methods: Sequence[str],
    out: Path,
    seed: int,
    workers: Workers,
    say: Callable[[str], None],
) -> tuple[list[StudyCell], dict[str, str]]:
    part = dataclasses.replace(suite, experts={task: suite.experts[task] for task in subset})
    where = f"{suite.name}, {'+'.join(subset)}"
    count = len(subset)
    try:
        result = run_suite(
            part,
            methods,
            out,
            budget=1,
            seed=seed,
            workers=workers,
            on_progress=lambda name: say(f"{where}: {name}"),
        )
    except FusekitError as error:
        return [], {f"{suite.name}, {count} experts": str(error)}
    refused = {skip.method: skip.reason for skip in result.skipped} | dict(result.failed)
    multitask: Reference | None = result.references.get(MULTITASK)
    cells = [
        StudyCell(
            suite.name,
            suite.axes,
            row.method,
            count,
            subset,
            row.normalised,
            row.retained,
            None if multitask is None else multitask.retained,
            row.scores,
        )
        for row in result.rows
    ]
    return cells, {f"{suite.name}, {m}, {count} experts": reason for m, reason in refused.items()}


def curves(cells: Iterable[StudyCell]) -> list[Curve]:
    """Means over subsets: a curve's points by suite, method, then number of experts."""
    grouped: dict[tuple[str, str, int], list[StudyCell]] = {}
    for cell in cells:
        grouped.setdefault((cell.suite, cell.method, cell.count), []).append(cell)
    return [_curve(*key, each) for key, each in sorted(grouped.items(), key=lambda x: x[0][2])]


def _curve(suite: str, method: str, count: int, cells: Sequence[StudyCell]) -> Curve:
    inside = [cell.held_in for cell in cells]
    outside = [cell.held_out for cell in cells if cell.held_out is not None]
    return Curve(
        suite,
        method,
        count,
        float(np.mean(inside)),
        float(np.std(inside)),
        float(np.mean(outside)) if outside else None,
    )


def slopes(cells: Sequence[StudyCell]) -> dict[tuple[str, str], float]:
    """By suite and method the least-squares slope of held-in against the number of experts.

    Negative: every further expert costs the others. NaN where there is only one count.
    """
    return {
        key: _slope([cell for cell in cells if (cell.suite, cell.method) == key])
        for key in dict.fromkeys((cell.suite, cell.method) for cell in cells)
    }


def _slope(cells: Sequence[StudyCell]) -> float:
    x = np.array([cell.count for cell in cells], dtype=float)
    y = np.array([cell.held_in for cell in cells])
    spread = float(np.square(x - x.mean()).sum())
    covariance = float(((x - x.mean()) * (y - y.mean())).sum())
    return covariance / spread if spread > 0 else math.nan
