"""LoRA-LEGO: merge adapters by clustering their rank-1 pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fusekit.adapters.linalg import balance, gram_matrix

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
    roots = [np.float32(np.sqrt(abs(coefficient))) for _, _, coefficient in parts]
    halves_a = [a * np.copysign(r, c) for (a, _, c), r in zip(parts, roots, strict=True)]
    halves_b = [(b * r).T for (_, b, _), r in zip(parts, roots, strict=True)]
    a, b = np.concatenate(halves_a), np.concatenate(halves_b)
    if options.canonicalize:
        a, b = _canonical(a, b)
    count = min(rank, len(a))
    labels = _cluster(_feature_gram(a, b, options), count, options, seed, initial)
    pieces = np.concatenate([a, b], axis=1)
    centres = _centres(pieces, labels, count, options)
    mean_rank = len(pieces) / len(parts)
    scale = np.sqrt(mean_rank / count) if options.output_reweighting else 1.0
    used = np.unique(labels)
    merged = centres[used] * np.sqrt(scale)
    width = a.shape[1]
    return LegoResult(
        A=merged[:, :width].astype(np.float32),
        B=np.ascontiguousarray(merged[:, width:].T).astype(np.float32),
        labels=labels,
        centres=centres,
    )


def _feature_gram(a: Array, b: Array, options: LegoOptions) -> Array:
    """Inner products of all pairs of features `[a ; b]`, each half at unit length for `unit`.

    All k-means needs of the features: a centre is a weighted mean of them, so that its distances
    are sums of these products.
    """
    total = np.zeros((len(a), len(a)))
    for half in (a, b):
        gram = gram_matrix(half.T)
        if options.feature == "unit":
            lengths = np.sqrt(gram.diagonal()) + 1e-8
            gram = gram / np.outer(lengths, lengths)
        total += gram
    return total


def _canonical(a: Array, b: Array) -> tuple[Array, Array]:
    norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    ratio = balance(norm_a, norm_b)[:, None]
    a, b = a * ratio, b / ratio
    largest = int(np.argmax(norm_a * norm_b))
    signs = np.where(a @ a[largest] < 0, -1.0, 1.0)[:, None].astype(np.float32)
    return a * signs, b * signs


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
    pieces: Array, labels: npt.NDArray[np.int64], count: int, options: LegoOptions
) -> Array:
    """Mean raw piece per cluster at its members' mean norm; zero for an empty cluster."""
    centres = np.zeros((count, pieces.shape[1]))
    order = np.inf if options.norm == "linf" else 2
    for cluster in np.unique(labels):
        members = pieces[labels == cluster]
        centre = members.mean(axis=0)
        if options.parameter_reweighting:
            wanted = np.linalg.norm(members, ord=order, axis=1).mean()
            factor = wanted / (np.linalg.norm(centre, ord=order) + 1e-12)
            centre = centre * min(factor, MAX_REWEIGHTING)
        centres[cluster] = centre
    return centres
