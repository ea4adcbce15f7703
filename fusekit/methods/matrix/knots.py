"""KnOTS on dense updates: one left basis for all tasks of a layer, merging in its coordinates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fusekit.methods.matrix.linalg import eigen, gram

SINGULAR_CUTOFF = 1e-5
"""Components of the joint decomposition with singular values at or below this are dropped."""


Rule = Literal["ties", "ties_sum", "sum", "mean"]
Basis = Literal["output", "input"]

Drop = Callable[[int, Tensor], Tensor]
"""(task, coordinates) -> the coordinates that survive, rescaled."""


class Aligned(NamedTuple):
    """`delta_i = U @ coordinates[i]` for all tasks i, transposed for the basis of inputs."""

    U: Tensor
    S: Tensor
    coordinates: list[Tensor]


def align(deltas: Sequence[Tensor], basis: Basis = "output", drop: Drop | None = None) -> Aligned:
    """The SVD `[delta_1 | ... | delta_T] = U diag(S) V^T`, as U, S and `diag(S) V_i^T`.

    The coordinates are `U^T delta_i`: U and S are the eigenvectors and the square roots of the
    eigenvalues of `sum_i delta_i delta_i^T`, so the wide concatenation is never decomposed.

    Args:
        deltas: T task vectors (m, n).
        basis: the side whose common basis is taken; `input` works on the transposed task vectors.
        drop: what every task's coordinates go through first, such as DARE's random drop.

    Returns:
        U (m, R) in float32, S (R,) descending, and T coordinates (R, n) in float32.

    References:
        "Model merging with SVD to tie the Knots", arXiv 2410.19735.
    """
    oriented = [delta.T for delta in deltas] if basis == "input" else list(deltas)
    square = gram(oriented[0])
    for delta in oriented[1:]:
        square += gram(delta)
    values, vectors = eigen(square)
    S = values.flip(0).clamp(min=0).sqrt()
    rank = int((S > SINGULAR_CUTOFF).sum())
    U = vectors.flip(1)[:, :rank]
    coordinates = [(U.T @ delta.double()).to(delta.dtype) for delta in oriented]
    if drop is not None:
        coordinates = [drop(task, x) for task, x in enumerate(coordinates)]
    return Aligned(U.to(deltas[0].dtype), S[:rank], coordinates)


def merge(
    deltas: Sequence[Tensor],
    rule: Rule = "ties",
    density: float = 1.0,
    thresholds: Sequence[float] = (),
    *,
    basis: Basis = "output",
    drop: Drop | None = None,
) -> Tensor:
    """Task vectors merged by entries of their aligned coordinates: `U M`.

    Of every task, the entries of at least its (d - int(d density))-th smallest magnitude are kept
    (all at density 1). `ties` elects a sign per entry by their sum (where that is zero, the sign
    that most entries have), and averages the kept entries of that sign; `ties_sum` adds them up.
    `sum` adds all kept entries, which at density 1 is the plain sum of the task vectors, and `mean`
    divides that by how many of them are not zero.

    Args:
        deltas: T task vectors (m, n).
        rule: how coordinates are merged.
        density: share of the entries that is kept, in (0, 1].
        thresholds: per task, the smallest magnitude that is kept, found over more than this matrix;
            replaces density.
        basis, drop: as of `align`.

    References:
        "Model merging with SVD to tie the Knots", arXiv 2410.19735.
    """
    aligned = align(deltas, basis, drop)
    if not len(aligned.S):
        return torch.zeros_like(deltas[0])
    limits = thresholds or [_threshold(x, density) for x in aligned.coordinates]
    kept = torch.stack(
        [_trimmed(x, limit) for x, limit in zip(aligned.coordinates, limits, strict=True)]
    )
    if rule in {"ties", "ties_sum"}:
        elected = kept.sum(0).sign()
        elected = torch.where(elected == 0, elected.sum().sign(), elected)
        kept = torch.where(kept.sign() == elected, kept, torch.zeros_like(kept))
    merged = kept.sum(0)
    if rule in {"ties", "mean"}:
        merged = merged / (kept != 0).sum(0).clamp(min=1)
    update = aligned.U @ merged
    return update.T if basis == "input" else update


def dropped(count: int, density: float) -> int:
    """How many of so many entries lie below the threshold, the threshold itself included."""
    return 0 if density >= 1.0 else count - int(count * density)


def _threshold(x: Tensor, density: float) -> float:
    """The smallest magnitude that is kept."""
    rank = dropped(x.numel(), density)
    return float(x.abs().float().flatten().kthvalue(rank).values) if rank else 0.0


def _trimmed(x: Tensor, threshold: float) -> Tensor:
    """The entries that stay, zeros elsewhere; compared in float32, as thresholds are."""
    return torch.where(x.abs().float() >= threshold, x, torch.zeros_like(x))
