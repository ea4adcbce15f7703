"""Running a suite: merge by every method, score every merge, and say how sure the scores are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusekit.errors import FusekitError
from fusekit.evaluate.bootstrap import Resamples, interval, resample
from fusekit.evaluate.cells import Cells, Outcomes, Tried, grouped, relative_means, write_whole
from fusekit.evaluate.configurations import Contender, candidates, choose_methods
from fusekit.evaluate.measured_merge import Workers
from fusekit.evaluate.result import Reference, Row, SuiteResult
from fusekit.evaluate.scores import relative_score
from fusekit.evaluate.suite import Calibrates, Suite
from fusekit.evaluate.table import markdown


def run_suite(
    suite: Suite,
    methods: Sequence[str],
    out: Path,
    *,
    budget: int = 8,
    seed: int = 0,
    resamples: int = 2000,
    threads: int | None = 1,
    workers: Workers | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> SuiteResult:
    """Compare merging methods on a suite.

    Every method runs with its defaults, and, where it has something to tune, with the best of
    `budget` configurations on the tuning split (ties: the earlier one, the default being first).
    What has been computed is kept in `out/cells` under the hash of everything it depends on: a
    second run, or one that was interrupted, continues. Writes `results.json` and `results.md`.

    Args:
        suite: what to merge and how to score it.
        methods: names of methods or of sets (`mergebench`), or `all` that need no data.
        out: folder for results.
        budget: configurations per method, the default included.
        seed: of random methods, of the tuning's draw and of the bootstrap.
        resamples: of the bootstrap.
        threads: of every merge; None for all processors. On one, CPU seconds are seconds.
        workers: processes for measured merges, to be used by several suites in a row; own ones,
            which are ended, by default.
        on_progress: called with the name of what is about to be computed.

    Raises:
        RecipeError: there is no method of that name.
        FusekitError: no method left to run, or a checkpoint that cannot be scored.

    References:
        MergeBench: A Benchmark for Merging Domain-Specialized LLMs, arXiv 2505.10833.
        What Matters for Model Merging at Scale?, arXiv 2410.03617.
    """
    calibrates = isinstance(suite.evaluator, Calibrates)
    chosen, skipped = choose_methods(methods, len(suite.experts), calibrates)
    if not chosen:
        reasons = "; ".join(f"{skip.method} {skip.reason}" for skip in skipped) or "none named"
        raise FusekitError(f"suite {suite.name!r}: no method to run ({reasons})")
    say = on_progress or (lambda name: None)
    with Workers(threads) if workers is None else nullcontext(workers) as merging:
        cells = Cells(suite, out, seed, threads, merging, say)
        base = cells.outcomes("base", suite.base)
        experts = {task: cells.outcomes(task, path) for task, path in suite.experts.items()}
        named = {name: cells.outcomes(name, path) for name, path in suite.references.items()}
        configurations, failed = _run_methods(cells, chosen, budget)
    yardstick = _yardstick(suite, base, experts, resamples, seed)
    rows: list[Row] = []
    for found in configurations:
        first = configurations[0].outcomes if rows else None
        rows.append(yardstick.row(found, first))
    result = SuiteResult(
        suite.name,
        suite.groups,
        suite.forgetting,
        {name: yardstick.reference(each) for name, each in {"base": base, **named}.items()},
        {task: suite.means(outcomes) for task, outcomes in experts.items()},
        tuple(rows),
        tuple(skipped),
        failed,
        yardstick.dropped,
        budget,
        seed,
        resamples,
    )
    write_whole(out / "results.json", json.dumps(result.to_dict(), indent=1) + "\n")
    write_whole(out / "results.md", markdown(result))
    return result


@dataclass(frozen=True)
class _Configuration:
    """A configuration that was merged and scored on the reporting split, and what it took."""

    method: str
    variant: str
    parameters: Mapping[str, Any]
    outcomes: Outcomes
    cpu_seconds: float
    peak_bytes: int
    measuring_seconds: float
    tried: int = 1
    tuning_seconds: float = 0.0


def _run_methods(
    cells: Cells, methods: Sequence[Contender], budget: int
) -> tuple[list[_Configuration], dict[str, str]]:
    """Default and tuned configurations in the order of the methods; failures by method."""
    found: list[_Configuration] = []
    failed: dict[str, str] = {}
    for method in methods:
        tries = candidates(method, budget, cells.seed)
        try:
            found.append(_reported(cells, method, "default", tries[0]))
            if len(tries) > 1:
                found.append(_tuned(cells, method, tries))
        except FusekitError as error:
            failed[method.name] = str(error)
        cells.forget_prepared()
    return found, failed


def _tuned(cells: Cells, method: Contender, tries: Sequence[dict[str, Any]]) -> _Configuration:
    accepted: list[tuple[dict[str, Any], Tried]] = [
        (each, result) for each in tries if (result := cells.tried(method, each)) is not None
    ]
    best = max(accepted, key=lambda tried: tried[1].normalised)[0]
    others = (each for each, _ in accepted if each != best)
    seconds = sum(result.cpu_seconds for _, result in accepted)
    seconds += sum(cells.preparing_seconds(method, each) for each in others)
    return _reported(cells, method, "tuned", best, len(accepted), seconds)


def _reported(
    cells: Cells,
    method: Contender,
    variant: str,
    parameters: Mapping[str, Any],
    tried: int = 1,
    tuning_seconds: float = 0.0,
) -> _Configuration:
    name = f"{method.name}, {variant}"
    found = cells.reported(method, name, parameters)
    return _Configuration(
        method.name,
        variant,
        parameters,
        found.outcomes,
        found.cpu_seconds,
        found.peak_bytes,
        cells.measuring_seconds(method) + cells.preparing_seconds(method, parameters),
        tried,
        tuning_seconds,
    )


@dataclass(frozen=True)
class _Yardstick:
    """What the experts and the base score, by which everything else is measured."""

    suite: Suite
    own: Outcomes
    base: Outcomes
    groups: Mapping[str, Sequence[str]]
    """The suite's, without datasets whose own expert scores nothing."""
    kept: Mapping[str, Sequence[str]]
    """Forgetting datasets on which the base scores something, each a group."""
    dropped: tuple[str, ...]
    drawn: Resamples

    def row(self, found: _Configuration, first: Outcomes | None) -> Row:
        scores, expected = self.suite.means(found.outcomes), self.suite.means(self.own)
        relative = relative_score(grouped(scores, self.groups), grouped(expected, self.groups))
        spread = self.drawn.ratios(found.outcomes, self.own, self.groups)
        difference = difference_interval = retained_interval = None
        if first is not None:
            other = relative_means(self.suite.means(first), expected, self.groups)
            difference = relative.value - other
            paired = spread - self.drawn.ratios(first, self.own, self.groups)
            difference_interval = interval(paired)
        if self.kept:
            spared = self.drawn.ratios(found.outcomes, self.base, self.kept)
            retained_interval = interval(spared)
        return Row(
            method=found.method,
            variant=found.variant,
            parameters=found.parameters,
            scores=scores,
            by_task=relative.by_task,
            normalised=relative.value,
            normalised_interval=interval(spread),
            difference=difference,
            difference_interval=difference_interval,
            retained=self.retained(scores),
            retained_interval=retained_interval,
            tried=found.tried,
            tuning_seconds=found.tuning_seconds,
            measuring_seconds=found.measuring_seconds,
            merge_cpu_seconds=found.cpu_seconds,
            merge_peak_bytes=found.peak_bytes,
        )

    def reference(self, outcomes: Outcomes) -> Reference:
        scores = self.suite.means(outcomes)
        normalised = relative_means(scores, self.suite.means(self.own), self.groups)
        return Reference(scores, normalised, self.retained(scores))

    def retained(self, scores: Mapping[str, float]) -> float | None:
        if not self.kept:
            return None
        return relative_means(scores, self.suite.means(self.base), self.kept)


def _yardstick(
    suite: Suite, base: Outcomes, experts: Mapping[str, Outcomes], resamples: int, seed: int
) -> _Yardstick:
    own = {name: experts[task][name] for task, names in suite.groups.items() for name in names}
    scores = suite.means(own)
    groups = {task: [n for n in names if scores[n] > 0] for task, names in suite.groups.items()}
    kept = {name: [name] for name, score in suite.means(base).items() if score > 0}
    sizes = {name: len(each) for name, each in base.items()}
    dropped = [
        f"{task}/{name}"
        for task, names in suite.groups.items()
        for name in names
        if name not in groups[task]
    ]
    dropped += [f"forgetting/{name}" for name in suite.forgetting if name not in kept]
    if not any(groups.values()):
        raise FusekitError(f"suite {suite.name!r}: no expert scores more than 0 on its own task")
    return _Yardstick(
        suite,
        own,
        {name: base[name] for name in suite.forgetting},
        {task: names for task, names in groups.items() if names},
        {name: kept[name] for name in suite.forgetting if name in kept},
        tuple(dropped),
        resample(sizes, resamples, seed, suite.shared_examples, suite.average),
    )
