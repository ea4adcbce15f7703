"""A suite: a base, its experts, and how to score any of their merges; read from YAML."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

from numpy.typing import NDArray

from fusekit.errors import FusekitError, did_you_mean
from fusekit.evaluate.scores import Average, average_score

BUILT_IN = {"digits": Path(__file__).parent / "data" / "digits" / "suite.yml"}
"""Suites by name."""

EVALUATORS = {"digits": "fusekit.evaluate.digits:evaluator"}
"""What a suite's YAML may name as `evaluator`: `module:function`, an `EvaluatorFactory`.

Modules are loaded on use, so that a suite costs nothing to those who run another.
"""

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
        forgetting: tasks the base can do and no expert was trained on.
        tuning, reporting: splits for choosing parameters and for the table.
        shared_examples: tasks look at the same examples, in the same order.
        average: how a task's score is made from its examples' scores.
    """

    name: str
    base: Path
    experts: Mapping[str, Path]
    evaluator: Evaluator
    forgetting: tuple[str, ...] = ()
    tuning: str = "validation"
    reporting: str = "test"
    shared_examples: bool = False
    average: Average = "arithmetic"

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.experts)

    def means(self, outcomes: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """The score of every task from those of its examples."""
        return {task: average_score(each, self.average) for task, each in outcomes.items()}


def load_suite(reference: str | Path) -> Suite:
    """A built-in suite by name, or the suite a YAML file describes.

    Raises:
        FusekitError: no such suite; or a key, evaluator or checkpoint that does not exist.
    """
    import yaml

    path = BUILT_IN.get(str(reference), Path(reference))
    if not path.is_file():
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
    "forgetting": list,
    "tuning": str,
    "reporting": str,
    "shared_examples": bool,
    "average": str,
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
    made = {"evaluator", "base", "experts", "settings"}
    given = {key: value for key, value in content.items() if key not in made}
    given["forgetting"] = tuple(map(str, content.get("forgetting", ())))
    return Suite(
        base=_existing(content["base"], path),
        experts={str(k): _existing(v, path) for k, v in content["experts"].items()},
        evaluator=_evaluator(content["evaluator"], content.get("settings", {}), path),
        **given,
    )


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
