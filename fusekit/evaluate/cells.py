"""What running a suite computes, kept on disk under the hash of everything it depends on."""

from __future__ import annotations

import hashlib
import json
import shutil
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
from fusekit.errors import RecipeError
from fusekit.evaluate.configurations import Contender, statistic_of
from fusekit.evaluate.data_methods import DataMethod, measure_expert
from fusekit.evaluate.measured_merge import Workers
from fusekit.evaluate.scores import relative_score
from fusekit.evaluate.suite import Suite
from fusekit.methods.base import Method
from fusekit.methods.registry import find

Outcomes = dict[str, NDArray[Any]]
"""dataset -> what every example of the split scored."""

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Reported:
    """A merge that was measured, and scored on the reporting split."""

    outcomes: Outcomes
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Tried:
    """A merge that was scored on the tuning split; CPU seconds of both."""

    normalised: float
    cpu_seconds: float


class Cells:
    """The results of a suite, computed when they are first asked for.

    Args:
        suite: what to merge and how to score it.
        out: folder whose `cells` and `statistics` hold what has been computed.
        seed: of random methods.
        threads: of every merge.
        workers: where merges are measured.
        on_progress: called with the name of what is about to be computed.
    """

    def __init__(
        self,
        suite: Suite,
        out: Path,
        seed: int,
        threads: int | None,
        workers: Workers,
        on_progress: Callable[[str], None],
    ) -> None:
        self.suite = suite
        self.seed = seed
        self._threads = threads
        self._out = out
        self._cells = out / "cells"
        self._cells.mkdir(parents=True, exist_ok=True)
        self._say = on_progress
        self._digests = {
            path: content_hash(path)
            for path in (suite.base, *suite.experts.values(), *suite.references.values())
        }
        self._evaluator = {"version": __version__, "evaluator": suite.evaluator.identity}
        self._workers = workers
        self._expert_scores: dict[str, float] | None = None

    def outcomes(self, name: str, path: Path) -> Outcomes:
        """Scores of a given checkpoint on the reporting split, example by example."""
        key = {"checkpoint": self._digests[path], "split": self.suite.reporting}
        scored = {**self._evaluator, **key, "datasets": self.suite.scored}
        return _arrays(self._remembered(f"scoring {name}", scored, lambda: self._score(path)))

    def reported(self, method: Contender, name: str, parameters: Parameters) -> Reported:
        """Merge in a process of its own and score on the reporting split."""

        def compute() -> dict[str, Any]:
            recipe = self.recipe(method, parameters)
            with tempfile.TemporaryDirectory() as folder:
                merged = Path(folder) / "merged"
                cost = self._workers.of(_merger(method)).merge(recipe, merged)
                return {"cost": asdict(cost), "scores": self._score(merged)}

        key = {"split": self.suite.reporting, "datasets": self.suite.scored, "measured": True}
        found = self._remembered(name, self._key(method, parameters, key), compute)
        return Reported(_arrays(found["scores"]), **found["cost"])

    def tried(self, method: Contender, parameters: Parameters) -> Tried | None:
        """Merge and score on the tuning split; None for what the method refuses."""

        def compute() -> dict[str, Any]:
            from fusekit.engine.run import merge

            recipe = self.recipe(method, parameters)
            self._experts_when_tuning()
            began = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                merged = Path(folder) / "merged"
                try:
                    merge(dict(recipe), merged, threads=self._threads, resume=False)
                except RecipeError as error:
                    return {"refused": str(error)}
                found = self.suite.evaluator(merged, self.suite.tuning, self._of_tasks)
            value = relative_means(
                self.suite.means(found), self._experts_when_tuning(), self.suite.groups
            )
            return {"normalised": value, "cpu_seconds": time.process_time() - began}

        key = {"split": self.suite.tuning, "datasets": self._of_tasks, "tuning": True}
        name = f"tuning {method.name}: {_shown(parameters)}"
        found = self._remembered(name, self._key(method, parameters, key), compute)
        return None if "refused" in found else Tried(**found)

    def measuring_seconds(self, method: Contender) -> float:
        """CPU seconds that measuring the experts for a method took; 0 where it needs nothing."""
        statistic = statistic_of(method)
        if statistic is None:
            return 0.0
        return sum(self._statistics(task, statistic)[1] for task in self.suite.experts)

    def preparing_seconds(self, method: Contender, parameters: Parameters) -> float:
        """CPU seconds that preparing one configuration took, of methods that prepare each."""
        if not isinstance(method, DataMethod):
            return 0.0
        stored = json.loads(self._place(self._preparing_key(method, parameters)).read_text())
        return float(stored["cpu_seconds"])

    def forget_prepared(self) -> None:
        """Remove checkpoints that were prepared to be merged: whole models, once for each try."""
        shutil.rmtree(self._out / "prepared", ignore_errors=True)

    def recipe(self, method: Contender, parameters: Parameters) -> dict[str, Any]:
        """The merge of all experts by a method; what it needs of data is measured or made first."""
        merger = _merger(method)
        if isinstance(method, DataMethod):
            models = [{"model": str(path)} for path in self._prepared(method, parameters)]
            parameters = method.merging
        else:
            models = self._models(statistic_of(method))
        content: dict[str, Any] = {
            "merge_method": merger.name,
            "models": models,
            "parameters": dict(parameters),
            "seed": self.seed,
        }
        if merger.base == "origin":
            content["base_model"] = str(self.suite.base)
        return content

    def _models(self, statistic: str | None) -> list[dict[str, Any]]:
        """The experts as a recipe lists them, with their files of statistics if there are any."""
        models: list[dict[str, Any]] = [{"model": str(p)} for p in self.suite.experts.values()]
        if statistic is not None:
            for model, task in zip(models, self.suite.experts, strict=True):
                path = self._statistics(task, statistic)[0]
                model["parameters"] = {"statistics": str(path.resolve())}
        return models

    @property
    def _of_tasks(self) -> tuple[str, ...]:
        return tuple(name for names in self.suite.groups.values() for name in names)

    def _key(
        self, method: Contender, parameters: Parameters, what: Mapping[str, Any]
    ) -> dict[str, Any]:
        inputs = [self._digests[p] for p in (self.suite.base, *self.suite.experts.values())]
        merge = {"method": method.name, "parameters": dict(parameters), "seed": self.seed}
        return {**self._evaluator, "inputs": inputs, "groups": self.suite.groups, **merge, **what}

    def _statistics(self, task: str, statistic: str) -> tuple[Path, float]:
        """An expert's file of statistics and the CPU seconds it took to measure."""
        expert = self._digests[self.suite.experts[task]]
        key = {**self._evaluator, "expert": expert, "task": task, "statistic": statistic}
        path = self._out / "statistics" / f"{task}-{statistic}-{_digest(key)}.safetensors"

        def compute() -> dict[str, Any]:
            path.parent.mkdir(exist_ok=True)
            began = time.process_time()
            measure_expert(self.suite, task, statistic, path)
            return {"cpu_seconds": time.process_time() - began}

        if not path.is_file():
            self._place(key).unlink(missing_ok=True)
        found = self._remembered(f"measuring {statistic} of {task}", key, compute)
        return path, float(found["cpu_seconds"])

    def _preparing_key(self, method: DataMethod, parameters: Parameters) -> dict[str, Any]:
        return self._key(method, method.complete(parameters), {"preparing": True})

    def _prepared(self, method: DataMethod, parameters: Parameters) -> list[Path]:
        """What a method prepares of the experts; kept until `forget_prepared`."""
        key = self._preparing_key(method, parameters)
        folder = self._out / "prepared" / _digest(key)

        def compute() -> dict[str, Any]:
            began = time.process_time()
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            made = method.prepare(self.suite, method.complete(parameters), partial)
            partial.rename(folder)
            seconds = time.process_time() - began
            return {"cpu_seconds": seconds, "made": [path.name for path in made]}

        if not folder.is_dir():
            self._place(key).unlink(missing_ok=True)
        found = self._remembered(f"preparing {method.name}: {_shown(parameters)}", key, compute)
        return [folder / name for name in found["made"]]

    def _experts_when_tuning(self) -> dict[str, float]:
        if self._expert_scores is None:
            suite = self.suite
            self._expert_scores = {}
            for task, path in suite.experts.items():
                found = suite.evaluator(path, suite.tuning, suite.groups[task])
                self._expert_scores |= suite.means(found)
        return self._expert_scores

    def _score(self, path: Path) -> dict[str, list[float]]:
        found = self.suite.evaluator(path, self.suite.reporting, self.suite.scored)
        return {name: np.asarray(found[name], dtype=float).tolist() for name in self.suite.scored}

    def _remembered(
        self, name: str, key: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        path = self._place(key)
        if path.is_file():
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return stored
        self._say(name)
        computed = compute()
        write_whole(path, json.dumps(computed))
        return computed

    def _place(self, key: Mapping[str, Any]) -> Path:
        return self._cells / f"{_digest(key)}.json"


def _merger(method: Contender) -> Method:
    """The registry's method that does the merging."""
    return find(method.method) if isinstance(method, DataMethod) else method


def _shown(parameters: Parameters) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in parameters.items()) or "defaults"


def relative_means(
    scores: Mapping[str, float],
    reference: Mapping[str, float],
    groups: Mapping[str, Sequence[str]],
) -> float:
    """`relative_score` of flat scores whose datasets are grouped by task."""
    return relative_score(grouped(scores, groups), grouped(reference, groups)).value


def grouped(
    scores: Mapping[str, float], groups: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """task -> dataset -> score."""
    return {task: {name: scores[name] for name in names} for task, names in groups.items()}


def content_hash(path: Path) -> str:
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


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all: an interrupted run leaves no half-written file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _arrays(stored: Mapping[str, Sequence[float]]) -> Outcomes:
    return {name: np.array(values, dtype=np.float64) for name, values in stored.items()}
