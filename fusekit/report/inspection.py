"""An inspection as a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from fusekit.inspection.pairing import OUTSIDE
from fusekit.inspection.result import Group, Inspection, plain
from fusekit.inspection.statistics import Floats, Statistics
from fusekit.report.figures import heat_map, lines
from fusekit.report.page import Note, Plot, Report, Section, Table

MAX_KINDS = 16
"""Columns of a heat map; the kinds that moved least are left out beyond that."""

MAX_MAPS = 8


def inspection_report(found: Inspection) -> Report:
    """Advice and findings first, then the numbers and where in the model they come from."""
    count = len(found.models)
    lead = f"{count} model{'s' * (count != 1)}: {', '.join(found.models)}"
    lead += f"; base: {found.base}." if found.base else "; no base was given."
    sections = [Section("What to do", _advice(found))]
    if found.whole is not None:
        sections.append(Section("The models", [_models(found, found.whole)]))
        if count > 1:
            sections.append(Section("Between the models", _between(found, found.whole)))
        if found.base is not None:
            sections.append(Section("Where the models moved", _where(found)))
    return Report("What merging these models would mean", lead, sections)


def _advice(found: Inspection) -> list[Any]:
    notes = [Note(f.severity, f.text) for f in found.findings if f.severity == "stop"]
    notes += [Note("advice", a.text, a.reasons) for a in found.advice]
    notes += [Note(f.severity, f.text) for f in found.findings if f.severity != "stop"]
    return notes or ["Nothing to advise: one model, nothing unusual."]


def _models(found: Inspection, whole: Group) -> Table:
    known = whole.statistics
    if found.base is None:
        rows = [[n, _number(x)] for n, x in zip(found.models, known.norms, strict=True)]
        return Table(["model", "norm"], rows)
    columns = {
        "relative norm": (known.relative_norms, _number),
        "cosine to base": (known.cosine_to_base, _number),
        "changed": (known.density, _percent),
        "energy in top 1 %": (known.energy_profile[:, 0], _percent),
        "top 5 %": (known.energy_profile[:, 1], _percent),
        "top 20 %": (known.energy_profile[:, 2], _percent),
        "kurtosis": (known.kurtosis, _number),
        "stable rank": (whole.stable_rank, _number),
        "effective rank": (whole.effective_rank, _number),
    }
    rows = [
        [name, *(show(values[i]) for values, show in columns.values())]
        for i, name in enumerate(found.models)
    ]
    return Table(["model", *columns], rows)


def _between(found: Inspection, whole: Group) -> list[Any]:
    known, names = whole.statistics, found.models
    compared = "task vectors" if found.base else "models"
    content: list[Any] = [
        Plot(
            f"Cosine of the {compared}",
            _square(known.cosine, names, "diverging", (-1.0, 1.0), False),
            "1: the same direction; 0: independent; -1: one undoes the other.",
        )
    ]
    if found.base is None:
        return content
    content += [
        Plot(
            "Same sign",
            _square(known.sign_agreement, names, "diverging", (0.0, 1.0), True),
            "Share of weights that both models moved in the same direction; chance is 50 %.",
        ),
        Plot(
            "Overlap of the largest 20 %",
            _square(known.overlap, names, "sequential", (0.0, 1.0), True),
            "Share of one model's largest updates that are among the other's; chance is 20 %.",
        ),
    ]
    blocks = [group for group in found.layers if group.name != OUTSIDE]
    if len(blocks) > 1:
        series = {
            "all weights": [plain(b.statistics.conflict_rate) for b in blocks],
            "largest 20 %": [plain(b.statistics.top_conflict_rate) for b in blocks],
            "lost by adding": [plain(b.statistics.cancellation) for b in blocks],
        }
        content.append(
            Plot(
                "Conflict by depth",
                lines(series, _short_layers(blocks), axis="share", as_percent=True),
                "Weights moved by two or more models where both signs occur, and the part of the "
                "change that cancels when the task vectors are added.",
            )
        )
    return content


def _square(
    values: Floats,
    names: Sequence[str],
    scale: str,
    limits: tuple[float, float],
    as_percent: bool,
) -> Any:
    return heat_map(
        plain(values),
        names,
        names,
        scale=scale,
        limits=limits,
        numbers=len(names) <= 10,
        as_percent=as_percent,
    )


def _where(found: Inspection) -> list[Any]:
    layers, kinds = [group.name for group in found.layers], _largest_kinds(found)
    cells: dict[tuple[str, str], list[Statistics]] = {}
    for tensor in found.tensors:
        if tensor.group is not None:
            cells.setdefault((tensor.layer, tensor.kind), []).append(tensor.group.statistics)
    norms = {place: reduce(add, known).relative_norms for place, known in cells.items()}
    highest = _highest(found)
    content: list[Any] = []
    for model, name in enumerate(found.models[:MAX_MAPS]):
        values = [
            [plain(norms[layer, kind][model]) if (layer, kind) in norms else None for kind in kinds]
            for layer in layers
        ]
        figure = heat_map(
            values, _short_layers(found.layers), kinds, limits=(0.0, highest), legend="|d| / |base|"
        )
        content.append(Plot(f"{name}: relative norm by layer and module", figure))
    blocks = [group for group in found.layers if group.name != OUTSIDE]
    if len(blocks) > 1:
        series = {
            name: [plain(block.statistics.relative_norms[i]) for block in blocks]
            for i, name in enumerate(found.models)
        }
        content.append(
            Plot(
                "Relative norm by depth",
                lines(series, _short_layers(blocks), axis="|d| / |base|"),
                "How far every model moved, layer by layer.",
            )
        )
    return content


def _highest(found: Inspection) -> float:
    """The end of the colour scale: the largest relative norm of a matrix, vectors being erratic."""
    norms = [
        float(np.nan_to_num(tensor.group.statistics.relative_norms).max())
        for tensor in found.tensors
        if tensor.group is not None and len(tensor.shape) > 1
    ]
    return max(norms, default=0.0) or 1.0


def _largest_kinds(found: Inspection) -> list[str]:
    strength = {
        group.name: float(np.nan_to_num(group.statistics.relative_norms).max())
        for group in found.kinds
    }
    kept = set(sorted(strength, key=lambda kind: -strength[kind])[:MAX_KINDS])
    return [group.name for group in found.kinds if group.name in kept]


def _short_layers(groups: Iterable[Group]) -> list[str]:
    """`3` for `model.layers.3`, with the stack's name where there are several stacks."""
    names = [group.name for group in groups]
    stacks = {name.rpartition(".")[0] for name in names if name != OUTSIDE}
    return [
        "other" if name == OUTSIDE else name.rpartition(".")[2] if len(stacks) == 1 else name
        for name in names
    ]


def _number(value: Any) -> str:
    return "-" if np.isnan(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _percent(value: Any) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f} %"
