"""LoRA-LEGO: merge adapters by clustering their rank-1 pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

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
    roots = [np.sqrt(abs(coefficient)) for _, _, coefficient in parts]
    halves_a = [a * (np.copysign(r, c)) for (a, _, c), r in zip(parts, roots, strict=True)]
    halves_b = [(b * r).T for (_, b, _), r in zip(parts, roots, strict=True)]
    a = np.concatenate(halves_a).astype(np.float64)
    b = np.concatenate(halves_b).astype(np.float64)
    if options.canonicalize:
        a, b = _canonical(a, b)
    pieces = np.concatenate([a, b], axis=1)
    count = min(rank, len(pieces))
    labels = _cluster(_features(a, b, options), count, options, seed, initial)
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


def _features(a: Array, b: Array, options: LegoOptions) -> Array:
    if options.feature == "raw":
        return np.concatenate([a, b], axis=1)
    return np.concatenate(
        [half / (np.linalg.norm(half, axis=1, keepdims=True) + 1e-8) for half in (a, b)], axis=1
    )


def _canonical(a: Array, b: Array) -> tuple[Array, Array]:
    norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    used = (norm_a > 0) & (norm_b > 0)
    ratio = np.sqrt(np.divide(norm_b, norm_a, out=np.ones_like(norm_a), where=used))[:, None]
    a, b = a * ratio, b / ratio
    largest = int(np.argmax(norm_a * norm_b))
    signs = np.where(a @ a[largest] < 0, -1.0, 1.0)[:, None]
    return a * signs, b * signs


def _cluster(
    features: Array, count: int, options: LegoOptions, seed: int, initial: Array | None
) -> npt.NDArray[np.int64]:
    if count >= len(features):
        return np.arange(len(features))
    if initial is not None:
        return _k_means(features, features[initial], options.iterations)[0]
    generator = np.random.Generator(np.random.Philox(seed))
    runs = [
        _k_means(
            features, features[generator.permutation(len(features))[:count]], options.iterations
        )
        for _ in range(options.restarts)
    ]
    return min(runs, key=lambda run: run[1])[0]


def _k_means(
    features: Array, centres: Array, iterations: int
) -> tuple[npt.NDArray[np.int64], float]:
    """Labels of the last assignment, ties to the lowest index, and their inertia."""
    centres = centres.copy()
    squares = np.square(features).sum(axis=1)
    labels = np.zeros(len(features), dtype=np.int64)
    inertia = 0.0
    for _ in range(iterations):
        distances = (
            squares[:, None] - 2 * features @ centres.T + np.square(centres).sum(axis=1)[None, :]
        )
        labels = np.argmin(distances, axis=1)
        inertia = float(distances[np.arange(len(labels)), labels].sum())
        for cluster in np.unique(labels):
            centres[cluster] = features[labels == cluster].mean(axis=0)
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
