"""Singular value decompositions and polar factors through the smaller Gram matrix in float64.

One symmetric eigenproblem takes the place of a dense SVD: with the Gram matrix in float64, singular
values down to 1e-6 of the largest are as exact as those of a float32 SVD.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPS32 = float(torch.finfo(torch.float32).eps)

GRAM_LIMIT = 1e-6
"""Singular values below this share of the largest are not trusted to a Gram matrix."""


class Triples(NamedTuple):
    """`U @ diag(S) @ V.T` in float64: U (m, k), S (k,) descending, V (n, k)."""

    U: Tensor
    S: Tensor
    V: Tensor

    def leading(self, count: int) -> Triples:
        """The `count` largest triples."""
        return Triples(self.U[:, :count], self.S[:count], self.V[:, :count])

    def product(self) -> Tensor:
        """The matrix these triples make."""
        return (self.U * self.S) @ self.V.T


def triples(matrix: Tensor, count: int | None = None) -> Triples:
    """The leading singular triples of a matrix, as many as stand out from rounding noise.

    Singular values up to `eps max(m, n)` of the largest (float32 eps) are noise: their directions
    are arbitrary, so they are left out and fewer than `count` may come back.

    Args:
        matrix: (m, n), any floating-point type.
        count: how many of the largest are wanted; by default all.
    """
    wide, flip, values, vectors = _eigenpairs(matrix)
    wanted = _numerical_rank(values, matrix.shape)
    if count is not None:
        wanted = min(count, wanted)
    return _from_gram(wide, flip, values[:wanted], vectors[:, :wanted])


def all_triples(matrix: Tensor, count: int | None = None) -> Triples:
    """The leading `count` singular triples, by default min(m, n), noise or not.

    Where the matrix has (nearly) no strength, directions are what LAPACK's SVD makes of them.
    """
    wide, flip, values, vectors = _eigenpairs(matrix)
    wanted = len(values) if count is None else min(count, len(values))
    if wanted and values[wanted - 1] <= GRAM_LIMIT * values[0]:
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return Triples(U, S, Vh.T).leading(wanted)
    return _from_gram(wide, flip, values[:wanted], vectors[:, :wanted])


def polar(matrix: Tensor, numerical: bool = False) -> tuple[Tensor, Tensor]:
    """`U V^T` for `matrix = U diag(S) V^T`, and S.

    Args:
        matrix: (m, n).
        numerical: of the triples that stand out from rounding noise only, as `triples`; otherwise
            of all min(m, n).
    """
    short, flip, S, Q = _eigenpairs(matrix)
    if numerical:
        wanted = _numerical_rank(S, matrix.shape)
        S, Q = S[:wanted], Q[:, :wanted]
    elif len(S) and S[-1] <= GRAM_LIMIT * S[0]:
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return U @ Vh, S
    factor = ((Q / S) @ Q.T) @ short
    return factor.T if flip else factor, S


def _numerical_rank(values: Tensor, shape: Sequence[int]) -> int:
    """How many descending singular values stand out from rounding noise."""
    return int((values > EPS32 * max(shape) * values[:1]).sum())


def _eigenpairs(matrix: Tensor) -> tuple[Tensor, bool, Tensor, Tensor]:
    """The matrix with its short side first, whether that transposed it, and singular values and
    vectors of that side."""
    wide = matrix.double()
    flip = wide.shape[0] > wide.shape[1]
    short = wide.T if flip else wide
    values, vectors = torch.linalg.eigh(short @ short.T)
    return short, flip, values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)


def _from_gram(short: Tensor, flip: bool, S: Tensor, near: Tensor) -> Triples:
    far = (short.T @ near) / S
    return Triples(far, S, near) if flip else Triples(near, S, far)


def polar_mixing(columns: Tensor) -> Tensor:
    """X such that `columns @ X` is the polar factor of `columns` (m, k), k x k.

    With `columns = P diag(s) Q^T` the polar factor is `P Q^T` over the singular values above
    `eps max(m, k) s_max` (float32 eps): a partial isometry where columns are dependent, which does
    not depend on the order of the columns or on LAPACK. X is `Q diag(1/s) Q^T`.
    """
    values, Q = torch.linalg.eigh(columns.T @ columns)
    limit = (EPS32 * max(columns.shape)) ** 2 * values[-1:].clamp(min=0)
    scale = torch.where(values > limit, values.clamp(min=1e-300).rsqrt(), torch.zeros_like(values))
    mixing: Tensor = (Q * scale) @ Q.T
    return mixing


def orthogonalized_product(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """`polar(U) diag(S) polar(V)^T` for (m, k), (k,), (n, k) in float64; float32 comes back.

    The mixing is done in float64, where ill-conditioned columns cancel; the last product, the
    largest one, multiplies well-scaled numbers and is done in float32.
    """
    core = (polar_mixing(U) * S) @ polar_mixing(V)
    if U.shape[0] <= V.shape[0]:
        return (U @ core).float() @ V.T.float()
    return U.float() @ (core @ V.T).float()


def total(deltas: Sequence[Tensor]) -> Tensor:
    """The sum of tensors, accumulated in float64."""
    result = deltas[0].double()
    for delta in deltas[1:]:
        result = result + delta
    return result


def mean(deltas: Sequence[Tensor]) -> Tensor:
    """The plain average of tensors, accumulated in float64."""
    return total(deltas) / len(deltas)
