"""Rows for tokens an embedding matrix lacks, found without training.

The space both models know is spanned by the tokens they share: `X` holds the shared tokens' rows in
the donor's embedding, `Y` the same tokens' rows in the model's. A new token's row is found by
describing its donor row in terms of `X` and reading the description in `Y`.

References: Goddard and Fernandes Neto, "Training-Free Tokenizer Transplantation via Orthogonal
Matching Pursuit", 2025, arXiv 2506.06607.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from fusekit.errors import FusekitError, did_you_mean

Array = NDArray[Any]
WeightScheme = Literal["distance_proportional", "barycentric", "least_squares"]
SubwordRule = Literal["mean", "sum", "weighted_mean", "first_last"]

_MIN_DISTANCE = 1e-6
_DEPENDENT = 1e-6
_EXPLAINED = 1e-8


class SparseCode(NamedTuple):
    """Donor rows as combinations of shared rows: `indices` (B, k), -1 unused; `coefficients`."""

    indices: NDArray[np.int64]
    coefficients: Array

    def read_in(self, Y: Array) -> Array:
        """The combinations in another space: row `b` is `sum_j c[b, j] Y[indices[b, j]]`."""
        picked = Y[np.maximum(self.indices, 0)].astype(self.coefficients.dtype)
        return np.asarray(np.einsum("bk,bkh->bh", self.coefficients, picked))


def omp(targets: Array, X: Array, k: int = 64) -> SparseCode:
    """Orthogonal matching pursuit: each target as least squares on `k` greedily picked rows of X.

    From residual `r = x`, `k` times: pick the unused row with the largest `|<r, X_j>|` (rows are
    not normalised), then project `x` off the span of the picked rows. A target stops early once
    its residual is below 1e-8 of its norm or the best row adds nothing to the span.

    Args:
        targets: (B, h) donor rows to describe.
        X: (n, h) donor rows of the shared tokens.
        k: rows per target, 1 to n.

    Returns:
        Indices into X in the order picked, -1 after an early stop, and their coefficients.

    Raises:
        FusekitError: `k` is not between 1 and n.
    """
    _check_k(k, len(X))
    atoms = _working(X)
    x = targets.astype(np.float64)
    batch, width = x.shape
    indices = np.full((batch, k), -1, np.int64)
    basis = np.zeros((batch, k, width))
    triangle = np.zeros((batch, k, k))
    triangle[:, np.arange(k), np.arange(k)] = 1.0
    projections = np.zeros((batch, k))
    used = np.zeros((batch, len(X)), bool)
    residual = x.copy()
    norms = np.linalg.norm(x, axis=1)
    active = np.flatnonzero(norms > 0)
    for step in range(k):
        if len(active) == 0:
            break
        match = np.abs(residual[active].astype(atoms.dtype) @ atoms.T)
        match[used[active]] = -1.0
        best = match.argmax(axis=1)
        atom = X[best].astype(np.float64)
        along = np.einsum("bsh,bh->bs", basis[active, :step], atom)
        direction = atom - np.einsum("bs,bsh->bh", along, basis[active, :step])
        length = np.linalg.norm(direction, axis=1)
        fresh = length > _DEPENDENT * np.linalg.norm(atom, axis=1)
        active, best, direction, along, length = (
            values[fresh] for values in (active, best, direction, along, length)
        )
        direction /= length[:, None]
        indices[active, step] = best
        used[active, best] = True
        basis[active, step] = direction
        triangle[active, :step, step] = along
        triangle[active, step, step] = length
        projections[active, step] = np.einsum("bh,bh->b", direction, residual[active])
        residual[active] -= projections[active, step, None] * direction
        left = np.linalg.norm(residual[active], axis=1)
        active = active[left > _EXPLAINED * norms[active]]
    coefficients = np.linalg.solve(triangle, projections[:, :, None])[:, :, 0]
    return SparseCode(indices, coefficients.astype(_working(targets).dtype))


def nearest_rows(
    targets: Array, X: Array, k: int, *, cosine: bool = False
) -> tuple[NDArray[np.int64], Array]:
    """Indices and distances, both (B, k) ascending, of the rows of X nearest to each target.

    The distance is euclidean, or `1 - cos` with `cosine`. Equal distances are ordered by index.

    Raises:
        FusekitError: `k` is not between 1 and the number of rows.
    """
    _check_k(k, len(X))
    x, rows = _working(targets), _working(X)
    if cosine:
        x, rows = _unit(x), _unit(rows)
        rough = -(x @ rows.T)
    else:
        rough = np.einsum("nh,nh->n", rows, rows) - 2.0 * (x @ rows.T)
    candidates = np.sort(np.argpartition(rough, k - 1, axis=1)[:, :k], axis=1)
    near = rows[candidates].astype(np.float64)
    exact = x.astype(np.float64)[:, None, :]
    if cosine:
        distances = 1.0 - np.einsum("bkh,bkh->bk", near, np.broadcast_to(exact, near.shape))
    else:
        distances = np.linalg.norm(near - exact, axis=2)
    order = np.argsort(distances, axis=1, kind="stable")
    return np.take_along_axis(candidates, order, 1), np.take_along_axis(distances, order, 1)


def common_interpolation(
    targets: Array,
    X: Array,
    k: int = 64,
    *,
    cosine: bool = False,
    scheme: WeightScheme = "distance_proportional",
) -> SparseCode:
    """Each target as a combination of its `k` nearest rows of X.

    Weights by `scheme`: `distance_proportional` `1 / max(d, 1e-6)` (with `cosine`: `1 - d`),
    scaled to sum 1; `barycentric` the least-squares weights of sum 1; `least_squares` without that
    condition (least norm where they are not unique).

    Raises:
        FusekitError: `k` is not between 1 and the number of rows, or an unknown scheme.
    """
    if scheme not in get_args(WeightScheme):
        raise FusekitError(
            f"unknown weight scheme {scheme!r}{did_you_mean(scheme, get_args(WeightScheme))}"
        )
    indices, distances = nearest_rows(targets, X, k, cosine=cosine)
    near = X[indices].astype(np.float64)
    x = targets.astype(np.float64)
    if scheme == "distance_proportional":
        weights = 1.0 - distances if cosine else 1.0 / np.maximum(distances, _MIN_DISTANCE)
        total = weights.sum(axis=1, keepdims=True)
        weights = weights / np.where(np.abs(total) < _MIN_DISTANCE, 1.0, total)
    elif scheme == "barycentric":
        weights = _barycentric(x, near)
    else:
        weights = np.einsum("bkh,bh->bk", np.linalg.pinv(near.transpose(0, 2, 1)), x)
    return SparseCode(indices, weights.astype(_working(targets).dtype))


class Rotation(NamedTuple):
    """The map `x -> (x - source_mean) matrix + target_mean` between two spaces."""

    source_mean: Array
    matrix: Array
    target_mean: Array

    def carry(self, rows: Array) -> Array:
        """Rows of the first space in the second."""
        carried: Array = (rows - self.source_mean) @ self.matrix + self.target_mean
        return carried.astype(_working(rows).dtype)


def landmark_rotation(X: Array, Y: Array) -> Rotation:
    """The rotation that carries the shared rows X nearest to Y, after centring both.

    Its matrix is `U V^T` with `U S V^T` the SVD of `Xc^T Yc`, thin where the widths differ.

    Args:
        X: (n, h_donor) and Y: (n, h_model), rows of the same tokens.

    References: Schönemann, "A generalized solution of the orthogonal Procrustes problem", 1966.
    """
    x_mean, y_mean = X.mean(axis=0, dtype=np.float64), Y.mean(axis=0, dtype=np.float64)
    left, _, right = np.linalg.svd((X - x_mean).T @ (Y - y_mean), full_matrices=False)
    return Rotation(x_mean, left @ right, y_mean)


class RowDistribution(NamedTuple):
    """N(mean, factor factor^T) over rows."""

    mean: Array
    factor: Array

    def draw(self, count: int, generator: np.random.Generator) -> Array:
        """`count` rows, (count, h)."""
        draws = generator.standard_normal((count, len(self.mean)))
        return np.asarray(self.mean + draws @ self.factor.T)


def row_distribution(matrix: Array) -> RowDistribution:
    """The normal distribution with the mean and covariance of a matrix's rows.

    References: Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021.
    """
    mean = matrix.mean(axis=0, dtype=np.float64)
    centred = matrix - mean
    variances, axes = np.linalg.eigh(centred.T @ centred / len(matrix))
    return RowDistribution(mean, axes * np.sqrt(np.maximum(variances, 0.0)))


def subword_rows(
    matrix: Array,
    pieces: list[list[int]],
    rule: SubwordRule = "mean",
    *,
    head: bool = False,
) -> Array:
    """Rows of tokens from the rows of the pieces they split into.

    `mean`, `sum`; `weighted_mean` with weights growing linearly to the last piece (in a head: to
    the first); `first_last` takes the last piece (in a head: the first). A token without pieces
    gets the mean row of the matrix.

    Args:
        matrix: (n, h) rows by id.
        pieces: ids of each token's pieces.
        rule: how the pieces' rows are combined.
        head: whether the matrix is an output head.

    Raises:
        FusekitError: an unknown rule.
    """
    if rule not in get_args(SubwordRule):
        raise FusekitError(
            f"unknown subword rule {rule!r}{did_you_mean(rule, get_args(SubwordRule))}"
        )
    counts = np.fromiter((len(ids) for ids in pieces), np.int64, len(pieces))
    flat = np.fromiter((piece for ids in pieces for piece in ids), np.int64, int(counts.sum()))
    token = np.repeat(np.arange(len(pieces)), counts)
    place = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
    length = counts[token]
    from_start = length - place if head else place + 1
    if rule == "first_last":
        weights = (from_start == length).astype(np.float64)
    elif rule == "weighted_mean":
        weights = from_start / (length * (length + 1) / 2)
    elif rule == "mean":
        weights = 1.0 / length
    else:
        weights = np.ones(len(flat))
    rows = np.zeros((len(pieces), matrix.shape[1]))
    np.add.at(rows, token, weights[:, None] * matrix[flat].astype(np.float64))
    bare = counts == 0
    if bare.any():
        rows[bare] = matrix.mean(axis=0, dtype=np.float64)
    return rows.astype(_working(matrix).dtype)


def poorly_trained(matrix: Array, unused: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Rows that look as if training had hardly touched them.

    A norm below the 1% quantile of all norms, or a cosine to the mean of the known-`unused` rows
    above both 0.5 and the 99% quantile of those cosines.

    References: Land and Bartolo, "Fishing for Magikarp", 2024, arXiv 2405.05417.
    """
    rows = _working(matrix)
    norms = np.linalg.norm(rows, axis=1)
    poor = norms < np.quantile(norms, 0.01)
    if len(unused):
        cosines = _unit(rows) @ _unit(rows[unused].mean(axis=0)[None])[0]
        poor |= cosines > max(0.5, float(np.quantile(cosines, 0.99)))
    return np.asarray(poor, np.bool_)


def _check_k(k: int, rows: int) -> None:
    if not 1 <= k <= rows:
        raise FusekitError(f"k is {k}, expected 1 to {rows}, the number of shared tokens")


def _working(array: Array) -> Array:
    """float64 stays, everything else is computed in float32."""
    return array if array.dtype == np.float64 else array.astype(np.float32, copy=False)


def _unit(rows: Array) -> Array:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms == 0, 1.0, norms).astype(rows.dtype))


def _barycentric(x: Array, near: Array) -> Array:
    """Weights of sum 1 that minimise `||x - w N||`, from the bordered normal equations."""
    batch, k, _ = near.shape
    system = np.ones((batch, k + 1, k + 1))
    system[:, :k, :k] = near @ near.transpose(0, 2, 1)
    system[:, k, k] = 0.0
    right = np.ones((batch, k + 1))
    right[:, :k] = np.einsum("bkh,bh->bk", near, x)
    solution = np.einsum("bij,bj->bi", np.linalg.pinv(system, hermitian=True), right)
    return np.asarray(solution[:, :k])
