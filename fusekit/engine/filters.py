"""Filters of parameters that choose nothing, which are misspelt more often than meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fusekit.checkpoint.folder import Checkpoint
from fusekit.engine.operands import Operands
from fusekit.errors import did_you_mean


def idle_filters(
    operands: Operands, checkpoints: Sequence[Checkpoint], written: Iterable[str]
) -> list[str]:
    """Notes of filters that no tensor's name has in it, in any model or in the output."""
    levels = [
        level
        for section in operands.sections
        for part in section.slices
        for level in (*part.levels, *(operand.own for operand in part.models))
    ]
    filters = dict.fromkeys(
        (parameter, pattern)
        for level in levels
        for parameter, setting in level.items()
        for pattern in setting.filters
    )
    if not filters:
        return []
    names = set(written).union(*(checkpoint.source.tensors for checkpoint in checkpoints))
    parts = {part for name in names for part in name.split(".") if not part.isdecimal()}
    return [
        f"the filter {pattern!r} of {parameter} is in no tensor's name"
        + did_you_mean(pattern, parts)
        for parameter, pattern in filters
        if not any(pattern in name for name in names)
    ]
