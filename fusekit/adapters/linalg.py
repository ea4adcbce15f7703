"""Singular value decompositions of products and of dense matrices, and ranks chosen from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fusekit.adapters.adapter import half_precision, joined, to_float32
from fusekit.errors import FusekitError

Array = npt.NDArray[Any]
Double = npt.NDArray[np.float64]

GRAM_CUTOFF = 1e-15
"""Directions whose share of a Gram matrix's largest eigenvalue is below this are rounding noise."""

GRAM_NOISE = 16
"""Shares of a Gram matrix below this many roundings of its element type tell nothing."""

CACHED_ROWS = 1024
"""Rows of a tall factor that are multiplied at a time."""


@dataclass(frozen=True, slots=True)
class ThinSvd:
    """`U @ diag(S) @ Vt`: U (out, k), S (k,) descending, Vt (k, in)."""

    U: Array
    S: Array
    Vt: Array

    def truncated(self, rank: int) -> ThinSvd:
        """The leading `rank` triples: the best approximation of that rank (Eckart-Young)."""
        return ThinSvd(self.U[:, :rank], self.S[:rank], self.Vt[:rank])

    def factors(self, split: str = "balanced") -> tuple[Array, Array]:
        """`(A, B)` with `B @ A` the product, float32.

        `balanced` puts the square root of S on both sides, `left` all of S on B (PEFT), `right`
        all of S on A. The largest entry of each row of A is made positive, so that the signs, which
        a decomposition leaves open, do not depend on the LAPACK at hand.
        """
        largest = np.argmax(np.abs(self.Vt), axis=1)
        signs = np.where(self.Vt[np.arange(len(largest)), largest] < 0, -1.0, 1.0)
        on_a, on_b = {
            "balanced": (np.sqrt(self.S), np.sqrt(self.S)),
            "left": (np.ones_like(self.S), self.S),
            "right": (self.S, np.ones_like(self.S)),
        }[split]
        A = (on_a * signs).astype(self.Vt.dtype)[:, None] * self.Vt
        B = self.U * (on_b * signs).astype(self.U.dtype)
        return A.astype(np.float32, copy=False), B.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class Orthogonal:
    """A tall matrix M as `Q @ R` with `Q = M @ basis`, orthonormal columns, Q never formed."""

    basis: Double
    R: Double


def orthogonalize(gram: Double) -> Orthogonal:
    """The orthogonal factorisation of a tall matrix from its Gram matrix `M.T @ M`.

    Takes the place of a thin QR, at the cost of one matrix product: with the Gram matrix in float64
    what is lost lies below 3e-8 of the largest singular value of M, under float32's resolution.
    """
    values, vectors = np.linalg.eigh(gram)
    keep = values > max(float(values[-1]), 0.0) * GRAM_CUTOFF
    roots = np.sqrt(values[keep])
    return Orthogonal(vectors[:, keep] / roots, roots[:, None] * vectors[:, keep].T)


@dataclass(frozen=True, slots=True)
class _Core:
    """`B @ A = Q_B R_B (Q_A R_A).T` for tall B and A.T, with every rank-1 piece balanced."""

    left: Orthogonal
    right: Orthogonal


def _core(B: Array, A: Array) -> _Core:
    """The orthogonal factorisations of both sides of a product.

    Columns of B are balanced against rows of A within the Gram matrices, so that the cutoff does
    not depend on how a piece's size is shared between its halves.
    """
    gram_b, gram_a = gram_matrix(B), gram_matrix(A.T)
    ratio = balance(np.sqrt(gram_b.diagonal()), np.sqrt(gram_a.diagonal()))
    left = orthogonalize(gram_b * np.outer(ratio, ratio))
    right = orthogonalize(gram_a / np.outer(ratio, ratio))
    return _Core(
        Orthogonal(ratio[:, None] * left.basis, left.R),
        Orthogonal(right.basis / ratio[:, None], right.R),
    )


def gram_matrix(tall: Array, dtype: type[np.floating[Any]] = np.float64) -> Double:
    """`M.T @ M` in float64, from pieces that fit the cache, multiplied in `dtype`."""
    total = np.zeros((tall.shape[1], tall.shape[1]))
    for start in range(0, tall.shape[0], CACHED_ROWS):
        piece = _widened(tall[start : start + CACHED_ROWS], dtype)
        total += piece.T @ piece
    return total


def tall_product(tall: Array, narrow: Array, dtype: type[np.floating[Any]]) -> Array:
    """`M @ narrow`, multiplied in `dtype`, kept in float32 (or M's type if that is wider)."""
    narrow = narrow.astype(dtype)
    if tall.dtype == dtype:
        return np.asarray(tall @ narrow)
    kept = np.float64 if tall.dtype == np.float64 else np.float32
    out = np.empty((tall.shape[0], narrow.shape[1]), kept)
    for start in range(0, tall.shape[0], CACHED_ROWS):
        rows = slice(start, start + CACHED_ROWS)
        out[rows] = _widened(tall[rows], dtype) @ narrow
    return out


def _widened(piece: Array, dtype: type[np.floating[Any]]) -> Array:
    """A piece of a tall matrix in `dtype`, laid out in memory as it was."""
    if piece.dtype.itemsize <= 2:
        lies = piece.strides[0] < piece.strides[1]
        piece = to_float32(piece.T).T if lies else to_float32(piece)
    return piece.astype(dtype, copy=False)


def product_svd(
    B: Array, A: Array, rank: int | None = None, coefficients: Array | None = None
) -> ThinSvd:
    """Thin SVD of `B @ A` without forming it: O((out + in) q^2) for B (out, q), A (q, in).

    See `gram_svd`; factors that depend on each other too closely for it are orthogonalised first.
    Products of factors in half precision are multiplied in float32, see `half_precision`.

    Args:
        rank: keep at most this many triples.
        coefficients: (q,) multipliers of the rows of A.
    """
    if half_precision((B, A)):
        found = _svd_by_eigenvectors(B, A, rank, coefficients, np.float32)
        if found is not None:
            return found
    found = _svd_by_eigenvectors(B, A, rank, coefficients, np.float64)
    if found is not None:
        return found
    A, B = (to_float32(x) if x.dtype.itemsize <= 2 else x for x in (A, B))
    if coefficients is not None:
        A = A * coefficients[:, None].astype(A.dtype)
    return _svd_by_core(B, A, rank)


@dataclass(frozen=True, slots=True)
class GramSvd:
    """The SVD of `B @ A` in terms of its factors: `U = B @ left`, `V = A.T @ right`."""

    left: Double
    S: Double
    right: Double


def gram_svd(
    gram_b: Double, gram_a: Double, dtype: type[np.floating[Any]], rank: int | None = None
) -> GramSvd | None:
    """The leading triples of `B @ A` from `B.T @ B` and `A @ A.T`.

    With `A A^T = L L^T` and the eigenvectors W of `L^T (B^T B) L`, whose eigenvalues are S^2:
    `U = B L W / S` and `V = A^T L^-T W`.

    Args:
        dtype: the element type in which the Gram matrices were multiplied.

    Returns:
        None where Gram matrices in that type cannot tell directions from noise.
    """
    noise = GRAM_NOISE * float(np.finfo(dtype).eps)
    lengths = np.sqrt(gram_a.diagonal())
    if not np.all(lengths > 0):
        return None
    try:
        lower = np.linalg.cholesky(gram_a / np.outer(lengths, lengths))
    except np.linalg.LinAlgError:
        return None
    if float(lower.diagonal().min()) ** 2 < noise:
        return None
    turned = lengths[:, None] * lower
    values, vectors = np.linalg.eigh(turned.T @ gram_b @ turned)
    values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
    if not values[-1] > noise * values[0]:
        return None
    roots = np.sqrt(values)
    right = np.linalg.solve(lower.T, vectors) / lengths[:, None]
    return GramSvd(turned @ vectors / roots, roots, right)


def _svd_by_eigenvectors(
    B: Array,
    A: Array,
    rank: int | None,
    coefficients: Array | None,
    dtype: type[np.floating[Any]],
) -> ThinSvd | None:
    """See `product_svd`; None where `gram_svd` gives none."""
    on_a = np.ones(A.shape[0]) if coefficients is None else coefficients.astype(np.float64)
    gram_a = gram_matrix(A.T, dtype) * np.outer(on_a, on_a)
    found = gram_svd(gram_matrix(B, dtype), gram_a, dtype, rank)
    if found is None:
        return None
    U = tall_product(B, found.left, dtype)
    V = tall_product(A.T, on_a[:, None] * found.right, dtype)
    return ThinSvd(U, found.S, V.T)


def _svd_by_core(B: Array, A: Array, rank: int | None) -> ThinSvd:
    """With `B = Q_B R_B` and `A.T = Q_A R_A`, the SVD of the small core `R_B @ R_A.T` gives that of
    the product."""
    core = _core(B, A)
    u, s, vt = np.linalg.svd(core.left.R @ core.right.R.T, full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    U = tall_product(B, core.left.basis @ u, np.float64)
    V = tall_product(A.T, core.right.basis @ vt.T, np.float64)
    return ThinSvd(U, s, V.T)


def product_singular_values(B: Array, A: Array) -> Double:
    """Singular values of `B @ A`, descending, without forming it."""
    core = _core(B, A)
    values = np.linalg.svd(core.left.R @ core.right.R.T, compute_uv=False)
    return np.asarray(values, np.float64)


def balance(norm_b: Array, norm_a: Array) -> Array:
    """Factors that, put on B's columns and taken off A's rows, make the pairs equally long."""
    used = (norm_b > 0) & (norm_a > 0)
    return np.sqrt(np.divide(norm_a, norm_b, out=np.ones_like(norm_b), where=used))


def exact_svd(matrix: Array, rank: int | None = None) -> ThinSvd:
    """Thin SVD of a dense matrix in its own precision, cut to `rank`."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return ThinSvd(u[:, :rank], s[:rank], vt[:rank])


def randomized_svd(
    matrix: Array,
    rank: int,
    *,
    oversample: int = 8,
    iterations: int = 2,
    seed: int = 0,
    omega: Array | None = None,
) -> ThinSvd:
    """Leading `rank` singular triples by subspace iteration from a Gaussian test matrix.

    `Q = orth(D Omega)`, then `iterations` times `Q = orth(D orth(D.T Q))`, then the SVD of `Q.T D`.
    The wider side is always the one projected away.

    Args:
        matrix: (out, in), float32 or float64.
        oversample: extra columns of the test matrix beyond `rank`.
        seed: of the test matrix; same seed, same result.
        omega: the test matrix itself (min(out, in), columns), instead of a drawn one.

    References:
        "Finding structure with randomness: Probabilistic algorithms for constructing approximate
        matrix decompositions", arXiv 0909.4061.
    """
    if matrix.shape[0] < matrix.shape[1]:
        flipped = randomized_svd(
            matrix.T, rank, oversample=oversample, iterations=iterations, seed=seed, omega=omega
        )
        return ThinSvd(flipped.Vt.T, flipped.S, flipped.U.T)
    if omega is None:
        columns = min(rank + oversample, matrix.shape[1])
        generator = np.random.Generator(np.random.Philox(seed))
        omega = generator.standard_normal((matrix.shape[1], columns))
    basis = _orthonormal(matrix @ omega.astype(matrix.dtype))
    for _ in range(iterations):
        basis = _orthonormal(matrix @ _orthonormal(matrix.T @ basis))
    u, s, vt = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return ThinSvd(basis @ u[:, :rank], s[:rank], vt[:rank])


def _orthonormal(matrix: Array) -> Array:
    """An orthonormal basis of the columns' span; a second pass removes the first one's rounding."""
    basis = matrix
    for _ in range(2):
        wide = basis.astype(np.float64)
        basis = (wide @ orthogonalize(wide.T @ wide).basis).astype(matrix.dtype)
    return basis


def energy_rank(singular_values: Array, energy: float) -> int:
    """Smallest R with `sum of the first R squared singular values >= energy * sum of all`."""
    squares = np.cumsum(np.square(singular_values, dtype=np.float64))
    if not len(squares) or squares[-1] == 0:
        return 0
    return int(np.searchsorted(squares, energy * squares[-1])) + 1


def allocate_ranks(
    singular_values: Mapping[str, Array], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Ranks that spend one budget over all modules where it removes most squared error.

    Each module's next triple is worth `S_j^2` and costs its `out + in` numbers; triples are taken
    in the order of worth per cost while they fit.

    Args:
        singular_values: descending, by module.
        costs: numbers stored per rank, by module.
        budget: numbers to store in all.

    Raises:
        FusekitError: the budget does not hold a single triple.
    """
    offers: list[tuple[float, str, int]] = []
    for name, values in singular_values.items():
        cost = costs[name]
        offers += [(float(value) ** 2 / cost, name, cost) for value in values if value > 0]
    offers.sort(key=lambda offer: -offer[0])
    ranks = dict.fromkeys(singular_values, 0)
    left = budget
    for _, name, cost in offers:
        if cost > left:
            continue
        ranks[name] += 1
        left -= cost
    if offers and not any(ranks.values()):
        cheapest = min(cost for _, _, cost in offers)
        raise FusekitError(
            f"a budget of {budget} parameters holds no rank at all; one rank of the smallest "
            f"module takes {cheapest}"
        )
    return ranks


def pad_rank(A: Array, B: Array, rank: int) -> tuple[Array, Array]:
    """The same product with zero ranks appended up to `rank`."""
    missing = rank - A.shape[0]
    if missing == 0:
        return A, B
    return np.pad(A, ((0, missing), (0, 0))), np.pad(B, ((0, 0), (0, missing)))


def stack_factors(parts: Sequence[tuple[Array, Array, float]]) -> tuple[Array, Array]:
    """`(A, B)` with `B @ A = sum_i c_i B_i A_i` from parts `(A_i, B_i, c_i)`; ranks add up.

    The coefficient goes on A, as in PEFT's `cat`.
    """
    A = to_float32(joined([a for a, _, _ in parts], axis=0))
    A *= repeated_coefficients(parts).astype(np.float32)[:, None]
    return A, to_float32(joined([b for _, b, _ in parts], axis=1))


def repeated_coefficients(parts: Sequence[tuple[Array, Array, float]]) -> Double:
    """Every part's coefficient as often as its rank."""
    ranks = [len(a) for a, _, _ in parts]
    return np.repeat(np.asarray([c for _, _, c in parts], np.float64), ranks)
