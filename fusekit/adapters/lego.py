"""LoRA-LEGO: merge adapters by clustering their rank-1 pieces."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fusekit.adapters.adapter import half_precision, joined, to_float32
from fusekit.adapters.linalg import balance, gram_matrix, repeated_coefficients, tall_product

Array = npt.NDArray[Any]

MAX_REWEIGHTING = 10.0
"""Members that nearly cancel would otherwise be blown up by a factor without bound."""


@dataclass(frozen=True, slots=True)
class LegoOptions:
    """How pieces are clustered and rebuilt.

    Attributes:
        iterations: rounds of k-means.
        restarts: runs from different random pieces; the one of least inertia is used.
        feature: cluster pieces with both halves at unit length, or `raw`.
        norm: the norm that parameter reweighting restores, largest entry (`linf`) or `l2`.
        parameter_reweighting: give each centre the mean norm of its members.
        output_reweighting: scale the update by `sqrt(source rank / output rank)`.
        canonicalize: balance each piece's halves and flip it towards the largest piece first, as
            `(a, b)`, `(-a, -b)` and `(c a, b / c)` are one piece but far apart for k-means.
    """

    iterations: int = 10
    restarts: int = 1
    feature: Literal["unit", "raw"] = "unit"
    norm: Literal["linf", "l2"] = "linf"
    parameter_reweighting: bool = True
    output_reweighting: bool = True
    canonicalize: bool = False


@dataclass(frozen=True, slots=True)
class LegoResult:
    """A merged update `B @ A`, with the cluster of every piece and the reweighted centres.

    `cancels` says that the pieces of a cluster nearly cancel: their mean is scaled by
    `MAX_REWEIGHTING` and stays smaller than they are.
    """

    A: Array
    B: Array
    labels: npt.NDArray[np.int64]
    centres: Array
    cancels: bool


def merge_pieces(
    parts: Sequence[tuple[Array, Array, float]],
    rank: int,
    options: LegoOptions,
    seed: int = 0,
    initial: Array | None = None,
) -> LegoResult:
    """One update of rank `rank` from the pooled rank-1 pieces of several.

    Args:
        parts: `(A, B, coefficient)` per source; the coefficient is folded into both halves of every
            piece, its sign into A's.
        rank: number of clusters; at most the number of pieces is used.
        seed: of the initial centres.
        initial: rows of the pool to start from instead, in place of drawn ones.

    References:
        "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through
        Rank-Wise Clustering", arXiv 2409.16167.
    """
    pieces = _Pieces.pooled(parts)
    if options.canonicalize:
        pieces = pieces.canonical()
    count = min(rank, len(pieces.A))
    labels = _cluster(pieces.features(options.feature), count, options, seed, initial)
    centres_a, centres_b, cancels = _centres(pieces, labels, count, options)
    mean_rank = len(pieces.A) / len(parts)
    scale = np.float32(math.sqrt(mean_rank / count) if options.output_reweighting else 1.0)
    used = np.unique(labels)
    return LegoResult(
        A=centres_a[used] * np.sqrt(scale),
        B=centres_b[:, used] * np.sqrt(scale),
        labels=labels,
        centres=np.concatenate([centres_a, centres_b.T], axis=1),
        cancels=cancels,
    )


@dataclass(frozen=True, eq=False, slots=True)
class _Pieces:
    """Rank-1 pieces `(on_a A[j], on_b B[:, j])`: scaled wherever they are used, never as a whole.

    Attributes:
        A: (n, in).
        B: (out, n).
        on_a, on_b: (n,) factors of the rows of A and the columns of B.
        gram_a, gram_b: products of all pairs of scaled halves.
    """

    A: Array
    B: Array
    on_a: Array
    on_b: Array
    gram_a: Array
    gram_b: Array

    @classmethod
    def pooled(cls, parts: Sequence[tuple[Array, Array, float]]) -> _Pieces:
        """The pieces of all sources, in their order."""
        A, B = joined([a for a, _, _ in parts], axis=0), joined([b for _, b, _ in parts], axis=1)
        coefficients = repeated_coefficients(parts)
        on_b = np.sqrt(np.abs(coefficients))
        on_a = np.copysign(on_b, coefficients)
        dtype = np.float32 if half_precision((A, B)) else np.float64
        grams = gram_matrix(A.T, dtype), gram_matrix(B, dtype)
        return cls(A, B, np.ones_like(on_a), np.ones_like(on_b), *grams).scaled(on_a, on_b)

    def scaled(self, on_a: Array, on_b: Array) -> _Pieces:
        """The pieces with their halves multiplied by further factors."""
        return dataclasses.replace(
            self,
            on_a=self.on_a * on_a,
            on_b=self.on_b * on_b,
            gram_a=self.gram_a * np.outer(on_a, on_a),
            gram_b=self.gram_b * np.outer(on_b, on_b),
        )

    def canonical(self) -> _Pieces:
        """The same pieces with halves of equal length, turned towards the longest piece."""
        norm_a, norm_b = np.sqrt(self.gram_a.diagonal()), np.sqrt(self.gram_b.diagonal())
        ratio = balance(norm_a, norm_b)
        largest = int(np.argmax(norm_a * norm_b))
        signs = np.where(self.gram_a[largest] < 0, -1.0, 1.0)
        return self.scaled(signs * ratio, signs / ratio)

    def features(self, feature: Literal["unit", "raw"]) -> Array:
        """Inner products of all pairs of features, a piece's halves end to end, each at unit length
        for `unit`.

        All k-means needs of the features: a centre is a weighted mean of them, so that its
        distances are sums of these products.
        """
        if feature == "raw":
            return self.gram_a + self.gram_b
        total = np.zeros_like(self.gram_a)
        for gram in (self.gram_a, self.gram_b):
            lengths = np.sqrt(gram.diagonal()) + 1e-8
            total += gram / np.outer(lengths, lengths)
        return total

    def means(self, shares: Array) -> tuple[Array, Array]:
        """Weighted sums of pieces, (k, in) and (out, k), for weights (k, n)."""
        A = tall_product(self.A.T, (shares * self.on_a).T, np.float32).T
        return A, tall_product(self.B, (shares * self.on_b).T, np.float32)

    def norms(self, norm: Literal["linf", "l2"]) -> Array:
        """The norm of every piece, its halves end to end."""
        if norm == "l2":
            return np.asarray(np.sqrt(self.gram_a.diagonal() + self.gram_b.diagonal()))
        of_a, of_b = _largest(self.A, axis=1), _largest(self.B, axis=0)
        return np.asarray(np.maximum(np.abs(self.on_a) * of_a, np.abs(self.on_b) * of_b))


def _largest(matrix: Array, axis: int) -> Array:
    """The largest magnitude along an axis, in float32; of bfloat16 by its bits."""
    if matrix.dtype.name == "bfloat16":
        bits = np.bitwise_and(matrix.view(np.uint16), 0x7FFF).max(axis=axis)
        return to_float32(bits.view(matrix.dtype))
    return np.asarray(np.maximum(matrix.max(axis=axis), -matrix.min(axis=axis)))


def _cluster(
    gram: Array, count: int, options: LegoOptions, seed: int, initial: Array | None
) -> npt.NDArray[np.int64]:
    if count >= len(gram):
        return np.arange(len(gram))
    if initial is not None:
        return _k_means(gram, initial, options.iterations)[0]
    generator = np.random.Generator(np.random.Philox(seed))
    runs = [
        _k_means(gram, generator.permutation(len(gram))[:count], options.iterations)
        for _ in range(options.restarts)
    ]
    return min(runs, key=lambda run: run[1])[0]


def _k_means(gram: Array, initial: Array, iterations: int) -> tuple[npt.NDArray[np.int64], float]:
    """Labels of the last assignment, ties to the lowest index, and their inertia.

    Args:
        gram: inner products of the points.
        initial: the points that are the first centres. A cluster without members keeps its centre.
    """
    weights = np.zeros((len(initial), len(gram)))
    weights[np.arange(len(initial)), initial] = 1.0
    labels = np.full(len(gram), -1)
    inertia = 0.0
    for _ in range(iterations):
        products = weights @ gram
        squares = np.sum(products * weights, axis=1)
        distances = (squares[:, None] - 2 * products).T + gram.diagonal()[:, None]
        before, labels = labels, np.argmin(distances, axis=1)
        inertia = float(distances[np.arange(len(labels)), labels].sum())
        if np.array_equal(labels, before):
            break  # and the centres would stay where they are
        members = labels == np.arange(len(initial))[:, None]
        sizes = members.sum(axis=1, keepdims=True)
        weights = np.where(sizes > 0, members / np.maximum(sizes, 1), weights)
    return labels, inertia


def _centres(
    pieces: _Pieces, labels: npt.NDArray[np.int64], count: int, options: LegoOptions
) -> tuple[Array, Array, bool]:
    """Mean piece per cluster at its members' mean norm, (count, in) and (out, count), zero for an
    empty cluster; and whether members cancel, so that a mean does not reach that norm."""
    members = labels == np.arange(count)[:, None]
    shares = members / np.maximum(1, members.sum(axis=1, keepdims=True))
    mean_a, mean_b = pieces.means(shares)
    if not options.parameter_reweighting:
        return mean_a, mean_b, False
    wanted = shares @ pieces.norms(options.norm)
    found = _norms_of_means(mean_a, mean_b, options.norm)
    factors = (wanted / (found + 1e-12)).astype(np.float32)
    cancels = bool((factors > MAX_REWEIGHTING).any())
    factors = np.minimum(factors, np.float32(MAX_REWEIGHTING))
    return mean_a * factors[:, None], mean_b * factors, cancels


def _norms_of_means(A: Array, B: Array, norm: Literal["linf", "l2"]) -> Array:
    if norm == "linf":
        return np.asarray(np.maximum(_largest(A, axis=1), _largest(B, axis=0)))
    return np.asarray(np.hypot(np.linalg.norm(A, axis=1), np.linalg.norm(B, axis=0)))
