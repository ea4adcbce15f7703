"""A suite: a base, its experts, and how to score any of their merges; read from YAML."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

from numpy.typing import NDArray

from fusekit.errors import FusekitError, did_you_mean
from fusekit.evaluate.scores import Average, average_score

BUILT_IN = {"digits": Path(__file__).parent / "data" / "digits" / "suite.yml"}
"""Suites by name."""

EVALUATORS = {
    "digits": "fusekit.evaluate.digits:evaluator",
    "harness": "fusekit.evaluate.harness:evaluator",
    "lm": "fusekit.evaluate.lm:evaluator",
    "text": "fusekit.evaluate.text:evaluator",
    "vision": "fusekit.evaluate.vision:evaluator",
}
"""What a suite's YAML may name as `evaluator`: `module:function`, an `EvaluatorFactory`.

Modules are loaded on use, so that a suite costs nothing to those who run another.
"""

CALIBRATION_EXAMPLES = 256
"""Training examples of a task that are at hand for methods that need data."""

Settings = Mapping[str, Any]
"""What stands below `settings:` in a suite's YAML, or after `--set` when one is built."""


class Evaluator(Protocol):
    """Scores a checkpoint example by example."""

    @property
    def identity(self) -> str:
        """What scores depend on besides the checkpoint: settings, data, heads. Keys the cache."""

    def __call__(
        self, checkpoint: Path, split: Any, tasks: Sequence[str]
    ) -> Mapping[str, NDArray[Any]]:
        """For every task what each example of the split scored, in a fixed order.

        Scores are from 0 to 1, or any positive numbers, higher being better; their average over
        examples (the suite says which) is the task's score, and what counts is its ratio to the
        expert's. Accuracies: 0 or 1 per example, arithmetic mean. Perplexities: 1 / perplexity of
        each example (exp of its mean log-likelihood), geometric mean; where examples are equally
        long that is 1 / perplexity of the whole set, and the ratio to the expert's score is the
        expert's perplexity divided by the merge's.
        """


@dataclass(frozen=True, eq=False)
class Calibration:
    """A checkpoint as a torch module, and training examples to run it on.

    Attributes:
        module: gives logits of the task when called on a batch; its parameters and submodules have
            the names of the checkpoint's tensors.
        batches: as `fusekit.calibrate.measure` takes them, with labels; next tokens need none.
        blocks: the name of the module's list of blocks.
        estimator: of Fisher information, as `fusekit.calibrate.measure` knows them.
    """

    module: Any
    batches: Sequence[Any]
    blocks: str
    estimator: Any = "sampled"


@runtime_checkable
class Calibrates(Protocol):
    """An evaluator that can also run experts on training examples, for methods that need data."""

    def calibration(self, checkpoint: Path, task: str) -> Calibration:
        """A checkpoint (an expert, or the base) and at most `CALIBRATION_EXAMPLES` of a task.

        The examples are among those the task's expert was trained on, never of the splits that are
        scored.

        Raises:
            FusekitError: a checkpoint that cannot be loaded, or no training examples of the task.
        """


def no_training_examples(path: Path, task: str) -> FusekitError:
    """What an evaluator raises whose file has none for a task."""
    return FusekitError(
        f"{path}: no training examples of {task!r} for methods that need data; build the suite "
        "again: nothing that is there is trained again"
    )


class EvaluatorFactory(Protocol):
    """Makes an evaluator from a suite's settings."""

    def __call__(self, settings: Settings, folder: Path) -> Evaluator:
        """`folder` is that of the suite's YAML: what relative paths in settings refer to.

        Raises:
            FusekitError: a setting that is unknown (`only_known`), missing or wrong.
        """


def only_known(settings: Settings, known: Sequence[str]) -> None:
    """Refuse settings of any other name.

    Raises:
        FusekitError: names the nearest known setting.
    """
    for key in settings:
        if key not in known:
            expected = did_you_mean(str(key), known) or ", expected no settings"
            raise FusekitError(f"unknown setting {key!r}{expected}")


@dataclass(frozen=True)
class Suite:
    """What a comparison of merging methods runs on.

    Attributes:
        name: for tables and cached results.
        base: the checkpoint the experts were fine-tuned from.
        experts: task -> checkpoint of its expert.
        evaluator: scores a checkpoint; see `Evaluator`.
        datasets: task -> what the evaluator scores for it; the task itself where nothing is said.
            A task's relative score is the mean of those of its datasets.
        forgetting: what the base can do and no expert was trained on, datasets by themselves.
        references: name -> checkpoint that is scored for comparison and not merged, such as a model
            trained on all tasks at once.
        tuning, reporting: splits for choosing parameters and for the table.
        shared_examples: tasks look at the same examples, in the same order.
        average: how a task's score is made from its examples' scores.
        axes: what a study compares suites by, such as `size` (parameters) and `base_quality`,
            numbers that grow with it; suites that differ in another one (`seed`) are compared
            among their like only.
    """

    name: str
    base: Path
    experts: Mapping[str, Path]
    evaluator: Evaluator
    datasets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    forgetting: tuple[str, ...] = ()
    references: Mapping[str, Path] = field(default_factory=dict)
    tuning: str = "validation"
    reporting: str = "test"
    shared_examples: bool = False
    average: Average = "arithmetic"
    axes: Mapping[str, float] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.experts)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """task -> its datasets."""
        return {task: tuple(self.datasets.get(task, (task,))) for task in self.experts}

    @property
    def scored(self) -> tuple[str, ...]:
        """All datasets: those of the tasks, then those of forgetting."""
        return (*itertools.chain(*self.groups.values()), *self.forgetting)

    def means(self, outcomes: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """The score of every dataset from those of its examples."""
        return {name: average_score(each, self.average) for name, each in outcomes.items()}


def load_suite(reference: str | Path) -> Suite:
    """A built-in suite by name, or the suite a YAML file describes.

    Raises:
        FusekitError: no such suite; or a key, evaluator or checkpoint that does not exist.
    """
    import yaml

    path = BUILT_IN.get(str(reference), Path(reference))
    if not path.is_file():
        from fusekit.evaluate.building import BUILDERS  # which imports this module

        if str(reference) in BUILDERS:
            raise FusekitError(
                f"suite {str(reference)!r}: its models are not in the package; build it first: "
                f"fusekit suite build {reference} OUT, then name OUT/suite.yml"
            )
        known = did_you_mean(str(reference), BUILT_IN)
        raise FusekitError(f"suite {str(reference)!r}: neither a file nor a built-in suite{known}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise FusekitError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return _checked(content, path)


_KEYS = {
    "name": str,
    "evaluator": str,
    "base": str,
    "experts": dict,
    "datasets": dict,
    "forgetting": list,
    "references": dict,
    "tuning": str,
    "reporting": str,
    "shared_examples": bool,
    "average": str,
    "axes": dict,
    "settings": dict,
}
_REQUIRED = ("name", "evaluator", "base", "experts")


def _checked(content: Any, path: Path) -> Suite:
    if not isinstance(content, dict):
        raise FusekitError(f"{path}: expected a mapping with the keys {', '.join(_REQUIRED)}")
    for key, value in content.items():
        if key not in _KEYS:
            raise FusekitError(f"{path}: unknown key {key!r}{did_you_mean(str(key), _KEYS)}")
        if not isinstance(value, _KEYS[key]):
            kind = {dict: "mapping", list: "list", str: "text", bool: "true or false"}[_KEYS[key]]
            raise FusekitError(f"{path}: {key}: found {value!r}, expected {kind}")
    for key in _REQUIRED:
        if not content.get(key):
            raise FusekitError(f"{path}: {key} is missing")
    if (average := content.get("average", "arithmetic")) not in get_args(Average):
        known = did_you_mean(average, get_args(Average))
        raise FusekitError(f"{path}: unknown average {average!r}{known}")
    for axis, value in content.get("axes", {}).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FusekitError(f"{path}: axes: {axis}: found {value!r}, expected a number")
    plain = ("name", "tuning", "reporting", "shared_examples", "average", "axes")
    return Suite(
        base=_existing(content["base"], path),
        experts={str(k): _existing(v, path) for k, v in content["experts"].items()},
        evaluator=_evaluator(content["evaluator"], content.get("settings", {}), path),
        datasets=_datasets(content.get("datasets", {}), content["experts"], path),
        forgetting=tuple(map(str, content.get("forgetting", ()))),
        references={str(k): _existing(v, path) for k, v in content.get("references", {}).items()},
        **{key: content[key] for key in plain if key in content},
    )


def _datasets(given: Mapping[Any, Any], experts: Settings, path: Path) -> dict[str, Any]:
    for task, names in given.items():
        if task not in experts:
            known = did_you_mean(str(task), map(str, experts))
            raise FusekitError(f"{path}: datasets: {task!r} is not a task{known}")
        if not isinstance(names, list) or not names:
            raise FusekitError(f"{path}: datasets: {task}: found {names!r}, expected a list")
    return {str(task): tuple(map(str, names)) for task, names in given.items()}


def _existing(reference: Any, path: Path) -> Path:
    place = path.parent / str(reference)
    if not place.exists():
        raise FusekitError(f"{path}: model {str(reference)!r}: no such file or folder ({place})")
    return place


def _evaluator(name: str, settings: Settings, path: Path) -> Evaluator:
    if name not in EVALUATORS:
        raise FusekitError(f"{path}: unknown evaluator {name!r}{did_you_mean(name, EVALUATORS)}")
    factory: EvaluatorFactory = load(EVALUATORS[name])
    try:
        return factory(settings, path.parent)
    except FusekitError as error:
        raise FusekitError(f"{path}: settings: {error}") from None


def load(reference: str) -> Any:
    """What `module:name` refers to; its module is imported now."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
