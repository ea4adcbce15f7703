"""KnOTS: express several updates of a layer in one basis, then merge their coordinates."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from fusekit.adapters.combine import MaskOf
from fusekit.adapters.linalg import balance, gram_matrix, orthogonalize

Array = npt.NDArray[Any]
Layer = Mapping[int, Array]
"""Coordinates (k, in) of one layer by source; sources without that layer are absent."""

Rule = Literal["ties", "linear"]

SINGULAR_CUTOFF = 1e-5
"""Components of the joint decomposition with singular values at or below this are dropped."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """`D_i = U @ coordinates(i)` for every source i.

    Attributes:
        S: (k,) singular values of the concatenation `[D_1 | ... | D_n]`.
        turn: (sum of ranks, k); `U = [B_1 .. B_n] @ turn`.
        mixing: per source (k, rank_i); the coordinates are `mixing_i @ A_i`.
        A: per source (rank_i, in).
        B: per source (out, rank_i).
    """

    S: Array
    turn: Array
    mixing: Sequence[Array]
    A: Sequence[Array]
    B: Sequence[Array]

    def basis(self) -> Array:
        """U (out, k), orthonormal columns, in float64."""
        return np.concatenate(self.B, axis=1).astype(np.float64) @ self.turn

    def coordinates(self, source: int) -> Array:
        """`diag(S) @ V_i`, (k, in) in float32."""
        wide = self.A[source].astype(np.float64)
        return np.asarray(self.mixing[source] @ wide, dtype=np.float32)


def align(parts: Sequence[tuple[Array, Array, float]]) -> Aligned:
    """The joint SVD of the concatenated updates `s_i B_i A_i`, from their factors alone.

    `[D_1 | ... | D_n] = [B_1 .. B_n] blockdiag(s_i A_i)`: only the q x q core between the two
    orthogonalised factors is decomposed, q being the sum of ranks.

    References:
        "Model merging with SVD to tie the Knots", arXiv 2410.19735.
    """
    A, B = [a for a, _, _ in parts], [b for _, b, _ in parts]
    gram_b = gram_matrix(np.concatenate(B, axis=1))
    grams_a = [gram_matrix(a.T) for a in A]
    scale = np.concatenate([np.full(len(a), s, np.float64) for a, _, s in parts])
    norm_b = np.sqrt(gram_b.diagonal()) * np.abs(scale)
    ratio = balance(norm_b, np.sqrt(np.concatenate([gram.diagonal() for gram in grams_a])))
    left = orthogonalize(gram_b * np.outer(scale * ratio, scale * ratio))
    edges = np.cumsum([0, *(len(a) for a in A)])
    spans = [slice(i, j) for i, j in itertools.pairwise(edges)]
    rights = [
        orthogonalize(gram / np.outer(ratio[span], ratio[span]))
        for gram, span in zip(grams_a, spans, strict=True)
    ]
    core = np.concatenate(
        [left.R[:, span] @ right.R.T for span, right in zip(spans, rights, strict=True)], axis=1
    )
    u, s, vt = np.linalg.svd(core, full_matrices=False)
    keep = s > SINGULAR_CUTOFF
    u, s, vt = u[:, keep], s[keep], vt[keep]
    columns = np.cumsum([0, *(len(right.R) for right in rights)])
    mixing = [
        (s[:, None] * vt[:, i:j]) @ right.basis.T / ratio[span]
        for i, j, right, span in zip(columns[:-1], columns[1:], rights, spans, strict=True)
    ]
    return Aligned(s, (scale * ratio)[:, None] * (left.basis @ u), mixing, A, B)


class Agreement:
    """What the rules need to know of all layers together, without keeping any coordinates.

    The threshold of a source is the k-th smallest of its d magnitudes over all layers, k being
    `d - int(d * density)`; it is found by two counting passes over the magnitudes' bits.

    Args:
        coordinates: starts a pass over the layers.
        densities: fraction kept of each source; 1 everywhere keeps everything, without a pass.
    """

    def __init__(
        self, coordinates: Callable[[], Iterator[Layer]], densities: Sequence[float]
    ) -> None:
        self._coordinates = coordinates
        self._lock = threading.Lock()
        self._majority: float | None = None
        self.thresholds = [0.0] * len(densities)
        if min(densities) < 1:
            self.thresholds = _global_thresholds(coordinates, densities)

    def majority(self) -> float:
        """Sign of the sum of all elected signs: one more pass, at the first call only."""
        with self._lock:
            if self._majority is None:
                signs = (
                    np.sign(_pruned_sum(layer, self.thresholds)) for layer in self._coordinates()
                )
                self._majority = float(np.sign(sum(float(sign.sum()) for sign in signs)))
            return self._majority


def merge_coordinates(
    layer: Layer, weights: Sequence[float], rule: Rule, agreement: Agreement
) -> Array:
    """One layer's merged coordinates (k, in).

    `linear`: the weighted sum of the entries kept. `ties`: of those that agree with the sign of
    the kept entries' unweighted sum, over the number of non-zero ones. Where kept entries cancel
    to exactly zero, the majority sign of the whole model is elected.
    """
    kept = {
        source: np.where(np.abs(x) >= agreement.thresholds[source], x, np.float32(0))
        for source, x in layer.items()
    }
    if rule == "linear":
        return np.asarray(sum(x * np.float32(weights[source]) for source, x in kept.items()))
    elected = np.sign(sum(kept.values()))
    undecided = (elected == 0) & np.any([x != 0 for x in kept.values()], axis=0)
    if undecided.any():
        elected[undecided] = agreement.majority()
    total: Array = np.zeros_like(elected)
    count = np.zeros(elected.shape, dtype=np.int32)
    for source, x in kept.items():
        masked = x * (np.sign(x) == elected) * np.float32(weights[source])
        total += masked
        count += masked != 0
    return total / np.maximum(count, 1).astype(np.float32)


def dropped(layer: Layer, densities: Sequence[float], mask_of: MaskOf) -> Layer:
    """DARE on coordinates: a random share `1 - density` set to zero, the rest over `density`.

    `densities` goes by source, `mask_of` is asked by the coordinates' place in the layer.
    """
    return {
        source: x * mask_of(place, slice(0, x.shape[0]), x.shape[1]) / np.float32(densities[source])
        for place, (source, x) in enumerate(layer.items())
    }


def _pruned_sum(layer: Layer, thresholds: Sequence[float]) -> Array:
    kept = [
        np.where(np.abs(x) >= thresholds[source], x, np.float32(0)) for source, x in layer.items()
    ]
    return np.asarray(sum(kept[1:], start=kept[0]))


def _global_thresholds(
    coordinates: Callable[[], Iterator[Layer]], densities: Sequence[float]
) -> list[float]:
    """The bits of a non-negative float32 are ordered as its value: count the upper half of the bits
    first, then the lower half within the one upper half that holds the threshold."""
    sources = len(densities)
    # BLAS on one thread: its products are small here, and waiting threads cost more than they save.
    with threadpool_limits(1, user_api="blas"):
        upper = _counted(coordinates(), [0] * sources, shift=16)
        sizes = upper.sum(axis=1)
        wanted = sizes - (sizes * np.asarray(densities)).astype(np.int64)
        cumulative = upper.cumsum(axis=1)
        high = [int(np.searchsorted(c, k)) for c, k in zip(cumulative, wanted, strict=True)]
        lower = _counted(coordinates(), [each << 16 for each in high], shift=0)
    thresholds = []
    for source in range(sources):
        before = int(cumulative[source, high[source]] - upper[source, high[source]])
        low = int(np.searchsorted(lower[source].cumsum(), wanted[source] - before))
        bits = np.array((high[source] << 16) | low, dtype=np.uint32)
        thresholds.append(float(bits.view(np.float32)))
    return thresholds


def _counted(layers: Iterator[Layer], lows: Sequence[int], shift: int) -> npt.NDArray[np.int64]:
    """How many magnitudes of each source have bits in each of 2^16 bins of 2^shift from `low`."""
    from fusekit.kernels import order

    counts = np.zeros((len(lows), 1 << 16), dtype=np.int64)
    span = (1 << (16 + shift)) - 1
    for layer in layers:
        for source, x in layer.items():
            bits = np.ascontiguousarray(x).reshape(-1).view(np.uint32)
            keys = np.empty_like(bits)
            order.magnitude_keys(bits, np.uint32(0x7FFFFFFF), keys)
            low = np.uint32(lows[source])
            high = np.uint32(lows[source] + span)
            order.count_bracket(keys, low, high, np.uint32(shift), counts[source])
    return counts
