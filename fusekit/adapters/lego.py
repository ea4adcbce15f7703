"""LoRA-LEGO: merge adapters by clustering their rank-1 pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fusekit.adapters.adapter import half_precision
from fusekit.adapters.linalg import balance, gram_matrix, stack_factors

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
    """A merged update `B @ A`, with the cluster of every piece and the reweighted centres."""

    A: Array
    B: Array
    labels: npt.NDArray[np.int64]
    centres: Array


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
    roots = [math.sqrt(abs(coefficient)) for _, _, coefficient in parts]
    signed = [math.copysign(root, c) for root, (_, _, c) in zip(roots, parts, strict=True)]
    A, B = stack_factors([(a, b, c) for (a, b, _), c in zip(parts, signed, strict=True)])
    B *= np.repeat(np.asarray(roots, np.float32), [len(a) for a, _, _ in parts])
    if options.canonicalize:
        A, B = _canonical(A, B)
    count = min(rank, len(A))
    halves = half_precision([factor for a, b, _ in parts for factor in (a, b)])
    gram = _feature_gram(A, B, options.feature, np.float32 if halves else np.float64)
    labels = _cluster(gram, count, options, seed, initial)
    centres_a, centres_b = _centres(A, B, labels, count, options)
    mean_rank = len(A) / len(parts)
    scale = np.float32(math.sqrt(mean_rank / count) if options.output_reweighting else 1.0)
    used = np.unique(labels)
    return LegoResult(
        A=centres_a[used] * np.sqrt(scale),
        B=centres_b[:, used] * np.sqrt(scale),
        labels=labels,
        centres=np.concatenate([centres_a, centres_b.T], axis=1),
    )


def _feature_gram(
    A: Array, B: Array, feature: Literal["unit", "raw"], dtype: type[np.floating[Any]]
) -> Array:
    """Inner products of all pairs of features, a row of A and a column of B, each of the two at
    unit length for `unit`.

    All k-means needs of the features: a centre is a weighted mean of them, so that its distances
    are sums of these products.
    """
    total = np.zeros((len(A), len(A)))
    for gram in (gram_matrix(A.T, dtype), gram_matrix(B, dtype)):
        if feature == "unit":
            lengths = np.sqrt(gram.diagonal()) + 1e-8
            gram /= np.outer(lengths, lengths)
        total += gram
    return total


def _canonical(A: Array, B: Array) -> tuple[Array, Array]:
    norm_a, norm_b = np.linalg.norm(A, axis=1), np.linalg.norm(B, axis=0)
    ratio = balance(norm_a, norm_b)
    A, B = A * ratio[:, None], B / ratio
    largest = int(np.argmax(norm_a * norm_b))
    signs = np.where(A @ A[largest] < 0, np.float32(-1), np.float32(1))
    return A * signs[:, None], B * signs


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
    labels = np.zeros(len(gram), dtype=np.int64)
    inertia = 0.0
    for _ in range(iterations):
        products = weights @ gram
        squares = np.sum(products * weights, axis=1)
        distances = (squares[:, None] - 2 * products).T + gram.diagonal()[:, None]
        labels = np.argmin(distances, axis=1)
        inertia = float(distances[np.arange(len(labels)), labels].sum())
        for cluster in np.unique(labels):
            members = labels == cluster
            weights[cluster] = members / np.count_nonzero(members)
    return labels, inertia


def _centres(
    A: Array, B: Array, labels: npt.NDArray[np.int64], count: int, options: LegoOptions
) -> tuple[Array, Array]:
    """Mean piece per cluster at its members' mean norm, (count, in) and (out, count); zero for an
    empty cluster."""
    members = labels == np.arange(count)[:, None]
    shares = (members / np.maximum(1, members.sum(axis=1, keepdims=True))).astype(np.float32)
    mean_a, mean_b = shares @ A, B @ shares.T
    if options.parameter_reweighting:
        wanted = shares @ _norms(A, B, options.norm)
        found = _norms(mean_a, mean_b, options.norm)
        factors = np.minimum(wanted / (found + np.float32(1e-12)), np.float32(MAX_REWEIGHTING))
        mean_a *= factors[:, None]
        mean_b *= factors
    return mean_a, mean_b


def _norms(A: Array, B: Array, norm: Literal["linf", "l2"]) -> Array:
    """Norm of every piece, its halves a row of A and a column of B set end to end."""
    if norm == "linf":
        ends = (A.max(axis=1), -A.min(axis=1), B.max(axis=0), -B.min(axis=0))
        return np.asarray(np.maximum.reduce(ends))
    return np.asarray(np.hypot(np.linalg.norm(A, axis=1), np.linalg.norm(B, axis=0)))
