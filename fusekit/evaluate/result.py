"""What running a suite gives: rows of scores, relative scores and costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusekit import __version__
from fusekit.errors import FusekitError
from fusekit.evaluate.bootstrap import Interval
from fusekit.evaluate.configurations import Skipped

SCHEMA = "fusekit-suite/2"


@dataclass(frozen=True)
class Reference:
    """A model that is scored and not merged: the base, or one the suite names.

    `normalised` and `retained` as of `Row`.
    """

    scores: Mapping[str, float]
    normalised: float
    retained: float | None


@dataclass(frozen=True)
class Row:
    """One configuration of one method.

    Attributes:
        method, variant: `default` or `tuned`, with the parameters in `parameters`.
        scores: dataset -> score on the reporting split, forgetting included.
        by_task: task -> mean over its datasets of score / expert's score.
        normalised: mean of `by_task`, with its interval (MergeBench's normalised performance, the
            held-in score of What Matters at Scale).
        difference: to the reference row (the first), paired, with its interval; None for itself.
        retained: mean over the forgetting datasets of score / base's score (normalised
            generalisation, held-out score), with its interval; None without such datasets.
        tried: configurations compared on the tuning split, without those the method refused.
        tuning_seconds: CPU seconds that took, merging and scoring.
        measuring_seconds: CPU seconds of measuring the experts on data, for methods that need it.
        merge_cpu_seconds, merge_peak_bytes: of the merge alone, see `MeasuredMerges`.
    """

    method: str
    variant: str
    parameters: Mapping[str, Any]
    scores: Mapping[str, float]
    by_task: Mapping[str, float]
    normalised: float
    normalised_interval: Interval
    difference: float | None
    difference_interval: Interval | None
    retained: float | None
    retained_interval: Interval | None
    tried: int
    tuning_seconds: float
    measuring_seconds: float
    merge_cpu_seconds: float
    merge_peak_bytes: int

    @property
    def total_seconds(self) -> float:
        """CPU seconds from experts to the merge: measuring, tuning and merging."""
        return self.measuring_seconds + self.tuning_seconds + self.merge_cpu_seconds


@dataclass(frozen=True)
class SuiteResult:
    """The table of a suite, and how it came about.

    Attributes:
        groups: task -> its datasets.
        references: `base` and whatever the suite names.
        experts: task of the expert -> dataset -> its score, its own tasks and all others.
        dropped: `task/dataset` that no ratio counts: the expert (or, for forgetting, the base)
            scored nothing there.
    """

    suite: str
    groups: Mapping[str, tuple[str, ...]]
    forgetting: tuple[str, ...]
    references: Mapping[str, Reference]
    experts: Mapping[str, Mapping[str, float]]
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    failed: Mapping[str, str]
    dropped: tuple[str, ...]
    budget: int
    seed: int
    resamples: int

    @property
    def datasets(self) -> tuple[str, ...]:
        """Those of the tasks."""
        return tuple(name for names in self.groups.values() for name in names)

    def own_scores(self) -> dict[str, float]:
        """What every dataset's own expert scores."""
        return {
            name: self.experts[task][name] for task, names in self.groups.items() for name in names
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {"schema": SCHEMA, "version": __version__, **asdict(self)}


def read_result(path: Path) -> SuiteResult:
    """The result in a `results.json`, as `run_suite` writes it.

    Raises:
        FusekitError: an unreadable file, or another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FusekitError(f"{path}: cannot be read: {error}") from None
    found = content.get("schema") if isinstance(content, dict) else None
    if found != SCHEMA:
        raise FusekitError(f"{path}: schema {found!r}, expected {SCHEMA!r}")
    del content["schema"], content["version"]
    return SuiteResult(
        **{
            **content,
            "groups": {task: tuple(names) for task, names in content["groups"].items()},
            "forgetting": tuple(content["forgetting"]),
            "references": {k: Reference(**v) for k, v in content["references"].items()},
            "rows": tuple(_row(row) for row in content["rows"]),
            "skipped": tuple(Skipped(**skip) for skip in content["skipped"]),
            "dropped": tuple(content["dropped"]),
        }
    )


def _row(content: Mapping[str, Any]) -> Row:
    intervals = {
        name: None if value is None else tuple(value)
        for name, value in content.items()
        if name.endswith("_interval")
    }
    return Row(**{**content, **intervals})
