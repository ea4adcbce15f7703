"""Thresholds over several whole tensors: exact k-th magnitudes by counting, tensor after tensor.

Values are counted by the upper 16 bits of their float32 magnitudes, then those of the bin that
holds the threshold by the lower ones: two passes, and memory that does not depend on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusekit.engine.plan import Plan, PlannedTensor
from fusekit.errors import RecipeError
from fusekit.methods import matrix

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, np.dtype[Any]]
Key = tuple[str, int]
"""A group of tensors, and the model's source."""
Read = Callable[[Sequence[PlannedTensor]], Iterable[tuple[PlannedTensor, "Sequence[torch.Tensor]"]]]

HALF = 16


def thresholds(plan: Plan, read: Read) -> dict[Key, float]:
    """By group and model, the smallest magnitude that is kept.

    Args:
        plan: the merge; tensors of it that need no survey are left alone.
        read: goes through tensors, giving the models' values of each.

    Raises:
        RecipeError: tensors of one group keep different shares.
    """
    tensors = [planned for planned in plan.tensors if _needs_survey(plan, planned)]
    if not tensors:
        return {}
    density = _densities(tensors)
    upper = _count(read(tensors), {})
    bins, ranks = {}, {}
    for key, counts in upper.items():
        rank = matrix.knots.dropped(int(counts.sum()), density[key[0]])
        bins[key], ranks[key] = _locate(counts, rank)
    lower = _count(read(tensors), bins)
    return {
        key: _magnitude(bins[key], _locate(lower[key], rank)[0]) if rank else 0.0
        for key, rank in ranks.items()
    }


def _needs_survey(plan: Plan, planned: PlannedTensor) -> bool:
    return (
        planned.is_whole
        and planned.method.survey is not None
        and plan.granularity != "tensor"
        and planned.tensor["density"] < 1.0
    )


def _densities(tensors: Sequence[PlannedTensor]) -> dict[str, float]:
    first: dict[str, PlannedTensor] = {}
    for planned in tensors:
        other = first.setdefault(planned.group, planned)
        if other.tensor["density"] != planned.tensor["density"]:
            raise RecipeError(
                f"{planned.method.name}: tensors {other.name!r} and {planned.name!r} share a "
                "threshold (granularity) but have different densities; give them the same or use "
                "granularity: tensor"
            )
    return {group: planned.tensor["density"] for group, planned in first.items()}


def _count(
    surveyed: Iterable[tuple[PlannedTensor, Sequence[torch.Tensor]]], bins: dict[Key, int]
) -> dict[Key, Array]:
    """How many magnitudes have each value of their upper bits; of a bin, of their lower bits."""
    import torch

    counts: dict[Key, Array] = {}
    for planned, values in surveyed:
        for ref, x in zip(planned.models, values, strict=True):
            key = planned.group, ref.source
            bits = x.float().abs().contiguous().flatten().view(torch.int32)
            if bins:
                bits = bits[bits >> HALF == bins[key]] & ((1 << HALF) - 1)
            else:
                bits = bits >> HALF
            found = torch.bincount(bits.long(), minlength=1 << HALF).cpu().numpy()
            counts[key] = counts[key] + found if key in counts else found
    return counts


def _locate(counts: Array, rank: int) -> tuple[int, int]:
    """The bin of the rank-th smallest, counted from 1, and its rank in the bin."""
    before = np.cumsum(counts)
    place = int(np.searchsorted(before, rank))
    return place, rank - (int(before[place - 1]) if place else 0)


def _magnitude(upper: int, lower: int) -> float:
    return float(np.array([upper << HALF | lower], np.int32).view(np.float32)[0])
