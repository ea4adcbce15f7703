"""KnOTS: express several updates of a layer in one basis, then merge their coordinates."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from fusekit.adapters.adapter import half_precision, joined, to_float32
from fusekit.adapters.linalg import balance, gram_matrix, gram_svd, orthogonalize, tall_product

Array = npt.NDArray[Any]
Double = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Rule = Literal["ties", "linear"]

SINGULAR_CUTOFF = 1e-5
"""Components of the joint decomposition with singular values at or below this are dropped."""

BLOCK_COLUMNS = 512
"""Columns of coordinates that are in memory at a time, few enough to stay in the cache."""

SAMPLED_COLUMNS = 16
"""Of so many columns, one is looked at to guess where a threshold lies."""

_UPPER_HALVES = 1 << 15
"""Values the upper half of a float32's magnitude can have."""


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """Coordinates of some columns of one layer: (sources, k, columns) in float32.

    Sources without that layer are absent.
    """

    sources: tuple[int, ...]
    coordinates: Array

    @property
    def rows(self) -> Array:
        """The coordinates as one row per source."""
        return self.coordinates.reshape(len(self.sources), -1)


@dataclass(frozen=True, eq=False, slots=True)
class Aligned:
    """`D_i = U @ coordinates(i)` for every source i.

    Attributes:
        S: (k,) singular values of the concatenation `[D_1 | ... | D_n]`.
        turn: (sum of ranks, k); `U = [B_1 .. B_n] @ turn`.
        loads: per source (k, rank_i); the coordinates are `loads_i @ A_i`.
    """

    S: Array
    turn: Array
    loads: Sequence[Array]

    def basis(self, B: Sequence[Array]) -> Array:
        """U (out, k), orthonormal columns, from the sources' B (out, rank_i)."""
        stacked = joined(B, axis=1)
        dtype = np.float32 if half_precision((stacked,)) else np.float64
        return tall_product(stacked, self.turn, dtype)

    def blocks(self, A: Sequence[Array], sources: Sequence[int]) -> Iterator[Block]:
        """The coordinates `diag(S) @ V_i` of all sources, some columns at a time.

        Every block takes the place of the one before.

        Args:
            A: (rank_i, in) of every source.
            sources: what blocks call them.
        """
        wide = [to_float32(a) for a in A]
        loads = [load.astype(np.float32) for load in self.loads]
        columns = A[0].shape[1]
        room = np.empty(len(A) * len(self.S) * min(columns, BLOCK_COLUMNS), np.float32)
        for start in range(0, columns, BLOCK_COLUMNS):
            width = min(BLOCK_COLUMNS, columns - start)
            shape = (len(A), len(self.S), width)
            block = room[: len(A) * len(self.S) * width].reshape(shape)
            for i, (load, a) in enumerate(zip(loads, wide, strict=True)):
                np.matmul(load, a[:, start : start + width], out=block[i])
            yield Block(tuple(sources), block)


def align(parts: Sequence[tuple[Array, Array, float]]) -> Aligned:
    """The joint SVD of the concatenated updates `s_i B_i A_i`, from their factors alone.

    `[D_1 | ... | D_n] = [B_1 .. B_n] blockdiag(s_i A_i)`: only a q x q matrix between the two is
    decomposed, q being the sum of ranks. With `U = [B_1 .. B_n] turn` the coordinates are
    `U^T D_i = s_i turn^T [B_1 .. B_n]^T B_i A_i`.

    References:
        "Model merging with SVD to tie the Knots", arXiv 2410.19735.
    """
    if half_precision([factor for A, B, _ in parts for factor in (A, B)]):
        grams = _Grams.of(parts, np.float32)
        found = gram_svd(grams.b, grams.a, np.float32)
        if found is not None:
            return grams.aligned(found.S, found.left)
    grams = _Grams.of(parts, np.float64)
    found = gram_svd(grams.b, grams.a, np.float64)
    if found is not None:
        return grams.aligned(found.S, found.left)
    return grams.aligned(*_decomposed(grams))


@dataclass(frozen=True, eq=False, slots=True)
class _Grams:
    """Products of all columns of `[B_1 .. B_n]` and of all rows of `blockdiag(s_i A_i)`, in
    float64."""

    b: Double
    a: Double
    scale: Double
    spans: Sequence[slice]

    @classmethod
    def of(
        cls, parts: Sequence[tuple[Array, Array, float]], dtype: type[np.floating[Any]]
    ) -> _Grams:
        """The products multiplied in `dtype`."""
        edges = np.cumsum([0, *(len(a) for a, _, _ in parts)])
        spans = [slice(i, j) for i, j in itertools.pairwise(edges)]
        total = np.zeros((edges[-1], edges[-1]))
        for span, (a, _, s) in zip(spans, parts, strict=True):
            total[span, span] = s * s * gram_matrix(a.T, dtype)
        scale = np.concatenate([np.full(len(a), s, np.float64) for a, _, s in parts])
        stacked = joined([b for _, b, _ in parts], axis=1)
        return cls(gram_matrix(stacked, dtype), total, scale, spans)

    def aligned(self, S: Double, turn: Double) -> Aligned:
        """What the singular values and the left turn say, without components of rounding noise."""
        keep = S > SINGULAR_CUTOFF
        S, turn = S[keep], turn[:, keep]
        loads = turn.T @ self.b * self.scale
        return Aligned(S, turn, [loads[:, span] for span in self.spans])


def _decomposed(grams: _Grams) -> tuple[Double, Double]:
    """Singular values and left turn from orthogonal factorisations of both sides, which tell
    directions of any size from each other."""
    ratio = balance(np.sqrt(grams.b.diagonal()), np.sqrt(grams.a.diagonal()))
    left = orthogonalize(grams.b * np.outer(ratio, ratio))
    rights = [
        orthogonalize(grams.a[span, span] / np.outer(ratio[span], ratio[span]))
        for span in grams.spans
    ]
    core = np.concatenate(
        [left.R[:, span] @ right.R.T for span, right in zip(grams.spans, rights, strict=True)],
        axis=1,
    )
    u, s, _ = np.linalg.svd(core, full_matrices=False)
    return s, ratio[:, None] * (left.basis @ u)


class Agreement:
    """What the rules need to know of all layers together, without keeping any coordinates.

    The threshold of a source is the k-th smallest of its d magnitudes over all layers, k being
    `d - int(d * density)`; it is found by counting the magnitudes' bits, where a sample says the
    threshold lies.

    Args:
        blocks: starts a pass over the coordinates of all layers, in every column or every so many.
        densities: fraction kept of each source; 1 everywhere keeps everything, without a pass.
    """

    def __init__(
        self, blocks: Callable[[int], Iterable[Block]], densities: Sequence[float]
    ) -> None:
        self._blocks = blocks
        self._lock = threading.Lock()
        self._majority: float | None = None
        self.thresholds = np.zeros(len(densities), np.float32)
        if min(densities) < 1:
            # BLAS on one thread: its products are small here, and waiting threads cost more than
            # they save.
            with threadpool_limits(1, user_api="blas"):
                self.thresholds = _global_thresholds(blocks, densities)

    def majority(self) -> float:
        """Sign of the sum of all elected signs: one more pass, at the first call only."""
        from fusekit.kernels import aligned

        with self._lock:
            if self._majority is None:
                total = 0.0
                for block in self._blocks(1):
                    thresholds = self.thresholds[list(block.sources)]
                    votes = np.empty(block.rows.shape[1], np.float32)
                    aligned.sum_kept(block.rows, thresholds, np.ones_like(thresholds), votes)
                    total += float(np.sign(votes).sum())
                self._majority = float(np.sign(total))
            return self._majority


def merge_coordinates(
    block: Block, weights: npt.ArrayLike, rule: Rule, agreement: Agreement
) -> Array:
    """One block's merged coordinates (k, columns).

    `linear`: the weighted sum of the entries kept. `ties`: of those that agree with the sign of
    the kept entries' unweighted sum, over the number of non-zero ones. Where kept entries cancel
    to exactly zero, the majority sign of the whole model is elected.
    """
    from fusekit.kernels import aligned

    sources = list(block.sources)
    own = np.asarray(weights, np.float32)[sources]
    thresholds = agreement.thresholds[sources]
    merged = np.empty(block.rows.shape[1], np.float32)
    if rule == "linear":
        aligned.sum_kept(block.rows, thresholds, own, merged)
    elif aligned.mean_of_elected(block.rows, thresholds, own, 0.0, merged):
        aligned.mean_of_elected(block.rows, thresholds, own, agreement.majority(), merged)
    return merged.reshape(block.coordinates.shape[1:])


def _global_thresholds(
    blocks: Callable[[int], Iterable[Block]], densities: Sequence[float]
) -> npt.NDArray[np.float32]:
    """The bits of a non-negative float32 are ordered as its value: the bin of equal upper halves
    that holds the threshold is guessed from a sample, and bits are counted in it and beside it.
    Where the guess is wrong, the upper halves of all magnitudes are counted."""
    sources = len(densities)
    for step in (SAMPLED_COLUMNS, 1):
        bins = _bins_of_rank(_upper_halves(blocks(step), sources), densities)
        found = _thresholds(_counted(blocks(1), bins), densities)
        if found is not None:
            return found
    raise AssertionError("the bin that holds the threshold was counted")


@dataclass(frozen=True, eq=False, slots=True)
class _Counted:
    """Magnitudes of every source: how many there are, how many lie above a range of bits that
    starts at `low`, and how many have each of the bits inside it."""

    low: list[int]
    total: Counts
    above: Counts
    inside: Counts


def _ranks(total: Counts, densities: Sequence[float]) -> Counts:
    """Which magnitude is the threshold, from the smallest; 0 where everything is kept."""
    ranks: Counts = total - (total * np.asarray(densities)).astype(np.int64)
    return ranks


def _bins_of_rank(upper: Counts, densities: Sequence[float]) -> list[int]:
    wanted = _ranks(upper.sum(axis=1), densities)
    return [int(np.searchsorted(c.cumsum(), k)) for c, k in zip(upper, wanted, strict=True)]


def _thresholds(counted: _Counted, densities: Sequence[float]) -> npt.NDArray[np.float32] | None:
    """The thresholds, or None if one lies outside the range in which bits were counted."""
    below = counted.total - counted.above - counted.inside.sum(axis=1)
    bits = np.zeros(len(densities), np.uint32)
    for source, rank in enumerate(_ranks(counted.total, densities)):
        cumulative = counted.inside[source].cumsum()
        place = rank - below[source]
        if rank and not 0 < place <= cumulative[-1]:
            return None
        if rank:
            bits[source] = counted.low[source] + int(np.searchsorted(cumulative, place))
    return bits.view(np.float32)


def _upper_halves(blocks: Iterable[Block], sources: int) -> Counts:
    """How many magnitudes of each source have each upper half of their bits."""
    from fusekit.kernels import aligned

    counts = np.zeros((sources, _UPPER_HALVES), np.int64)
    for block in blocks:
        for source, row in zip(block.sources, block.rows.view(np.uint32), strict=True):
            aligned.count_magnitudes(row, 16, counts[source])
    return counts


def _counted(blocks: Iterable[Block], bins: Sequence[int]) -> _Counted:
    """Counts in every source's bin of equal upper halves and in the two beside it."""
    from fusekit.kernels import order

    low = [max(0, each - 1) << 16 for each in bins]
    total, above = np.zeros(len(bins), np.int64), np.zeros(len(bins), np.int64)
    inside = np.zeros((len(bins), 3 << 16), np.int64)
    for block in blocks:
        keys = np.empty(block.rows.shape[1], np.uint32)
        for source, row in zip(block.sources, block.rows.view(np.uint32), strict=True):
            order.magnitude_keys(row, np.uint32(0x7FFFFFFF), keys)
            first = np.uint32(low[source])
            last = np.uint32(low[source] + inside.shape[1] - 1)
            above[source] += order.count_bracket(keys, first, last, np.uint32(0), inside[source])
            total[source] += keys.size
    return _Counted(low, total, above, inside)
