"""Isotropic merging: one strength for all singular directions of the summed task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusekit.methods.matrix.linalg import (
    orthogonalized_product,
    polar,
    residual_triples,
    split,
    total,
)


class Isotropic(NamedTuple):
    """A merged update all of whose non-zero singular values are `sigma`."""

    update: Tensor
    sigma: float


def common(deltas: Sequence[Tensor], numerical: bool = False) -> Isotropic:
    """Iso-C: `sigma U V^T` with `U S V^T = sum_i delta_i` and sigma the mean singular value.

    Args:
        deltas: T task vectors (m, n).
        numerical: take only the directions above rounding noise, and average over them; otherwise
            directions in which the sum has no strength at all get sigma too (which directions, is
            up to the decomposition).

    References:
        "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
        arXiv 2502.04959.
    """
    direction, S = polar(total(deltas), numerical)
    sigma = _mean(S)
    return Isotropic(direction.to(deltas[0].dtype) * sigma, sigma)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0


def specific_directions(rank: int, models: int, fraction: float) -> int:
    """Directions each task gets of its own, out of `rank`, when a fraction stays common."""
    wanted = round((rank - int(rank * fraction)) / models)
    return min(wanted, rank // models)


def common_and_specific(
    deltas: Sequence[Tensor], fraction: float = 0.8, numerical: bool = False
) -> Isotropic:
    """Iso-CTS: leading directions of the sum, then each task's own beside them, one strength.

    Each task's residual is `delta_i - U_c U_c^T delta_i`, projected on the left only. Directions of
    all tasks and the common ones are made orthogonal by polar factors; sigma is the mean of all the
    collected singular values.

    Args:
        deltas: T task vectors (m, n).
        fraction: share of the min(m, n) directions that stays common; 1 is Iso-C.
        numerical: as in `common`, of which this is the limit without directions of their own.

    References:
        "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
        arXiv 2502.04959.
    """
    rank = min(deltas[0].shape)
    own = specific_directions(rank, len(deltas), fraction)
    if own == 0:
        return common(deltas, numerical)
    summed = split(total(deltas), rank - own * len(deltas), numerical)
    pieces = [residual_triples(delta, summed, own, numerical) for delta in deltas]
    pieces.append(summed.leading)
    S = torch.cat([piece.S for piece in pieces])
    sigma = _mean(S)
    U = torch.cat([piece.U for piece in pieces], dim=1)
    V = torch.cat([piece.V for piece in pieces], dim=1)
    flat = orthogonalized_product(U, torch.full_like(S, sigma), V)
    return Isotropic(flat.to(deltas[0].dtype), sigma)
