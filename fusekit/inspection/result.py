"""The result of an inspection: per tensor, layer, kind of module and whole model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusekit.inspection.statistics import TOP_SHARES, Floats, Statistics

SCHEMA = "fusekit-inspection/1"


@dataclass(frozen=True, eq=False)
class Group:
    """A tensor, or several taken together.

    `stable_rank` and `effective_rank` are (n,); over several matrices their medians, NaN where no
    matrix was compared.
    """

    name: str
    tensors: int
    statistics: Statistics
    stable_rank: Floats
    effective_rank: Floats

    def of(self, models: Sequence[int]) -> Group:
        """What is known of some of the models."""
        rows = np.asarray(models, dtype=int)
        return Group(
            self.name,
            self.tensors,
            self.statistics.of(models),
            self.stable_rank[rows],
            self.effective_rank[rows],
        )


@dataclass(frozen=True, eq=False)
class TensorReport:
    """One tensor name: who has it, what was found, and whether a sample stands for the whole."""

    name: str
    shape: tuple[int, ...]
    layer: str
    depth: int | None
    kind: str
    group: Group | None
    sampled: bool


@dataclass(frozen=True)
class Finding:
    """A fact worth knowing before merging.

    `severity` is `stop` (a merge would fail or be meaningless), `warning` or `note`. `subject` is a
    stable word for programs: `nonfinite`, `unrelated`, `vocabulary`...
    """

    severity: str
    subject: str
    text: str
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class Advice:
    """What to do and why; `recipe` holds the recipe keys it amounts to, if it names a method."""

    text: str
    reasons: tuple[str, ...]
    recipe: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Inspection:
    """Everything `fusekit.inspect` found.

    Attributes:
        models: names of the models, unique.
        base: name of the base, or None: then the statistics are those of the models themselves.
        whole, layers, kinds: the compared tensors taken together; None, () if there are none.
        tensors: every tensor of every model.
        findings, advice: in words.
        bytes_read, seconds, cpu_seconds: what the inspection cost.
    """

    models: tuple[str, ...]
    base: str | None
    whole: Group | None
    layers: tuple[Group, ...]
    kinds: tuple[Group, ...]
    tensors: tuple[TensorReport, ...]
    findings: tuple[Finding, ...] = ()
    advice: tuple[Advice, ...] = ()
    bytes_read: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; numbers that do not exist (0 / 0) are None."""
        return {
            "schema": SCHEMA,
            "models": list(self.models),
            "base": self.base,
            "whole": _group_dict(self.whole),
            "layers": [_group_dict(group) for group in self.layers],
            "kinds": [_group_dict(group) for group in self.kinds],
            "tensors": [
                {
                    "name": tensor.name,
                    "shape": list(tensor.shape),
                    "layer": tensor.layer,
                    "kind": tensor.kind,
                    "sampled": tensor.sampled,
                    "statistics": _group_dict(tensor.group),
                }
                for tensor in self.tensors
            ],
            "findings": [
                {
                    "severity": found.severity,
                    "subject": found.subject,
                    "text": found.text,
                    "models": list(found.models),
                }
                for found in self.findings
            ],
            "advice": [
                {
                    "text": advice.text,
                    "reasons": list(advice.reasons),
                    "recipe": None if advice.recipe is None else dict(advice.recipe),
                }
                for advice in self.advice
            ],
            "cost": {
                "bytes_read": self.bytes_read,
                "seconds": round(self.seconds, 3),
                "cpu_seconds": round(self.cpu_seconds, 3),
            },
        }

    def to_json(self) -> str:
        """`to_dict` as a JSON document."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)


def _group_dict(group: Group | None) -> dict[str, Any] | None:
    if group is None:
        return None
    known = group.statistics
    return {
        "name": group.name,
        "tensors": group.tensors,
        "elements": int(known.elements),
        "base_norm": plain(known.base_norm),
        "norm": plain(known.norms),
        "relative_norm": plain(known.relative_norms),
        "cosine_to_base": plain(known.cosine_to_base),
        "cosine": plain(known.cosine),
        "sign_agreement": plain(known.sign_agreement),
        "top_sign_agreement": plain(known.top_sign_agreement),
        "overlap": plain(known.overlap),
        "conflict_rate": plain(known.conflict_rate),
        "top_conflict_rate": plain(known.top_conflict_rate),
        "cancellation": plain(known.cancellation),
        "density": plain(known.density),
        "kurtosis": plain(known.kurtosis),
        "energy_in_largest": {
            f"{share:g}": plain(column)
            for share, column in zip(TOP_SHARES, known.energy_profile.T, strict=True)
        },
        "stable_rank": plain(group.stable_rank),
        "effective_rank": plain(group.effective_rank),
    }


def plain(value: Any) -> Any:
    """A number or array as JSON types: six significant digits, None for NaN."""
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value]
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None
