"""Continual merging by orthogonal projection: one model after another into a running update.

The running update N of a matrix and its share of the whole model's norm are all that is carried:
the previous update enters the next step as `lambda_{t-1} P_{t-1} = N_{t-1}`, so that no scale is
needed before the end, and every tensor can be merged on its own.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fusekit.methods.matrix.linalg import short_side

Protected = Literal["inner", "all"]


def occupied_rank(values: Tensor, alpha: float) -> int:
    """Leading singular values whose cumulative share of the sum is at most alpha."""
    total = values.sum()
    if total == 0:
        return 0
    if alpha >= 1:
        return len(values)
    return int((values.cumsum(0) / total <= alpha).sum())


def project(
    update: Tensor,
    delta: Tensor,
    *,
    alpha: float = 0.5,
    zero_diagonal: bool = True,
    protect: Protected = "inner",
) -> Tensor:
    """A new task vector without what it shares with the dominant subspace of the running update.

    With `N = U diag(S) V^T` and `A = U^T T V`, the leading r x r block of A is set to zero (r by
    `occupied_rank`), and with `zero_diagonal` every A[i, i] up to N's numerical rank:
    `T' = T - U_r A[:r, :r] V_r^T - sum_{i >= r} A[i, i] u_i v_i^T`.

    Args:
        update: N, the running update (m, n).
        delta: T, the new task vector (m, n).
        alpha: share of the singular values' sum that is protected, in [0, 1].
        zero_diagonal: also remove what lies on the pairs (u_i, v_i) themselves.
        protect: `inner` removes the block between dominant directions; `all` everything that
            touches one, `T' = (I - U_r U_r^T) T (I - V_r V_r^T)` before the diagonal.

    With N's shorter side first, `N = Q S V^T`, V is not formed: `A = Q^T (T N^T) Q S^-1`, and what
    is removed is `(Q M S^-1 Q^T) N` for the part M of A.

    Returns:
        (m, n), of delta's type; singular values and Q are found in float64.

    References:
        "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual
        Model Merging", arXiv 2501.09522.
    """
    found = short_side(update).standing_out()
    rank = occupied_rank(found.S, alpha)
    if not zero_diagonal:
        found = found.leading(rank)
    if not len(found.S):
        return delta.clone()
    N = found.precise()
    T = (delta.T if found.flip else delta).to(N.dtype)
    Q, S = found.Q.to(N.dtype), found.S.to(N.dtype)
    leading = Q[:, :rank]
    right = ((T @ N.T) @ Q) / S
    inner = leading @ (leading.T @ right[:, :rank])
    mixed = Q * (Q * right).sum(0)
    mixed[:, :rank] = inner if protect == "inner" else right[:, :rank] - inner
    removed = (mixed / S) @ Q.T
    if found.flip:
        kept = torch.addmm(T.T, N.T, removed.T, alpha=-1.0)
    else:
        kept = torch.addmm(T, removed, N, alpha=-1.0)
    if protect == "all" and rank:
        touching = leading @ (leading.T @ T)
        kept.sub_(touching.T if found.flip else touching)
    return kept.to(delta.dtype)


def add(
    update: Tensor,
    delta: Tensor,
    *,
    alpha: float = 0.5,
    zero_diagonal: bool = True,
    protect: Protected = "inner",
) -> Tensor:
    """The running update after one more model: `N + project(N, T)`, in float32.

    Only matrices (two axes) are projected; any other tensor's task vector is added as it is.
    """
    if update.dim() != 2:
        return update + delta
    kept = project(update, delta, alpha=alpha, zero_diagonal=zero_diagonal, protect=protect)
    return kept.add_(update)
