"""Entry-wise combinations of tensors: sparsify, elect signs, sum; of factors or dense updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Sparsify = Literal["none", "magnitude", "random"]
MajoritySign = Literal["total", "frequency"]
Drop = Callable[[int, int, Array], None]
"""Number of a tensor, where in it the entries given begin, and these: zeroes some in place and
divides the others by the density."""

UPPER_HALVES = 1 << 15
"""Values the upper half of a float32's magnitude can have."""


@dataclass(frozen=True, slots=True)
class Combination:
    """How tensors of several sources become one, entry by entry.

    `sparsify` each (`magnitude` keeps the largest, `random` keeps at random and divides by the
    density), then a weighted sum; with `elect`, only entries that agree with the elected sign, over
    the number of them.

    References:
        "TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708.
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
        Lunch" (DARE), arXiv 2311.03099.
    """

    sparsify: Sparsify = "none"
    elect: bool = False


COMBINATIONS = {
    "linear": Combination(),
    "magnitude_prune": Combination("magnitude"),
    "ties": Combination("magnitude", elect=True),
    "dare_linear": Combination("random"),
    "dare_ties": Combination("random", elect=True),
}


class Pruner:
    """Keeps the `kept` entries of largest magnitude of a tensor, the first of equals first.

    The tensor may come in pieces, which must be pruned in the order in which they were counted.

    Args:
        pieces: starts a pass over the tensor's pieces, contiguous and in float32.
        kept: how many entries to keep.
    """

    def __init__(self, pieces: Callable[[], Iterable[Array]], kept: int) -> None:
        self._threshold = np.float32(np.inf)
        self._spare = 0
        if kept > 0:
            self._find(pieces, kept)

    def _find(self, pieces: Callable[[], Iterable[Array]], kept: int) -> None:
        """Count the upper halves of the magnitudes' bits, which order like the values, and look
        closer at the entries that have the threshold's alone."""
        from fusekit.kernels import aligned, factors, order

        counts = np.zeros(UPPER_HALVES, np.int64)
        for piece in pieces():
            aligned.count_magnitudes(_bits(piece), 16, counts)
        upper, larger = order.find_rank(counts, kept)
        inside = np.empty(counts[upper], np.uint32)
        done = 0
        for piece in pieces():
            done += factors.collect(_bits(piece), upper, inside[done:])
        position = inside.size - (kept - larger)
        threshold = np.partition(inside, position)[position]
        self._threshold = threshold.view(np.float32)
        self._spare = kept - larger - int(np.count_nonzero(inside > threshold))

    def __call__(self, piece: Array) -> None:
        """Zero a piece's entries that are not kept."""
        from fusekit.kernels import order

        self._spare -= order.keep_first(piece.reshape(-1), self._threshold, self._spare)


def _bits(tensor: Array) -> Array:
    return tensor.reshape(-1).view(np.uint32)


def combine(
    combination: Combination,
    rows: Array,
    weights: Sequence[float],
    densities: Sequence[float],
    majority: MajoritySign,
    drop: Drop,
) -> Array:
    """One tensor from several, a row each, in float32. Overwrites the rows.

    Args:
        rows: (tensors, entries) float32.
        densities: fraction of entries kept of each tensor, chosen within that tensor.
        majority: elect the sign of the sum of values (`total`) or of signs (`frequency`); the
            weights do not vote.
        drop: does what `random` asks for.
    """
    for i, (row, density) in enumerate(zip(rows, densities, strict=True)):
        if combination.sparsify == "magnitude" and density < 1:
            prune_magnitude(row, density)
        elif combination.sparsify == "random" and density < 1:
            drop(i, 0, row)
    return weighted_sum(rows, weights, majority if combination.elect else None)


def weighted_sum(rows: Array, weights: Sequence[float], majority: MajoritySign | None) -> Array:
    """`sum_i w_i x_i` of rows x_i; with a majority rule, of the entries that have the elected sign,
    over their number. Overwrites the rows."""
    own = np.asarray(weights, np.float32)
    if majority is None:
        rows *= own[:, None]
        return np.asarray(rows.sum(axis=0))
    from fusekit.kernels import factors

    total = np.empty(rows.shape[1], np.float32)
    factors.mean_of_agreeing(rows, own, majority == "frequency", total)
    return total


def prune_magnitude(tensor: Array, density: float) -> None:
    """Zero all but the `int(density * size)` entries of largest magnitude of a float32 tensor, in
    place; the first of equals stay."""
    Pruner(lambda: [tensor], int(density * tensor.size))(tensor)
