"""Isotropic merging: one strength for all singular directions of the summed task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fusekit.methods.matrix.linalg import (
    Side,
    orthogonalized_product,
    polar,
    residual_triples,
    short_side,
    split,
    total,
)

Rank = Literal["auto", "full", "numerical"]


class Isotropic(NamedTuple):
    """A merged update all of whose non-zero singular values are `sigma`.

    `is_cut` says whether the others, of a sum that is not zero, are left out as rounding noise.
    """

    update: Tensor
    sigma: float
    is_cut: bool


def common(deltas: Sequence[Tensor], rank: Rank = "auto") -> Isotropic:
    """Iso-C: `sigma U V^T` with `U S V^T = sum_i delta_i` and sigma the mean singular value.

    Args:
        deltas: T task vectors (m, n).
        rank: `numerical` takes only the directions above rounding noise, and averages over them;
            with `full` directions in which the sum has no strength at all get sigma too (which
            directions, is up to the decomposition); `auto` is `numerical` where the sum is of at
            most half its full rank or of clearly less, as sums of LoRAs are, and `full` elsewhere.

    References:
        "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
        arXiv 2502.04959.
    """
    return _common(short_side(total(deltas)), rank, deltas[0].dtype)


def _common(summed: Side, rank: Rank, dtype: torch.dtype) -> Isotropic:
    numerical = _is_numerical(summed, rank)
    direction, S = polar(summed, numerical)
    sigma = _mean(S)
    return Isotropic(direction.to(dtype) * sigma, sigma, numerical and sigma > 0)


def _is_numerical(summed: Side, rank: Rank) -> bool:
    return summed.is_low() if rank == "auto" else rank == "numerical"


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0


def specific_directions(rank: int, models: int, fraction: float) -> int:
    """Directions each task gets of its own, out of `rank`, when a fraction stays common."""
    wanted = round((rank - int(rank * fraction)) / models)
    return min(wanted, rank // models)


def common_and_specific(
    deltas: Sequence[Tensor], fraction: float = 0.8, rank: Rank = "auto"
) -> Isotropic:
    """Iso-CTS: leading directions of the sum, then each task's own beside them, one strength.

    Each task's residual is `delta_i - U_c U_c^T delta_i`, projected on the left only. Directions of
    all tasks and the common ones are made orthogonal by polar factors; sigma is the mean of all the
    collected singular values.

    Args:
        deltas: T task vectors (m, n).
        fraction: share of the min(m, n) directions that stays common; 1 is Iso-C.
        rank: as in `common`, of which this is the limit without directions of their own; `auto`
            looks at the sum, then at each residual.

    References:
        "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
        arXiv 2502.04959.
    """
    directions = min(deltas[0].shape)
    own = specific_directions(directions, len(deltas), fraction)
    summed = short_side(total(deltas))
    if own == 0:
        return _common(summed, rank, deltas[0].dtype)
    numerical = _is_numerical(summed, rank)
    parts = split(summed, directions - own * len(deltas), numerical)
    of_residuals = None if rank == "auto" and not numerical else numerical
    pieces = [residual_triples(delta, parts, own, of_residuals) for delta in deltas]
    is_cut = numerical or any(len(piece.S) < own for piece in pieces)
    pieces.append(parts.leading)
    S = torch.cat([piece.S for piece in pieces])
    sigma = _mean(S)
    U = torch.cat([piece.U for piece in pieces], dim=1)
    V = torch.cat([piece.V for piece in pieces], dim=1)
    flat = orthogonalized_product(U, torch.full_like(S, sigma), V)
    return Isotropic(flat.to(deltas[0].dtype), sigma, is_cut and sigma > 0)
