"""Averages weighted by diagonal Fisher information."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Floor = Literal["favour_target", "all", "add"]


def coefficients(
    weights: Sequence[float], norms: Sequence[float], floor: Floor, epsilon: float, normalize: bool
) -> list[float]:
    """What multiplies each model's Fisher: its weight, over the Fisher's norm if normalised.

    Args:
        weights: the models' weights.
        norms: L2 norms of the models' Fishers over all tensors, before any floor.
        floor: with `add` the floor also joins the norm, `1 / (z_i + eps)`.
        epsilon: the floor.
        normalize: divide by the norm; a model whose Fisher is zero everywhere keeps its weight.
    """
    if not normalize:
        return list(weights)
    extra = epsilon if floor == "add" else 0.0
    return [
        weight / (norm + extra) if norm + extra > 0 else weight
        for weight, norm in zip(weights, norms, strict=True)
    ]


def merge(
    models: Sequence[Tensor],
    fishers: Sequence[Tensor],
    factors: Sequence[float],
    floor: Floor = "favour_target",
    epsilon: float = 1e-6,
) -> Tensor:
    """`sum_i c_i F_i theta_i / sum_i c_i F_i`, elementwise, with floored Fishers.

    Args:
        models: theta_i, all of one shape; the first is the target.
        fishers: F_i >= 0, same shapes.
        factors: c_i, see `coefficients`.
        floor: `favour_target` raises only the target's Fisher to epsilon, so that its value stays
            where nobody has information; `all` raises everyone's; `add` adds epsilon to everyone's.
        epsilon: the floor.

    Returns:
        The average, in the models' dtype; the target's value where no model has any weight.

    References:
        "Merging Models with Fisher-Weighted Averaging", arXiv 2111.09832.
    """
    top = torch.zeros_like(models[0], dtype=torch.float64)
    bottom = torch.zeros_like(top)
    for i, (theta, information, factor) in enumerate(zip(models, fishers, factors, strict=True)):
        F = information.double()
        if floor == "add":
            F = F + epsilon
        elif floor == "all" or i == 0:
            F = F.clamp(min=epsilon)
        top += factor * F * theta
        bottom += factor * F
    empty = bottom == 0
    merged = top / torch.where(empty, torch.ones_like(bottom), bottom)
    return torch.where(empty, models[0].double(), merged).to(models[0].dtype)
