"""Task singular vectors: leading directions of every task, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusekit.methods.matrix.linalg import (
    Triples,
    orthogonalized_product,
    polar_mixing,
    triples,
)


def kept_directions(shape: Sequence[int], models: int, fraction: float | None = None) -> int:
    """Directions every task keeps in a matrix: min(m, n) // T, or that share; at least one."""
    if fraction is not None:
        return max(1, int(min(shape) * fraction))
    return max(1, min(shape) // models)


def merge(deltas: Sequence[Tensor], fraction: float | None = None) -> Tensor:
    """The merged update `polar([U_1 .. U_T]) diag(s_1 .. s_T) polar([V_1 .. V_T])^T`.

    `U_i diag(s_i) V_i^T` are the leading min(m, n) // T singular triples of task vector i.

    Args:
        deltas: T task vectors (m, n).
        fraction: share of the directions that every task keeps, in (0, 1]; by default 1 / T. Above
            that there are more directions than room for them, and they share it.

    Returns:
        (m, n); zero where all task vectors are.

    References:
        "Task Singular Vectors: Reducing Task Interference in Model Merging", arXiv 2412.00081.
    """
    if len(deltas) == 1 and fraction is None:
        return deltas[0].clone()
    stacked = _stack(_cut(deltas, fraction))
    return orthogonalized_product(*stacked).to(deltas[0].dtype)


def parts(deltas: Sequence[Tensor]) -> list[Tensor]:
    """What each task contributes to `merge`: the parts add up to the merged update."""
    cut = _cut(deltas)
    stacked = _stack(cut)
    left = stacked.U @ polar_mixing(stacked.U)[0]
    right = stacked.V @ polar_mixing(stacked.V)[0]
    contributions, begin = [], 0
    for own in cut:
        end = begin + len(own.S)
        part = (left[:, begin:end] * own.S) @ right[:, begin:end].T
        contributions.append(part.to(deltas[0].dtype))
        begin = end
    return contributions


def compress(delta: Tensor, fraction: float) -> Triples:
    """The leading int(min(m, n) * fraction) triples of one task vector (TSV-Compress).

    Args:
        delta: a task vector (m, n).
        fraction: in (0, 1]; 1 / T stores T models in the room of about two.
    """
    return triples(delta, int(min(delta.shape) * fraction))


def interference(deltas: Sequence[Tensor]) -> float:
    """`sum |(U^T U - I) diag(s) (V^T V - I)|` over all directions of all tasks; 0 if orthogonal."""
    U, S, V = _stack([triples(delta) for delta in deltas])
    identity = torch.eye(len(S), dtype=S.dtype, device=S.device)
    score = ((U.T @ U - identity) * S) @ (V.T @ V - identity)
    return float(score.abs().sum())


def _cut(deltas: Sequence[Tensor], fraction: float | None = None) -> list[Triples]:
    count = kept_directions(deltas[0].shape, len(deltas), fraction)
    return [triples(delta, count) for delta in deltas]


def _stack(pieces: Sequence[Triples]) -> Triples:
    return Triples(
        torch.cat([piece.U for piece in pieces], dim=1),
        torch.cat([piece.S for piece in pieces]),
        torch.cat([piece.V for piece in pieces], dim=1),
    )
