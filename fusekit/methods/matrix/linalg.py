"""Singular value decompositions and polar factors through the smaller Gram matrix in float64.

One symmetric eigenproblem takes the place of a dense SVD: with the Gram matrix in float64, singular
values down to 1e-6 of the largest are as exact as those of a float32 SVD. Products with a matrix
whose directions in use are of similar strength are left in the matrix's own precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPS32 = float(torch.finfo(torch.float32).eps)

GRAM_LIMIT = 1e-6
"""Singular values below this share of the largest are not trusted to a Gram matrix."""

SINGLE_LIMIT = 1e-2
"""Directions at least this strong, relative to the strongest, stand products in float32."""

GRAM_BLOCKS = 8
SPLIT_ROWS = 256
"""Gram matrices from this size on are computed in blocks, those above the diagonal left out."""


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
    `dtype` is the precision of products with the matrix where directions are of similar strength;
    `scale` the strength that rounding noise is measured by.
    """

    short: Tensor
    flip: bool
    S: Tensor
    Q: Tensor
    dtype: torch.dtype
    scale: Tensor

    def leading(self, count: int) -> Side:
        """The `count` largest values."""
        return self._replace(S=self.S[:count], Q=self.Q[:, :count])

    def standing_out(self) -> Side:
        """Without values up to `eps max(m, n)` of the scale (float32 eps): rounding noise."""
        noise = EPS32 * max(self.short.shape) * self.scale
        return self.leading(int(self.S.gt(noise).sum()))

    def is_sound(self) -> bool:
        """Whether all values are large enough for vectors that come from a Gram matrix."""
        return not len(self.S) or bool(self.S[-1] > GRAM_LIMIT * self.scale)

    def precise(self) -> Tensor:
        """The matrix in the precision for products that are divided by S."""
        alike = len(self.S) and bool(self.S[-1] >= SINGLE_LIMIT * self.S[0])
        return self.short.to(self.dtype if alike else torch.float64)

    def triples(self) -> Triples:
        """With the vectors of the longer side."""
        matrix = self.precise()
        far = (matrix.T @ self.Q.to(matrix.dtype)).double() / self.S
        return Triples(far, self.S, self.Q) if self.flip else Triples(self.Q, self.S, far)


def short_side(matrix: Tensor, dtype: torch.dtype | None = None) -> Side:
    """Singular values and the vectors of the shorter side, by one symmetric eigenproblem.

    Args:
        matrix: (m, n).
        dtype: of products, see `Side`; by default the matrix's.
    """
    flip = matrix.shape[0] > matrix.shape[1]
    short = matrix.T if flip else matrix
    values, vectors = torch.linalg.eigh(lower_gram(short))
    S = values.flip(0).clamp(min=0).sqrt()
    return Side(short, flip, S, vectors.flip(1), dtype or matrix.dtype, S[:1])


def lower_gram(rows: Tensor) -> Tensor:
    """The lower triangle of `rows @ rows.T` in float64, all that `torch.linalg.eigh` reads.

    What lies above the diagonal is unspecified.
    """
    wide = rows.double()
    count = len(wide)
    if count < SPLIT_ROWS:
        return wide @ wide.T
    gram = wide.new_zeros((count, count))
    step = -(-count // GRAM_BLOCKS)
    for start in range(0, count, step):
        stop = min(start + step, count)
        torch.mm(wide[start:stop], wide[:stop].T, out=gram[start:stop, :stop])
    return gram


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix of a lower triangle."""
    return lower.tril() + lower.tril(-1).T


def triples(matrix: Tensor, count: int | None = None, dtype: torch.dtype | None = None) -> Triples:
    """The leading singular triples of a matrix, as many as stand out from rounding noise.

    Singular values up to `eps max(m, n)` of the largest (float32 eps) are noise: their directions
    are arbitrary, so they are left out and fewer than `count` may come back.

    Args:
        matrix: (m, n), any floating-point type.
        count: how many of the largest are wanted; by default all.
    """
    found = short_side(matrix).standing_out()
    return found.leading(len(found.S) if count is None else count).triples()


def all_triples(matrix: Tensor, count: int | None = None) -> Triples:
    """The leading `count` singular triples, by default min(m, n), noise or not.

    Where the matrix has (nearly) no strength, directions are what LAPACK's SVD makes of them.
    """
    found = short_side(matrix)
    wanted = found.leading(len(found.S) if count is None else count)
    if wanted.is_sound():
        return wanted.triples()
    return _dense_triples(matrix, len(wanted.S))


def residual_triples(matrix: Tensor, basis: Tensor, count: int, numerical: bool) -> Triples:
    """The leading triples of `R = (I - B B^T) matrix` for orthonormal columns B (m, c).

    R is not formed: where rows are fewer `R R^T` is the projected Gram matrix of the matrix, else
    `R^T R` is that Gram matrix minus the one of `B^T matrix`.

    Args:
        matrix: (m, n).
        basis: B, orthonormal to float64: what is left of a matrix may be far weaker than it.
        count: how many of the largest are wanted.
        numerical: only those that stand out from the rounding noise of the matrix; otherwise all,
            as `all_triples`.
    """
    rows, columns = matrix.shape
    flip = rows > columns
    short = matrix.T if flip else matrix
    own = lower_gram(short)
    if flip:
        gram = own - lower_gram((basis.T @ matrix.double()).T)
    else:
        projector = torch.eye(rows, dtype=basis.dtype, device=basis.device) - basis @ basis.T
        gram = projector @ mirrored(own) @ projector
    values, vectors = torch.linalg.eigh(gram)
    S, scale = values.flip(0).clamp(min=0).sqrt(), own.diagonal().max().sqrt()
    found = Side(short, flip, S, vectors.flip(1), torch.float64, scale)
    if numerical:
        found = found.standing_out()
    found = found.leading(count)
    if not found.is_sound():
        wide = matrix.double()
        return _dense_triples(wide - basis @ (basis.T @ wide), count)
    if not flip:
        return found._replace(Q=projector @ found.Q).triples()
    left = found.triples().U
    return Triples(left - basis @ (basis.T @ left), found.S, found.Q)


def _dense_triples(matrix: Tensor, count: int) -> Triples:
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Triples(U, S, Vh.T).leading(count)


def polar(
    matrix: Tensor, numerical: bool = False, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`U V^T` for `matrix = U diag(S) V^T`, and S.

    Args:
        matrix: (m, n).
        numerical: of the triples that stand out from rounding noise only, as `triples`; otherwise
            of all min(m, n).
        dtype: of products, see `Side`; by default the matrix's.
    """
    found = short_side(matrix, dtype)
    if numerical:
        found = found.standing_out()
    elif not found.is_sound():
        U, S, V = _dense_triples(matrix, min(matrix.shape))
        return U @ V.T, S
    short = found.precise()
    factor = ((found.Q / found.S) @ found.Q.T).to(short.dtype) @ short
    return factor.T if found.flip else factor, found.S


def polar_mixing(columns: Tensor) -> Tensor:
    """X such that `columns @ X` is the polar factor of `columns` (m, k), k x k.

    With `columns = P diag(s) Q^T` the polar factor is `P Q^T` over the singular values above
    `eps max(m, k) s_max` (float32 eps): a partial isometry where columns are dependent, which does
    not depend on the order of the columns or on LAPACK. X is `Q diag(1/s) Q^T`.
    """
    values, Q = torch.linalg.eigh(lower_gram(columns.T))
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
    result = deltas[0].to(torch.float64, copy=True)
    for delta in deltas[1:]:
        result += delta
    return result


def mean(deltas: Sequence[Tensor]) -> Tensor:
    """The plain average of tensors, accumulated in float64."""
    return total(deltas) / len(deltas)
