"""Singular value decompositions and polar factors through the smaller Gram matrix in float64.

One symmetric eigenproblem takes the place of a dense SVD: with the Gram matrix in float64, singular
values down to 1e-6 of the largest are as exact as those of a float32 SVD. Products with a matrix
whose directions in use are of similar strength are left in the matrix's own precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EPS32 = float(torch.finfo(torch.float32).eps)

GRAM_LIMIT = 1e-6
"""Singular values below this share of the largest are not trusted to a Gram matrix."""

CLEAR_GAP = 100.0
"""Successive singular values of dense matrices are closer than this."""

SINGLE_LIMIT = 1e-3
"""Directions at least this strong, relative to the strongest, stand products in float32."""

SINGLE_CONDITION = 100.0
"""Columns of at most this condition stand a product in float32 that undoes it."""

SUM_ELEMENTS = 1 << 16
"""Sums are taken over so many elements at a time, which stay in the cache."""

PANEL_ELEMENTS = 1 << 21
"""So much of a matrix is widened to float64 at a time."""


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


class Side(NamedTuple):
    """The singular values of a matrix (m, n), and the singular vectors of its shorter side.

    `short` is the matrix with that side first, transposed if `flip`; S (k,) descends, Q (min, k).
    `scale` is the strength that rounding noise is measured by.
    """

    short: Tensor
    flip: bool
    S: Tensor
    Q: Tensor
    scale: Tensor

    @property
    def matrix(self) -> Tensor:
        """The matrix itself (m, n)."""
        return self.short.T if self.flip else self.short

    def leading(self, count: int) -> Side:
        """The `count` largest values."""
        return self._replace(S=self.S[:count], Q=self.Q[:, :count])

    def standing_out(self) -> Side:
        """Without values up to `eps max(m, n)` of the scale (float32 eps): rounding noise."""
        noise = EPS32 * max(self.short.shape) * self.scale
        return self.leading(int(self.S.gt(noise).sum()))

    def is_low(self, count: int | None = None) -> bool:
        """Whether at most half of the values, or of the `count` largest, stand out.

        Or at most three quarters, with a gap to those that do not; that a few have no strength, as
        with inputs that are always zero, is not enough.
        """
        S = self.S[:count]
        kept = len(self.leading(len(S)).standing_out().S)
        few, fewer = 4 * kept <= 3 * len(S), 2 * kept <= len(S)
        return fewer or (few and bool(S[kept - 1] >= CLEAR_GAP * S[kept]))

    def is_sound(self) -> bool:
        """Whether all values are large enough for vectors that come from a Gram matrix."""
        return not len(self.S) or bool(self.S[-1] > GRAM_LIMIT * self.scale)

    def precise(self) -> Tensor:
        """The matrix, widened to float64 where products with it are divided by far smaller S."""
        alike = len(self.S) and bool(self.S[-1] >= SINGLE_LIMIT * self.S[0])
        return self.short if alike else self.short.double()

    def triples(self) -> Triples:
        """With the vectors of the longer side."""
        matrix = self.precise()
        far = (matrix.T @ self.Q.to(matrix.dtype)).double() / self.S
        return Triples(far, self.S, self.Q) if self.flip else Triples(self.Q, self.S, far)


def short_side(matrix: Tensor, scale: Tensor | None = None) -> Side:
    """Singular values and the vectors of the shorter side, by one symmetric eigenproblem.

    Args:
        matrix: (m, n).
        scale: what its rounding noise is measured by; by default its largest singular value.
    """
    flip = matrix.shape[0] > matrix.shape[1]
    short = matrix.T if flip else matrix
    values, vectors = eigen(gram(short))
    S = values.flip(0).clamp(min=0).sqrt()
    return Side(short, flip, S, vectors.flip(1), S[:1] if scale is None else scale)


def gram(rows: Tensor) -> Tensor:
    """`rows @ rows.T` in float64, widened panel by panel."""
    count, columns = rows.shape
    width = max(1, PANEL_ELEMENTS // max(count, 1))
    total = torch.zeros((count, count), dtype=torch.float64, device=rows.device)
    for start in range(0, columns, width):
        total += outer(rows[:, start : start + width].double())
    return total


def outer(rows: Tensor) -> Tensor:
    """`rows @ rows.T`; on the CPU by NumPy, which computes half of it (syrk), unlike torch."""
    if rows.device.type != "cpu":
        return rows @ rows.T
    array = rows.numpy()
    return torch.from_numpy(array @ array.T)


def eigen(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues and eigenvectors; on the CPU by NumPy, whose LAPACK is no slower.

    Raises:
        torch.linalg.LinAlgError: it does not converge, as with NaN.
    """
    if symmetric.device.type != "cpu":
        values, vectors = torch.linalg.eigh(symmetric)
        return values, vectors
    try:
        found = np.linalg.eigh(symmetric.numpy())
    except np.linalg.LinAlgError as error:
        raise torch.linalg.LinAlgError(str(error)) from None  # type: ignore[attr-defined]
    return torch.from_numpy(found.eigenvalues), torch.from_numpy(found.eigenvectors)


def triples(matrix: Tensor, count: int | None = None) -> Triples:
    """The leading singular triples of a matrix, as many as stand out from rounding noise.

    Singular values up to `eps max(m, n)` of the largest (float32 eps) are noise: their directions
    are arbitrary, so they are left out and fewer than `count` may come back.

    Args:
        matrix: (m, n), any floating-point type.
        count: how many of the largest are wanted; by default all.
    """
    found = short_side(matrix).standing_out()
    return found.leading(len(found.S) if count is None else count).triples()


class Split(NamedTuple):
    """A matrix's leading triples and, unless it is taller than wide, all other left vectors."""

    leading: Triples
    rest: Tensor | None


def split(found: Side, count: int, numerical: bool) -> Split:
    """The leading `count` triples and the left vectors that are orthogonal to theirs.

    Args:
        found: the `short_side` of the matrix (m, n).
        count: how many of the largest are wanted.
        numerical: only those that stand out from rounding noise; otherwise all, and where the
            matrix has (nearly) no strength, directions are what LAPACK's SVD makes of them.
    """
    wanted = (found.standing_out() if numerical else found).leading(count)
    if numerical or wanted.is_sound():
        leading, left = wanted.triples(), found.Q
    else:
        dense = _dense_triples(found.matrix, len(found.S))
        leading, left = dense.leading(count), dense.U
    return Split(leading, None if found.flip else left[:, len(leading.S) :])


def residual_triples(
    matrix: Tensor, of: Split, count: int, numerical: bool | None = None
) -> Triples:
    """The leading triples of `(I - B B^T) matrix`, B the leading left vectors of another matrix.

    Where the remaining ones, Z, are known, only the smaller `Z^T matrix` is decomposed.

    Args:
        matrix: (m, n).
        of: the other matrix, of the same shape.
        count: how many of the largest are wanted.
        numerical: only those that stand out from the rounding noise of the matrix; otherwise all,
            as `split`; None: the former where at most half of them do.
    """
    scale = torch.linalg.vector_norm(matrix, dim=1).max().double()
    if of.rest is None:
        B = of.leading.U.to(matrix.dtype)
        residual = torch.addmm(matrix, B, B.T @ matrix, alpha=-1.0)
    else:
        residual = of.rest.to(matrix.dtype).T @ matrix
    found = short_side(residual, scale)
    if found.is_low(count) if numerical is None else numerical:
        found = found.standing_out()
    found = found.leading(count)
    own = found.triples() if found.is_sound() else _dense_triples(residual, count)
    return own if of.rest is None else Triples(of.rest @ own.U, own.S, own.V)


def _dense_triples(matrix: Tensor, count: int) -> Triples:
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Triples(U, S, Vh.T).leading(count)


def polar(found: Side, numerical: bool = False) -> tuple[Tensor, Tensor]:
    """`U V^T` for a matrix `U diag(S) V^T`, and S.

    Args:
        found: the `short_side` of the matrix (m, n).
        numerical: of the triples that stand out from rounding noise only, as `triples`; otherwise
            of all min(m, n).
    """
    if numerical:
        found = found.standing_out()
    elif not found.is_sound():
        U, S, V = _dense_triples(found.matrix, len(found.S))
        return U @ V.T, S
    short = found.precise()
    mixing = outer(found.Q / found.S.sqrt()).to(short.dtype)
    return short.T @ mixing if found.flip else mixing @ short, found.S


def polar_mixing(columns: Tensor) -> tuple[Tensor, float]:
    """X such that `columns @ X` is the polar factor of `columns` (m, k), k x k, and its condition.

    With `columns = P diag(s) Q^T` the polar factor is `P Q^T` over the singular values above
    `eps max(m, k) s_max` (float32 eps): a partial isometry where columns are dependent, which does
    not depend on the order of the columns or on LAPACK. X is `Q diag(1/s) Q^T`.
    """
    values, Q = eigen(gram(columns.T))
    limit = (EPS32 * max(columns.shape)) ** 2 * values[-1:].clamp(min=0)
    kept = values > limit
    strengths = values[kept].sqrt()
    condition = float(strengths[-1] / strengths[0]) if len(strengths) else 1.0
    return outer(Q[:, kept] / strengths.sqrt()), condition


def orthogonalized_product(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """`polar(U) diag(S) polar(V)^T` for (m, k), (k,), (n, k) in float64; float32 comes back.

    The mixing is done in float64, where ill-conditioned columns cancel. The last product, the
    largest one, is done in float32 where what it multiplies is well scaled.
    """
    (mix_u, condition_u), (mix_v, condition_v) = polar_mixing(U), polar_mixing(V)
    core = (mix_u * S) @ mix_v
    if U.shape[0] <= V.shape[0]:
        left, right, condition = U @ core, V.T, condition_v
    else:
        left, right, condition = U, core @ V.T, condition_u
    if condition > SINGLE_CONDITION:
        return (left @ right).float()
    return left.float() @ right.float()


def total(deltas: Sequence[Tensor]) -> Tensor:
    """The sum of tensors, accumulated in float64, in their own type."""
    result = torch.empty_like(deltas[0], memory_format=torch.contiguous_format)
    parts = [torch.split(x.reshape(-1), SUM_ELEMENTS) for x in (result, *deltas)]
    for target, *own in zip(*parts, strict=True):
        wide = own[0].to(torch.float64, copy=True)
        for part in own[1:]:
            wide += part
        target.copy_(wide)
    return result


def mean(deltas: Sequence[Tensor]) -> Tensor:
    """The plain average of tensors in float64."""
    result = deltas[0].to(torch.float64, copy=True)
    for delta in deltas[1:]:
        result += delta
    return result.div_(len(deltas))


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sum of tensors times their weights, accumulated in float64, in their own type."""
    result = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        result.add_(tensor, alpha=weight)
    return result.to(tensors[0].dtype)
