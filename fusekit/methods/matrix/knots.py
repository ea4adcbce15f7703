"""KnOTS on dense updates: one left basis for all tasks of a layer, merging in its coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SINGULAR_CUTOFF = 1e-5
"""Components of the joint decomposition with singular values at or below this are dropped."""


class Aligned(NamedTuple):
    """`delta_i = U @ coordinates[i]` for all tasks i."""

    U: Tensor
    S: Tensor
    coordinates: list[Tensor]


def align(deltas: Sequence[Tensor]) -> Aligned:
    """The SVD `[delta_1 | ... | delta_T] = U diag(S) V^T`, as U, S and `diag(S) V_i^T`.

    The coordinates are `U^T delta_i`: U and S are the eigenvectors and the square roots of the
    eigenvalues of `sum_i delta_i delta_i^T`, so the wide concatenation is never decomposed.

    Args:
        deltas: T task vectors (m, n).

    Returns:
        U (m, R) in float32, S (R,) descending, and T coordinates (R, n) in float32.

    References:
        "Model merging with SVD to tie the Knots", arXiv 2410.19735.
    """
    gram = torch.zeros((deltas[0].shape[0],) * 2, dtype=torch.float64, device=deltas[0].device)
    for delta in deltas:
        wide = delta.double()
        gram.addmm_(wide, wide.T)
    values, vectors = torch.linalg.eigh(gram)
    S = values.flip(0).clamp(min=0).sqrt()
    rank = int((S > SINGULAR_CUTOFF).sum())
    U = vectors.flip(1)[:, :rank]
    coordinates = [(U.T @ delta.double()).to(delta.dtype) for delta in deltas]
    return Aligned(U.to(deltas[0].dtype), S[:rank], coordinates)
