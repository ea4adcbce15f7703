"""An inspection as text that fits a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusekit.inspection.result import Advice, Group, Inspection
from fusekit.inspection.statistics import Floats, Statistics, pairs

MAX_MODELS_IN_MATRIX = 8
MAX_FINDINGS = 6
MAX_LAYERS = 3
LEAST_NAME = 12
_GAP = "    "


def summary(inspection: Inspection, width: int = 100) -> str:
    """What was measured, found and advised, in lines of at most `width`; about a screen."""
    lines = _wrapped(_headline(inspection), width)
    if inspection.whole is not None:
        lines += ["", *_model_table(inspection, inspection.whole, width)]
        lines += _pair_tables(inspection.models, inspection.whole.statistics, width)
        lines += _where(inspection, width)
    if inspection.findings:
        lines.append("")
        for found in inspection.findings[:MAX_FINDINGS]:
            lines += _wrapped(f"{found.severity}: {found.text}", width)
        if len(inspection.findings) > MAX_FINDINGS:
            lines.append(f"and {len(inspection.findings) - MAX_FINDINGS} more (--json lists all)")
    if inspection.advice:
        lines.append("")
    for advice in inspection.advice:
        lines += _advised(advice, width)
    return "\n".join(lines)


def _headline(inspection: Inspection) -> str:
    count = len(inspection.models)
    against = f"against {inspection.base}" if inspection.base else "without a base"
    compared = sum(tensor.group is not None for tensor in inspection.tensors)
    elements = inspection.whole.statistics.elements if inspection.whole else 0
    sampled = any(tensor.sampled for tensor in inspection.tensors)
    return (
        f"{count} model{'s' * (count != 1)} {against}: {_big(elements)} parameters compared in "
        f"{compared} of {len(inspection.tensors)} tensors"
        + (", signs and ranks from samples" if sampled else "")
    )


def _model_table(inspection: Inspection, whole: Group, width: int) -> list[str]:
    known = whole.statistics
    if not known.has_base:
        norms = zip(inspection.models, known.norms, strict=True)
        rows = [[name, _number(norm)] for name, norm in norms]
        return _table(["model", "norm"], rows, width)
    head = ["model", "|d|/|base|", "changed", "top 5 %", "kurtosis", "stable rank", "eff. rank"]
    rows = [
        [
            name,
            f"{known.relative_norms[i]:.4f}",
            _percent(known.density[i]),
            _percent(known.energy_profile[i, 1]),
            _number(known.kurtosis[i]),
            _number(whole.stable_rank[i]),
            _number(whole.effective_rank[i]),
        ]
        for i, name in enumerate(inspection.models)
    ]
    return _table(head, rows, width)


def _pair_tables(models: Sequence[str], known: Statistics, width: int) -> list[str]:
    if not 1 < len(models) <= MAX_MODELS_IN_MATRIX:
        return []
    numbers = [str(i + 1) for i in range(len(models))]
    blocks = [_matrix("cosine", numbers, known.cosine)]
    ranges: list[str] = []
    if known.has_base:
        others = {"same sign": known.sign_agreement, "overlap": known.overlap}
        more = [_matrix(title, numbers, values) for title, values in others.items()]
        if sum(max(map(len, block)) for block in (*blocks, *more)) + 2 * len(_GAP) <= width:
            blocks += more
        else:
            ranges = [
                f"same sign {_range(known.sign_agreement)}; overlap of the largest 20 % "
                f"{_range(known.overlap)} (chance: 20 %)"
            ]
        ranges.append(
            f"opposite signs where two models moved: {_percent(known.conflict_rate)}, among their "
            f"largest 20 %: {_percent(known.top_conflict_rate)}; lost by adding: "
            f"{_percent(known.cancellation)}"
        )
    side_by_side = [_GAP.join(parts) for parts in zip(*blocks, strict=True)]
    return ["", *side_by_side, *(line for text in ranges for line in _wrapped(text, width))]


def _matrix(title: str, names: Sequence[str], values: Floats) -> list[str]:
    """The upper triangle: a column for every model but the first, a row for all but the last."""
    wide = max(9, len(title))
    lines = [f"{title:<{wide}}" + "".join(f"{name:>6}" for name in names[1:])]
    for i, name in enumerate(names[:-1]):
        cells = "".join(
            f"{_short(values[i, j]):>6}" if j > i else " " * 6 for j in range(1, len(names))
        )
        lines.append(f"{name:>{wide}}" + cells)
    return lines


def _where(inspection: Inspection, width: int) -> list[str]:
    if inspection.base is None or len(inspection.layers) < 2:
        return []
    return [
        "",
        *_wrapped(f"most changed layers   {_largest(inspection.layers)}", width),
        *_wrapped(f"most changed modules  {_largest(inspection.kinds)}", width),
    ]


def _largest(groups: Sequence[Group]) -> str:
    strength = [float(np.nanmean(group.statistics.relative_norms)) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: -np.nan_to_num(strength[i]))
    return ", ".join(f"{groups[i].name} ({strength[i]:.3f})" for i in order[:MAX_LAYERS])


def _advised(advice: Advice, width: int) -> list[str]:
    lines = _wrapped(f"-> {advice.text}", width)
    reasons = [f"because {advice.reasons[0]}", *advice.reasons[1:]]
    return lines + [line for reason in reasons for line in _wrapped(f"   {reason}", width)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Rows numbered from 1; names that leave too little room are cut in their middle."""
    columns = zip(*(row[1:] for row in [head, *rows]), strict=True)
    room = width - sum(max(map(len, column)) + 2 for column in columns)
    numbered = [
        [_shortened(f"{i + 1} {row[0]}", max(room, LEAST_NAME)), *row[1:]]
        for i, row in enumerate(rows)
    ]
    widths = [max(map(len, column)) for column in zip(head, *numbered, strict=True)]
    return [
        "  ".join(
            f"{cell:<{wide}}" if i == 0 else f"{cell:>{wide}}"
            for i, (cell, wide) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *numbered]
    ]


def _shortened(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def _wrapped(text: str, width: int) -> list[str]:
    indent = " " * (len(text) - len(text.lstrip()) or 3)
    return textwrap.wrap(text, width, subsequent_indent=indent, drop_whitespace=True) or [""]


def _range(matrix: Floats) -> str:
    values = pairs(matrix)
    if np.isnan(values).all():
        return "-"
    return f"{_percent(np.nanmin(values))} to {_percent(np.nanmax(values))}"


def _big(count: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"


def _percent(value: Any) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f} %"


def _short(value: Any) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"


def _number(value: Any) -> str:
    return "-" if np.isnan(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
