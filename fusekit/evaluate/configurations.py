"""Which methods a suite can run, with which parameters: defaults, and what tuning may try."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusekit.errors import RecipeError, did_you_mean
from fusekit.evaluate.data_methods import DATA_METHODS, DataMethod
from fusekit.methods.base import Method, Tensor
from fusekit.methods.registry import available, find

Contender = Method | DataMethod
"""What a suite can compare."""

REQUIRED_VALUES: Mapping[str, Any] = {"weight": 1.0, "t": 0.5}
"""What the default configuration gives parameters that have no default: all models alike."""

CANDIDATES: Mapping[str, tuple[float, ...]] = {
    "lambda": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5),
    "density": (0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
    "t": (0.1, 0.3, 0.5, 0.7, 0.9),
    "ratio": (0.05, 0.1, 0.2, 0.4),
    "select_topk": (0.1, 0.3, 0.5, 0.8, 1.0),
    "alpha": (0.2, 0.3, 0.4, 0.6, 0.8, 1.0),
    "tall_lambda": (0.2, 0.4, 0.6),
    "r": (0.05, 0.1, 0.2, 0.4),
    "common_space_fraction": (0.2, 0.5, 0.8),
    "scale": (0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
}
"""Values that tuning may give a parameter of that name."""


ALL = "all"
"""In the place of a name: every method that needs no data."""

METHOD_SETS: Mapping[str, tuple[str, ...]] = {
    "mergebench": (
        "linear",
        "task_arithmetic",
        "ties",
        "dare_linear",
        "consensus",
        "fisher",
        "regmean",
        "localize_and_stitch",
    ),
    "scale": ("linear", "task_arithmetic", "ties", "dare_ties"),
}
"""The methods of a published comparison under one name.

MergeBench: arXiv 2505.10833. What Matters for Model Merging at Scale?: arXiv 2410.03617.
"""


@dataclass(frozen=True)
class Skipped:
    """A method that the suite cannot run, and why."""

    method: str
    reason: str


def choose_methods(
    wanted: Sequence[str], models: int, calibrates: bool = False
) -> tuple[list[Contender], list[Skipped]]:
    """The methods to run, and those left out.

    Args:
        wanted: names, of methods, of `DATA_METHODS` or of `METHOD_SETS`; `all` stands for every
            method that merges this many models without data.
        models: how many experts the suite has.
        calibrates: whether the suite has training examples for methods that need data.

    Raises:
        RecipeError: there is no method of that name.
    """
    named = _spelt_out(wanted)
    names = dict.fromkeys(itertools.chain(*(available() if n == ALL else (n,) for n in named)))
    runs: list[Contender] = []
    skipped: list[Skipped] = []
    for method in map(_named, names):
        reason = why_not(method, models, calibrates and method.name in named)
        if reason is None:
            runs.append(method)
        else:
            skipped.append(Skipped(method.name, reason))
    return runs, skipped


def _spelt_out(wanted: Sequence[str]) -> list[str]:
    names = itertools.chain.from_iterable(METHOD_SETS.get(name, (name,)) for name in wanted)
    return list(dict.fromkeys(names))


def _named(name: str) -> Contender:
    if name in DATA_METHODS:
        return DATA_METHODS[name]
    known = (*available(), *DATA_METHODS, *METHOD_SETS)
    if name not in known:
        raise RecipeError(f"unknown method {name!r}{did_you_mean(name, known)}")
    return find(name)


def why_not(method: Contender, models: int, calibrates: bool) -> str | None:
    """Why a method cannot merge this many models, or None if it can."""
    if isinstance(method, DataMethod):
        if not calibrates:
            return "needs training examples, which this suite does not have"
        return None if _has_torch() else "needs the [torch] extra"
    given = {*REQUIRED_VALUES, *(["statistics"] if calibrates else [])}
    unset = [p.name for p in method.parameters if p.required and p.name not in given]
    if unset:
        return f"needs {', '.join(unset)}"
    if models < method.min_models or (method.max_models or models) < models:
        return f"does not merge {models} models"
    if method.side is not None:
        return "makes one model per task, not one for all"
    if method.matrix is not None and not _has_torch():
        return "needs the [torch] extra"
    return None


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def statistic_of(method: Contender) -> str | None:
    """What has to be measured on every expert for a method: `fisher`, `gram`; None for nothing."""
    if isinstance(method, DataMethod) or method.statistic is None:
        return None
    any_matrix = Tensor("any.weight", (1, 1), 1, 1, None, 1, False, {}, ({},))
    return method.statistic(any_matrix).rpartition("/")[2]


def default_parameters(method: Contender) -> dict[str, Any]:
    """The method's own defaults: only what has none is set."""
    known = (p.name for p in method.parameters if p.required and p.name in REQUIRED_VALUES)
    return {name: REQUIRED_VALUES[name] for name in known}


def candidates(method: Contender, budget: int, seed: int) -> list[dict[str, Any]]:
    """At most `budget` configurations, the default first, the rest drawn without repetition.

    Drawn from the grid of `CANDIDATES` over the method's parameters; the draw depends on the seed
    and the method's name alone.
    """
    default = default_parameters(method)
    knobs = {
        p.name: [value for value in CANDIDATES[p.name] if _accepts(p.check, value)]
        for p in method.parameters
        if p.name in CANDIDATES
    }
    own = {p.name: p.default for p in method.parameters if not p.required} | default
    grid = [dict(zip(knobs, values, strict=True)) for values in itertools.product(*knobs.values())]
    fresh = [point for point in grid if any(own[name] != value for name, value in point.items())]
    generator = np.random.default_rng([seed, *method.name.encode()])
    order = generator.permutation(len(fresh))[: budget - 1]
    return [default, *({**default, **fresh[i]} for i in order)]


def _accepts(check: Any, value: float) -> bool:
    try:
        check(value)
    except ValueError:
        return False
    return True
