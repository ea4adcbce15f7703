"""Adapters as a report: what they hold, where they act, how far they overlap."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from fusekit.adapters.info import AdapterInfo, ModuleInfo, ModuleOverlap, Overlap
from fusekit.checkpoint.layers import Layer, infer_layers, within_block
from fusekit.report.figures import heat_map, lines
from fusekit.report.page import Plot, Report, Section, Table

MAX_MAPS = 8
"""Heat maps by layer and module are drawn of so many adapters."""

MAX_KINDS = 16
"""Columns of a heat map; the kinds that change least are left out beyond that."""

OUTSIDE = "other"


def adapter_report(infos: Sequence[AdapterInfo], overlap: Overlap | None) -> Report:
    """Sizes and norms of adapters and, of several, their overlap.

    Args:
        infos: one per adapter.
        overlap: of the same adapters; None leaves the comparison out.
    """
    names = _short_labels([info.label for info in infos])
    layers = _Layers(dict.fromkeys(m.name for info in infos for m in info.modules))
    sections = [
        Section("The adapters", [_table(names, infos)]),
        Section("Where the adapters act", _where(names, infos, layers)),
    ]
    if overlap is not None:
        sections.append(Section("Between the adapters", _between(names, overlap, layers)))
    return Report(
        "What is in these adapters" if len(names) > 1 else f"What is in {names[0]}",
        f"{len(names)} adapter{'s' * (len(names) != 1)}: {', '.join(names)}.",
        sections,
    )


class _Layers:
    """Blocks and kinds of modules, read off their names."""

    def __init__(self, names: Iterable[str]) -> None:
        self._layers = infer_layers(names)
        found = {layer for layer in self._layers.values() if layer is not None}
        several = len({layer.stack for layer in found}) > 1
        self._labels = {
            layer: f"{layer.stack}.{layer.index}" if several else str(layer.index)
            for layer in sorted(found, key=lambda layer: (layer.stack, layer.index))
        }

    @property
    def labels(self) -> list[str]:
        """Blocks in order, of which `OUTSIDE` is none."""
        return list(self._labels.values())

    def label(self, name: str) -> str:
        layer = self._layers[name]
        return OUTSIDE if layer is None else self._labels[layer]

    def kind(self, name: str) -> str:
        layer: Layer | None = self._layers[name]
        within = name if layer is None else within_block(name, layer)
        return within.removesuffix(".weight")


def _table(names: Sequence[str], infos: Sequence[AdapterInfo]) -> Table:
    rows = []
    for name, info in zip(names, infos, strict=True):
        stable = [module.stable_rank for module in info.modules if module.norm]
        rows.append(
            [
                name,
                str(len(info.modules)),
                _range([module.rank for module in info.modules]),
                _range([module.scaling for module in info.modules]),
                f"{info.parameters:,}",
                f"{info.norm:.4g}",
                f"{np.mean(stable):.1f}" if stable else "-",
                str(len(info.replacements)),
            ]
        )
    head = ["adapter", "modules", "rank", "scaling", "parameters", "norm", "mean stable rank"]
    return Table([*head, "saved whole"], rows)


def _where(names: Sequence[str], infos: Sequence[AdapterInfo], layers: _Layers) -> list[Any]:
    content: list[Any] = []
    norms = [_root_sum(info.modules, layers) for info in infos]
    highest = max((value for each in norms for value in each.values()), default=0.0) or 1.0
    kinds = _strongest_kinds(norms)
    for name, each in list(zip(names, norms, strict=True))[:MAX_MAPS]:
        rows = [*layers.labels, *([OUTSIDE] if any(row == OUTSIDE for row, _ in each) else [])]
        figure = heat_map(
            [[each.get((row, kind)) for kind in kinds] for row in rows],
            rows,
            kinds,
            limits=(0.0, highest),
            legend="norm",
        )
        content.append(
            Plot(
                f"{name}: norm by layer and module",
                figure,
                "Frobenius norm of the update; blank where the adapter changes nothing.",
            )
        )
    if len(layers.labels) > 1:
        content += _by_depth(names, infos, norms, layers)
    return content


def _by_depth(
    names: Sequence[str],
    infos: Sequence[AdapterInfo],
    norms: Sequence[Mapping[tuple[str, str], float]],
    layers: _Layers,
) -> list[Plot]:
    total = {
        name: [_norm(v for (row, _), v in each.items() if row == label) for label in layers.labels]
        for name, each in zip(names, norms, strict=True)
    }
    stable = {
        name: [
            _mean(m.stable_rank for m in info.modules if layers.label(m.name) == label)
            for label in layers.labels
        ]
        for name, info in zip(names, infos, strict=True)
    }
    return [
        Plot(
            "Norm by depth",
            lines(total, layers.labels, axis="norm"),
            "Frobenius norm of all updates of a layer together.",
        ),
        Plot(
            "Stable rank by depth",
            lines(stable, layers.labels, axis="stable rank"),
            "How many directions carry the update; far below its rank, a lower one would do.",
        ),
    ]


def _between(names: Sequence[str], overlap: Overlap, layers: _Layers) -> list[Any]:
    maps = {
        "Cosine of the updates": (
            overlap.cosine,
            "diverging",
            (-1.0, 1.0),
            "1: the same direction; 0: independent; -1: one undoes the other.",
        ),
        "Overlap of output spaces": (
            overlap.output,
            "sequential",
            (0.0, 1.0),
            "Mean squared cosine of the principal angles: 1 where one space holds the other.",
        ),
        "Overlap of input spaces": (
            overlap.input,
            "sequential",
            (0.0, 1.0),
            "The same of the directions that the updates read.",
        ),
    }
    content: list[Any] = []
    for title, (matrix, scale, limits, caption) in maps.items():
        unshared = overlap.shared == 0
        values = [
            [None if blank else float(value) for value, blank in zip(row, blanks, strict=True)]
            for row, blanks in zip(matrix, unshared, strict=True)
        ]
        figure = heat_map(
            values, names, names, scale=scale, limits=limits, numbers=len(names) <= 10
        )
        content.append(Plot(title, figure, caption))
    if len(layers.labels) > 1:
        content.append(_overlap_by_depth(overlap, layers))
    return content


def _overlap_by_depth(overlap: Overlap, layers: _Layers) -> Plot:
    pairs = np.triu_indices(len(overlap.labels), 1)
    places: dict[str, list[ModuleOverlap]] = defaultdict(list)
    for name, module in overlap.modules.items():
        places[layers.label(name)].append(module)
    series = {
        what: [
            _mean(x for module in places[label] for x in getattr(module, field)[pairs])
            for label in layers.labels
        ]
        for what, field in (
            ("cosine", "cosine"),
            ("output spaces", "output"),
            ("input spaces", "input"),
        )
    }
    return Plot(
        "Overlap by depth",
        lines(series, layers.labels, axis="mean over pairs"),
        "Where adapters meet: hardest to merge where spaces overlap but cosines stay small.",
    )


def _root_sum(modules: Iterable[ModuleInfo], layers: _Layers) -> dict[tuple[str, str], float]:
    """Norms by layer and kind of module."""
    squares: dict[tuple[str, str], float] = defaultdict(float)
    for module in modules:
        squares[layers.label(module.name), layers.kind(module.name)] += module.norm**2
    return {place: float(np.sqrt(square)) for place, square in squares.items()}


def _strongest_kinds(norms: Sequence[Mapping[tuple[str, str], float]]) -> list[str]:
    strength: dict[str, float] = {}
    for each in norms:
        for (_, kind), norm in each.items():
            strength[kind] = max(norm, strength.get(kind, 0.0))
    kept = set(sorted(strength, key=lambda kind: -strength[kind])[:MAX_KINDS])
    return [kind for kind in strength if kind in kept]


def _norm(values: Iterable[float]) -> float:
    return float(np.linalg.norm(list(values)))


def _mean(values: Iterable[float]) -> float | None:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else None


def _range(values: Sequence[float]) -> str:
    ends = sorted({f"{value:g}" for value in values}, key=float)
    return " to ".join(ends if len(ends) < 2 else (ends[0], ends[-1])) or "-"


def _short_labels(labels: Sequence[str]) -> list[str]:
    """The last parts of paths where they tell the adapters apart, else the paths."""
    short = [PurePath(label).name or label for label in labels]
    return short if len(set(short)) == len(labels) else list(labels)
