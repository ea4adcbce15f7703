"""Running a suite: merge by every method, score every merge, and say how sure the scores are."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusekit import __version__
from fusekit.checkpoint.folder import open_checkpoint
from fusekit.errors import FusekitError, RecipeError
from fusekit.evaluate.bootstrap import Interval, Resamples, interval, resample
from fusekit.evaluate.configurations import Skipped, candidates, choose_methods
from fusekit.evaluate.scores import relative_score
from fusekit.evaluate.suite import Suite
from fusekit.methods.base import Method

SCHEMA = "fusekit-suite/1"

Outcomes = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Row:
    """One configuration of one method.

    Attributes:
        method, variant: `default` or `tuned`, with the parameters in `parameters`.
        scores: task -> mean score on the reporting split, forgetting tasks included.
        normalised: mean over the experts' tasks of score / expert's score, with its interval.
        difference: to the reference row (the first), paired, with its interval; None for itself.
        retained: mean over the forgetting tasks of score / base's score; None without such tasks.
        tried: configurations compared on the tuning split, without those the method refused.
        tuning_seconds: CPU seconds that took.
        merge_cpu_seconds, merge_peak_bytes: of the merge alone, in a fresh process.
    """

    method: str
    variant: str
    parameters: Mapping[str, Any]
    scores: Mapping[str, float]
    normalised: float
    normalised_interval: Interval
    difference: float | None
    difference_interval: Interval | None
    retained: float | None
    tried: int
    tuning_seconds: float
    merge_cpu_seconds: float
    merge_peak_bytes: int


@dataclass(frozen=True)
class SuiteResult:
    """The table of a suite, and how it came about."""

    suite: str
    tasks: tuple[str, ...]
    forgetting: tuple[str, ...]
    base: Mapping[str, float]
    experts: Mapping[str, Mapping[str, float]]
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    failed: Mapping[str, str]
    budget: int
    seed: int
    resamples: int

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {"schema": SCHEMA, "version": __version__, **asdict(self)}


def run_suite(
    suite: Suite,
    methods: Sequence[str],
    out: Path,
    *,
    budget: int = 8,
    seed: int = 0,
    resamples: int = 2000,
    on_progress: Callable[[str], None] | None = None,
) -> SuiteResult:
    """Compare merging methods on a suite.

    Every method runs with its defaults, and, where it has something to tune, with the best of
    `budget` configurations on the tuning split (ties: the earlier one, the default being first).
    What has been computed is kept in `out/cells` under the hash of everything it depends on: a
    second run, or one that was interrupted, continues. Writes `results.json` and `results.md`.

    Args:
        suite: what to merge and how to score it.
        methods: names, or `all` for every method that needs no data.
        out: folder for results.
        budget: configurations per method, the default included.
        seed: of random methods, of the tuning's draw and of the bootstrap.
        resamples: of the bootstrap.
        on_progress: called with the name of what is about to be computed.

    Raises:
        RecipeError: there is no method of that name.
        FusekitError: no method left to run, or a checkpoint that cannot be scored.
    """
    chosen, skipped = choose_methods(methods, len(suite.experts))
    if not chosen:
        reasons = "; ".join(f"{skip.method} {skip.reason}" for skip in skipped)
        raise FusekitError(f"suite {suite.name!r}: no method to run ({reasons})")
    cells = _Cells(suite, out, seed, on_progress or (lambda name: None))
    base = cells.outcomes("base", suite.base)
    experts = {task: cells.outcomes(task, path) for task, path in suite.experts.items()}
    own = {task: experts[task][task] for task in suite.tasks}
    sizes = {task: len(hits) for task, hits in own.items()}
    drawn = resample(sizes, resamples, seed, suite.shared_examples, suite.average)
    cells_by_row, failed = _run_methods(cells, chosen, budget)
    rows: list[Row] = []
    reference: Outcomes | None = None
    for found in cells_by_row:
        rows.append(_row(suite, found, base, own, drawn, reference))
        reference = reference if reference is not None else found.outcomes
    result = SuiteResult(
        suite.name,
        suite.tasks,
        suite.forgetting,
        suite.means(base),
        {task: suite.means(outcomes) for task, outcomes in experts.items()},
        tuple(rows),
        tuple(skipped),
        failed,
        budget,
        seed,
        resamples,
    )
    _write(out / "results.json", json.dumps(result.to_dict(), indent=1) + "\n")
    _write(out / "results.md", markdown(result))
    return result


@dataclass(frozen=True)
class _Cell:
    """A configuration that was merged and scored on the reporting split."""

    method: str
    variant: str
    parameters: Mapping[str, Any]
    outcomes: Outcomes
    cpu_seconds: float
    peak_bytes: int
    tried: int = 1
    tuning_seconds: float = 0.0


def _run_methods(
    cells: _Cells, methods: Sequence[Method], budget: int
) -> tuple[list[_Cell], dict[str, str]]:
    """Default and tuned cells in the order of the methods; failures by method."""
    found: list[_Cell] = []
    failed: dict[str, str] = {}
    for method in methods:
        tries = candidates(method, budget, cells.seed)
        try:
            found.append(cells.reported(method, "default", tries[0], 1, 0.0))
        except FusekitError as error:
            failed[method.name] = str(error)
            continue
        if len(tries) > 1:
            accepted = [(each, *score) for each in tries if (score := cells.tuned(method, each))]
            best = max(accepted, key=lambda tried: tried[1])[0]
            seconds = sum(tried[2] for tried in accepted)
            found.append(cells.reported(method, "tuned", best, len(accepted), seconds))
    return found, failed


class _Cells:
    """What has been computed, on disk, by the hash of everything it depends on."""

    def __init__(
        self, suite: Suite, out: Path, seed: int, on_progress: Callable[[str], None]
    ) -> None:
        self.suite = suite
        self.seed = seed
        self.folder = out / "cells"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._say = on_progress
        self._identity = {
            "version": __version__,
            "suite": suite.name,
            "evaluator": suite.evaluator.identity,
            "tasks": [*suite.tasks, *suite.forgetting],
            "inputs": [_content_hash(path) for path in (suite.base, *suite.experts.values())],
        }
        self._expert_scores: dict[str, float] | None = None

    def outcomes(self, name: str, path: Path) -> Outcomes:
        """Scores of a given checkpoint on the reporting split, example by example."""
        key = {"split": self.suite.reporting, "checkpoint": _content_hash(path)}
        stored = self._remembered(f"scoring {name}", key, lambda: {"scores": self._score(path)})
        return _arrays(stored["scores"])

    def reported(
        self, method: Method, variant: str, parameters: dict[str, Any], tried: int, seconds: float
    ) -> _Cell:
        """Merge in a process of its own and score on the reporting split."""
        recipe = self.recipe(method, parameters)
        stored = self._remembered(
            f"{method.name}, {variant}",
            {"split": self.suite.reporting, **self._merge_key(method, parameters)},
            lambda: self._report(recipe),
        )
        return _Cell(
            method.name,
            variant,
            parameters,
            _arrays(stored["scores"]),
            stored["cpu_seconds"],
            stored["peak_bytes"],
            tried,
            seconds,
        )

    def tuned(self, method: Method, parameters: dict[str, Any]) -> tuple[float, float] | None:
        """Normalised score on the tuning split and the CPU seconds it took.

        None for a combination of parameters that the method refuses.
        """
        recipe = self.recipe(method, parameters)
        shown = ", ".join(f"{k} {v:g}" for k, v in parameters.items()) or "defaults"
        try:
            stored = self._remembered(
                f"tuning {method.name}: {shown}",
                {"split": self.suite.tuning, **self._merge_key(method, parameters)},
                lambda: self._tune(recipe),
            )
        except RecipeError:
            return None
        return stored["normalised"], stored["cpu_seconds"]

    def _merge_key(self, method: Method, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {"method": method.name, "parameters": dict(parameters), "seed": self.seed}

    def recipe(self, method: Method, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The merge of all experts by a method."""
        experts = [str(path) for path in self.suite.experts.values()]
        content: dict[str, Any] = {
            "merge_method": method.name,
            "models": [{"model": path} for path in experts],
            "parameters": dict(parameters),
            "seed": self.seed,
        }
        if method.base == "origin":
            content["base_model"] = str(self.suite.base)
        return content

    def _report(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            path, merged = Path(folder) / "recipe.json", Path(folder) / "merged"
            path.write_text(json.dumps(recipe), encoding="utf-8")
            command = [sys.executable, "-m", "fusekit.evaluate.measured_merge", str(path)]
            done = subprocess.run([*command, str(merged)], capture_output=True, text=True)
            if done.returncode != 0:
                raise FusekitError((done.stderr.strip().splitlines() or ["merge failed"])[-1])
            return {**json.loads(done.stdout), "scores": self._score(merged)}

    def _tune(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        from fusekit.engine.run import merge

        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            merged = Path(folder) / "merged"
            merge(dict(recipe), merged, resume=False)
            found = self.suite.evaluator(merged, self.suite.tuning, self.suite.tasks)
        scores, reference = self.suite.means(found), self._experts_when_tuning()
        value = _relative(scores, reference, self.suite.tasks)
        return {"normalised": value, "cpu_seconds": time.process_time() - began}

    def _experts_when_tuning(self) -> dict[str, float]:
        if self._expert_scores is None:
            suite = self.suite
            self._expert_scores = {
                task: suite.means(suite.evaluator(path, suite.tuning, [task]))[task]
                for task, path in suite.experts.items()
            }
        return self._expert_scores

    def _score(self, path: Path) -> dict[str, list[float]]:
        tasks = [*self.suite.tasks, *self.suite.forgetting]
        found = self.suite.evaluator(path, self.suite.reporting, tasks)
        return {task: np.asarray(found[task], dtype=float).tolist() for task in tasks}

    def _remembered(
        self, name: str, key: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        identity = json.dumps({**self._identity, **key}, sort_keys=True)
        path = self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
        if path.is_file():
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return stored
        self._say(name)
        computed = compute()
        _write(path, json.dumps(computed))
        return computed


def _row(
    suite: Suite,
    cell: _Cell,
    base: Outcomes,
    own: Outcomes,
    drawn: Resamples,
    reference: Outcomes | None,
) -> Row:
    scores, expected = suite.means(cell.outcomes), suite.means(own)
    normalised = _relative(scores, expected, suite.tasks)
    spread = drawn.ratios(cell.outcomes, own)
    difference = difference_interval = None
    if reference is not None:
        difference = normalised - _relative(suite.means(reference), expected, suite.tasks)
        difference_interval = interval(spread - drawn.ratios(reference, own))
    return Row(
        cell.method,
        cell.variant,
        cell.parameters,
        scores,
        normalised,
        interval(spread),
        difference,
        difference_interval,
        _relative(scores, suite.means(base), suite.forgetting) if suite.forgetting else None,
        cell.tried,
        cell.tuning_seconds,
        cell.cpu_seconds,
        cell.peak_bytes,
    )


def _relative(
    scores: Mapping[str, float], reference: Mapping[str, float], tasks: Sequence[str]
) -> float:
    """`relative_score` where every task is one dataset."""
    return relative_score(
        {task: {task: scores[task]} for task in tasks},
        {task: {task: reference[task]} for task in tasks},
    ).value


def markdown(result: SuiteResult) -> str:
    """The result as a Markdown table: absolute scores in %, the rest as the head says."""
    shown = [*result.tasks, *result.forgetting]
    head = ["model", *shown, "normalised [95 %]", "vs first [95 %]", "retained"]
    head += ["merge CPU s", "peak MB", "tried"]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    blank = ["-"] * 6
    lines.append(_line(["base", *(_percent(result.base[task]) for task in shown), *blank]))
    own = [_percent(result.experts[task][task]) for task in result.tasks]
    lines.append(_line(["expert of the task", *own, *["-"] * len(result.forgetting), *blank]))
    for row in result.rows:
        cells = [label(row), *(_percent(row.scores[task]) for task in shown)]
        cells += [_with_interval(row.normalised, row.normalised_interval)]
        cells += [
            "-"
            if row.difference is None or row.difference_interval is None
            else _with_interval(row.difference, row.difference_interval, "+.3f")
        ]
        cells += ["-" if row.retained is None else f"{row.retained:.3f}"]
        cells += [f"{row.merge_cpu_seconds:.2f}", f"{row.merge_peak_bytes / 1e6:.0f}"]
        lines.append(_line([*cells, str(row.tried)]))
    notes = [f"Suite {result.suite}: one model for all {len(result.tasks)} tasks; scores in %."]
    notes.append(
        "normalised: mean over tasks of score / expert's score; retained: mean over "
        f"{', '.join(result.forgetting) or 'no tasks'} of score / base's score. Intervals: paired "
        f"bootstrap over examples, {result.resamples} resamples. Tuned: best of at most "
        f"{result.budget} configurations on validation data. Seed {result.seed}. CPU and memory of "
        "a merge in a fresh process, start-up of kernels included."
    )
    notes += [f"Left out: {skip.method} ({skip.reason})." for skip in result.skipped]
    notes += [f"Failed: {method} ({reason})." for method, reason in result.failed.items()]
    return "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n"


def label(row: Row) -> str:
    """`ties, tuned (density 0.3, lambda 1)`."""
    values = ", ".join(f"{name} {value:g}" for name, value in row.parameters.items())
    if row.variant == "default":
        return f"{row.method}, default"
    return f"{row.method}, tuned ({values or 'to the default'})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _with_interval(value: float, bounds: Interval, form: str = ".3f") -> str:
    return f"{value:{form}} [{bounds[0]:{form}}, {bounds[1]:{form}}]"


def _arrays(stored: Mapping[str, Sequence[float]]) -> Outcomes:
    return {task: np.array(values, dtype=np.float64) for task, values in stored.items()}


def _content_hash(path: Path) -> str:
    """A digest of every tensor of a checkpoint: names, types, shapes and bytes."""
    import xxhash

    digest = xxhash.xxh3_128()
    source = open_checkpoint(str(path)).source
    try:
        for name in sorted(source.tensors):
            info = source.tensors[name]
            digest.update(f"{name} {info.dtype.name} {info.shape}".encode())
            step = 1 << 20
            for start in range(0, info.size, step):
                stop = min(start + step, info.size)
                raw = np.empty((stop - start) * info.dtype.itemsize, np.uint8)
                source.read_into(name, start, stop, raw.data)
                digest.update(raw.data)
    finally:
        source.close()
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    """Whole or not at all: an interrupted run leaves no half-written cell."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
