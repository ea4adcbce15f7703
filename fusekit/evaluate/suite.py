"""A suite: a base, its experts, and how to score any of their merges; read from YAML."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from fusekit.errors import FusekitError, did_you_mean

BUILT_IN = {"digits": Path(__file__).parent / "data" / "digits" / "suite.yml"}
"""Suites by name."""

EVALUATORS = {"digits": "fusekit.evaluate.digits:correct"}
"""Evaluators a suite's YAML may name: `module:function`, loaded on use."""


class Evaluator(Protocol):
    """Scores a checkpoint example by example."""

    def __call__(
        self, checkpoint: Path, split: Any, tasks: Sequence[str]
    ) -> Mapping[str, NDArray[Any]]:
        """For every task what each example of the split scored (0 to 1), in a fixed order."""


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
    """

    name: str
    base: Path
    experts: Mapping[str, Path]
    evaluator: Evaluator
    forgetting: tuple[str, ...] = ()
    tuning: str = "validation"
    reporting: str = "test"
    shared_examples: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.experts)


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
    given = {k: v for k, v in content.items() if k not in {"evaluator", "base", "experts"}}
    given["forgetting"] = tuple(map(str, content.get("forgetting", ())))
    return Suite(
        base=_existing(content["base"], path),
        experts={str(k): _existing(v, path) for k, v in content["experts"].items()},
        evaluator=_evaluator(content["evaluator"], path),
        **given,
    )


def _existing(reference: Any, path: Path) -> Path:
    place = path.parent / str(reference)
    if not place.exists():
        raise FusekitError(f"{path}: model {str(reference)!r}: no such file or folder ({place})")
    return place


def _evaluator(name: str, path: Path) -> Evaluator:
    if name not in EVALUATORS:
        raise FusekitError(f"{path}: unknown evaluator {name!r}{did_you_mean(name, EVALUATORS)}")
    module, _, function = EVALUATORS[name].partition(":")
    evaluator: Evaluator = getattr(importlib.import_module(module), function)
    return evaluator
