"""What rules ask for first: begun while planning, so that what they refuse never starts."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Hashable, Iterable
from typing import Any

from fusekit.engine.plan import PlannedTensor
from fusekit.errors import RecipeError
from fusekit.methods.base import Combine, Remark, Summary

_NOTHING = object()
"""What a rule asks of its group that can combine at once."""


def check_rules(planned: Iterable[PlannedTensor]) -> None:
    """Begin every tensor's rule, and compare what the tensors of a group ask for.

    Only tensors of as many models are compared: where a single one is left, there may be nothing
    to ask. Continual methods are carried out by rules of their own.

    Raises:
        RecipeError: parameters that do not fit together, or not the same within a group.
    """
    asked: dict[tuple[str, int], tuple[PlannedTensor, Hashable]] = {}
    begun: set[Hashable] = set()
    for tensor in planned:
        if tensor.kind != "merge" or tensor.is_whole or tensor.method.continual:
            continue
        alike = _settings(tensor)
        if alike in begun:
            continue
        begun.add(alike)
        request = _first_request(tensor.method.rule(tensor.tensor))
        if request is not None and request.scope == "tensor":
            continue
        group = "model" if request is not None and request.scope == "model" else tensor.group
        key = _NOTHING if request is None else request.group_key()
        first, expected = asked.setdefault((group, tensor.tensor.models), (tensor, key))
        if key != expected:
            raise differing(first, tensor)


def _settings(planned: PlannedTensor) -> Hashable:
    """What a tensor shares with those whose rules begin alike: values given once are one object."""
    tensor = planned.tensor
    group = None if tensor.granularity == "tensor" else planned.group
    values = id(tensor.parameters), id(tensor.model_parameters)
    return group, values, tensor.shape, tensor.group_size, tensor.models, tensor.has_base


def _first_request(steps: Generator[Summary, Any, Combine]) -> Summary | None:
    """The first summary a rule asks for, or None if it needs none."""
    with contextlib.closing(steps):
        return next((step for step in steps if not isinstance(step, Remark)), None)


def differing(one: PlannedTensor, other: PlannedTensor) -> RecipeError:
    """The refusal of two tensors that want their group's summary each in a way of its own."""
    return RecipeError(
        f"{one.method.name}: tensors {one.name!r} and {other.name!r} share a summary "
        "(granularity) but have different parameters; give them the same values or use "
        "granularity: tensor"
    )
