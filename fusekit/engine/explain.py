"""What a recipe's parameters come to: every value by layer, tensors of equal values together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusekit.checkpoint.layers import within_block
from fusekit.engine.plan import Plan, PlannedTensor

_BARS = "▁▂▃▄▅▆▇█"
_ENDS = 2
"""Values written out at each end of a gradient."""


@dataclass(frozen=True)
class Row:
    """The values of one parameter in tensors that agree on them, layer by layer."""

    tensors: str
    values: tuple[Any, ...]
    bars: str
    """One bar per layer for numbers that change with depth, else empty."""

    @property
    def text(self) -> str:
        """The values, the middle of long gradients left out."""
        if len(set(self.values)) == 1:
            return _short(self.values[0])
        shown = [_short(value) for value in self.values]
        if len(shown) > 2 * _ENDS + 1:
            shown = [*shown[:_ENDS], "...", *shown[-_ENDS:]]
        return " ".join(shown)


@dataclass(frozen=True)
class Curve:
    """One parameter, of one model if it is per model, over all tensors."""

    parameter: str
    models: str
    rows: tuple[Row, ...]


def explain(plan: Plan) -> list[Curve]:
    """Every parameter of a plan that has a value, with the tensors each value applies to."""
    tables: dict[tuple[str, str], dict[str, list[Any]]] = {}
    for planned in plan.tensors:
        if planned.kind == "merge":
            place = _place(planned)
            for key, value in _values(plan, planned):
                tables.setdefault(key, {}).setdefault(place, []).append(value)
    curves = []
    for (parameter, models), table in tables.items():
        if any(value is not None for values in table.values() for value in values):
            curves.append(Curve(parameter, models, tuple(_rows(table))))
    return curves


def _values(plan: Plan, planned: PlannedTensor) -> Iterator[tuple[tuple[str, str], Any]]:
    for name, value in planned.tensor.parameters.items():
        yield (name, ""), value
    seen: list[int] = []
    for ref, values in zip(planned.models, planned.tensor.model_parameters, strict=True):
        seen.append(ref.source)
        times = seen.count(ref.source)
        label = plan.checkpoints[ref.source].reference + (f" (entry {times})" * (times > 1))
        for name, value in values.items():
            yield (name, label), value


def _place(planned: PlannedTensor) -> str:
    """A tensor's name with the number of its block left open: `model.layers.*.mlp.up_proj`."""
    layer = planned.tensor.layer
    if layer is None:
        return planned.name
    return f"{layer.stack}.*.{within_block(planned.name, layer)}".lstrip(".")


def _rows(table: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
    """Tensors with the same values together, in order of first appearance."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for place, values in table.items():
        constant = len(set(values)) == 1
        alike.setdefault(tuple(values[:1]) if constant else tuple(values), []).append(place)
    for values, places in alike.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        named = "all tensors" if len(alike) == 1 else f"{places[0]}{more}"
        yield Row(named, values, _bars(values))


def _bars(values: Sequence[Any]) -> str:
    numbers = [value for value in values if isinstance(value, float)]
    if len(numbers) < 2 or len(numbers) != len(values):
        return ""
    low, high = min(numbers), max(numbers)
    top = len(_BARS) - 1
    return "".join(_BARS[round((value - low) / (high - low) * top)] for value in numbers)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
