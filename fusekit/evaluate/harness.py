"""Scoring causal language models with tasks of the lm-evaluation-harness, example by example.

The merged checkpoint is loaded once and handed over in memory. Tasks are the harness's own or local
YAML files; nothing but their data sets is fetched, and local ones need no network.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusekit.errors import FusekitError, MissingExtraError, did_you_mean
from fusekit.evaluate.pretrained import load_pretrained, quiet
from fusekit.evaluate.suite import Settings, only_known


@dataclass(frozen=True)
class HarnessSettings:
    """What a suite's YAML may set.

    Attributes:
        tasks: what the suite scores -> split -> task of the harness. A group of tasks counts as
            one: all its examples together.
        include: folder with local task files, or None.
        metric: what the suite scores -> metric as the harness names it, `acc` or
            `exact_match,strict-match`.
        limit: only so many examples per task, or None for all.
        fewshot: examples in the prompt; None for what the task says.
        batch: examples in one forward pass.
        device, dtype: where and in which precision the model runs, in torch's words.
    """

    tasks: Mapping[str, Mapping[str, str]]
    include: Path | None = None
    metric: Mapping[str, str] | None = None
    limit: int | None = None
    fewshot: int | None = None
    batch: int = 8
    device: str = "cpu"
    dtype: str = "auto"


class HarnessEvaluator:
    """An `Evaluator`: the metric of every example of a harness task, higher being better."""

    def __init__(self, settings: HarnessSettings) -> None:
        self._settings = settings
        self.identity = f"harness {_version()} {_digest(settings)}"

    def __call__(
        self, checkpoint: Path, split: str, tasks: Sequence[str]
    ) -> Mapping[str, NDArray[np.float64]]:
        names = {task: self._harness_task(task, split) for task in tasks}
        manager = _task_manager(self._settings.include, tuple(names.values()))
        model = self._load(checkpoint)
        return {
            task: self._scores(model, task, name, manager, checkpoint)
            for task, name in names.items()
        }

    def _harness_task(self, task: str, split: str) -> str:
        if task not in self._settings.tasks:
            known = did_you_mean(task, self._settings.tasks)
            raise FusekitError(f"tasks: nothing is said of the suite's task {task!r}{known}")
        names = self._settings.tasks[task]
        if split not in names:
            raise FusekitError(
                f"tasks: {task!r} has no task of the harness for the split {split!r}, only for "
                f"{', '.join(names)}; give one, or run without tuning (--budget 1)"
            )
        return names[split]

    def _load(self, checkpoint: Path) -> Any:
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        model = load_pretrained("AutoModelForCausalLM", checkpoint, self._settings.dtype)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            sentence = " ".join(str(error).split())
            raise FusekitError(f"{checkpoint}: no tokenizer can be loaded: {sentence}") from None
        return HFLM(
            pretrained=model.to(self._settings.device),
            tokenizer=tokenizer,
            batch_size=self._settings.batch,
        )

    def _scores(
        self, model: Any, task: str, name: str, manager: Any, checkpoint: Path
    ) -> NDArray[np.float64]:
        import lm_eval

        with quiet():
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=[name],
                task_manager=manager,
                num_fewshot=self._settings.fewshot,
                limit=self._settings.limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        metric = (self._settings.metric or {}).get(task, "acc")
        values = [
            value
            for subtask in sorted(results["samples"])
            for value in example_scores(results["samples"][subtask], metric, subtask)
        ]
        plain, _, _ = metric.partition(",")
        if not all(each.get(plain, True) for each in results["higher_is_better"].values()):
            raise FusekitError(f"metric {metric!r} of {name!r}: lower is better, expected higher")
        scores = np.array(values, np.float64)
        if not np.isfinite(scores).all():
            raise FusekitError(f"{checkpoint}: {metric!r} of {name!r} is not finite")
        return scores


def example_scores(samples: Sequence[Mapping[str, Any]], metric: str, task: str) -> list[float]:
    """One number per example, in the order of the examples, from the harness's log of samples.

    Raises:
        FusekitError: the task has no such metric or filter, or the metric is no number per example.
    """
    plain, _, wanted = metric.partition(",")
    known = list(dict.fromkeys(str(sample["filter"]) for sample in samples))
    chosen = wanted or known[0]
    if chosen not in known:
        raise FusekitError(f"task {task!r} has no filter {chosen!r}{did_you_mean(chosen, known)}")
    own = sorted((s for s in samples if s["filter"] == chosen), key=lambda s: int(s["doc_id"]))
    metrics = [str(each) for each in own[0]["metrics"]]
    if plain not in metrics:
        raise FusekitError(f"task {task!r} has no metric {plain!r}{did_you_mean(plain, metrics)}")
    values = [sample[plain] for sample in own]
    if not all(isinstance(value, (int, float, np.number, np.bool_)) for value in values):
        raise FusekitError(
            f"task {task!r}: metric {plain!r} is not one number per example; choose another of "
            f"{', '.join(metrics)}"
        )
    return [float(value) for value in values]


def evaluator(settings: Settings, folder: Path) -> HarnessEvaluator:
    """An `EvaluatorFactory`; settings are the attributes of `HarnessSettings`.

    `tasks` maps the suite's tasks to tasks of the harness, or by split (`validation` for tuning,
    `test` for reporting) where both are wanted. A relative `include` starts from `folder`.

    Raises:
        MissingExtraError: the harness is not installed.
        FusekitError: a setting that is unknown, missing or wrong.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("the harness evaluator", "evaluate")
    given = dict(settings)
    only_known(given, tuple(HarnessSettings.__dataclass_fields__))
    tasks = given.get("tasks")
    if not isinstance(tasks, dict) or not tasks:
        raise FusekitError(f"tasks: found {tasks!r}, expected suite tasks and their harness tasks")
    given["tasks"] = {str(task): _by_split(str(task), value) for task, value in tasks.items()}
    for name, least in (("limit", 1), ("fewshot", 0), ("batch", 1)):
        value = given.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise FusekitError(f"{name}: found {value!r}, expected a whole number from {least} on")
    metric = given.get("metric")
    if isinstance(metric, str):
        given["metric"] = dict.fromkeys(given["tasks"], metric)
    elif metric is not None and not isinstance(metric, dict):
        raise FusekitError(f"metric: found {metric!r}, expected a name, or one per task")
    if "include" in given:
        given["include"] = folder / str(given["include"])
        if not given["include"].is_dir():
            raise FusekitError(f"include: {given['include']} is no folder of task files")
    return HarnessEvaluator(HarnessSettings(**given))


def _by_split(task: str, value: Any) -> dict[str, str]:
    """A name stands for the test split: tuning must not look at what is reported."""
    if isinstance(value, str):
        return {"test": value}
    if isinstance(value, dict) and value:
        return {str(split): str(name) for split, name in value.items()}
    raise FusekitError(f"tasks: {task!r}: found {value!r}, expected a harness task, or one a split")


def _task_manager(include: Path | None, names: Sequence[str]) -> Any:
    """The harness's index of tasks; its own thousands are only read if local ones do not do."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = None if include is None else str(include)
    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or not set(names) <= set(manager.task_index):
        manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.task_index:
            near = did_you_mean(name, manager.task_index)
            shown = near if "did you mean" in near else ""
            raise FusekitError(f"the harness has no task {name!r}{shown}")
    return manager


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _digest(settings: HarnessSettings) -> str:
    """Of the settings and of every file in the folder of local tasks."""
    digest = hashlib.sha256(json.dumps(vars(settings), default=str, sort_keys=True).encode())
    files = sorted(settings.include.rglob("*")) if settings.include else []
    for path in files:
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
