"""Entry-wise combinations of tensors: sparsify, elect signs, sum; of factors or dense updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Sparsify = Literal["none", "magnitude", "random"]
MajoritySign = Literal["total", "frequency"]
MaskOf = Callable[[int, slice, int], Array]
"""Position of a tensor, range of its rows, number of columns -> 0/1 mask of the entries kept."""


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


def combine(
    combination: Combination,
    tensors: Sequence[Array],
    weights: Sequence[float],
    densities: Sequence[float],
    majority: MajoritySign,
    mask_of: MaskOf,
) -> Array:
    """One tensor from several of the same shape, in float32.

    Args:
        densities: fraction of entries kept of each tensor, chosen within that tensor.
        majority: elect the sign of the sum of values (`total`) or of signs (`frequency`); the
            weights do not vote.
        mask_of: draws the masks of `random`.
    """
    if combination.sparsify == "magnitude":
        tensors = [prune_magnitude(t, kept) for t, kept in zip(tensors, densities, strict=True)]
    elif combination.sparsify == "random":
        tensors = [
            tensor * mask_of(i, slice(0, tensor.shape[0]), tensor.shape[1]) / np.float32(kept)
            if kept < 1
            else tensor
            for i, (tensor, kept) in enumerate(zip(tensors, densities, strict=True))
        ]
    return weighted_sum(tensors, weights, majority if combination.elect else None)


def weighted_sum(
    tensors: Sequence[Array], weights: Sequence[float], majority: MajoritySign | None
) -> Array:
    """`sum_i w_i T_i`; with a majority rule, the entries of the elected sign over their count."""
    total = np.zeros(tensors[0].shape, np.float32)
    if majority is None:
        for tensor, weight in zip(tensors, weights, strict=True):
            total += tensor * np.float32(weight)
        return total
    votes = np.zeros(tensors[0].shape, np.float32)
    for tensor in tensors:
        votes += tensor if majority == "total" else np.sign(tensor)
    elected = np.where(votes >= 0, np.float32(1), np.float32(-1))
    count = np.zeros(tensors[0].shape, np.float32)
    kept = np.empty(tensors[0].shape, np.float32)
    for tensor, weight in zip(tensors, weights, strict=True):
        # With the elected sign taken off, entries that agree are the positive ones.
        np.maximum(np.multiply(tensor, elected, out=kept), 0, out=kept)
        count += kept > 0
        kept *= np.float32(weight)
        total += kept
    total *= elected
    total /= np.maximum(count, 1, out=count)
    return total


def prune_magnitude(tensor: Array, density: float) -> Array:
    """The `int(density * size)` entries of largest magnitude, the first of equals first; rest 0."""
    if density >= 1:
        return tensor
    magnitudes = np.abs(tensor).reshape(-1)
    kept = int(density * magnitudes.size)
    threshold, spare = magnitude_threshold(magnitudes, kept)
    mask = above(magnitudes, threshold, spare)[0]
    return np.asarray(tensor * mask.reshape(tensor.shape))


def magnitude_threshold(magnitudes: Array, kept: int) -> tuple[float, int]:
    """The `kept`-th largest value and how many entries equal to it still belong to the kept.

    Counts the upper halves of the values' bits, which order like the values, and looks closer at
    the entries that have the threshold's alone.

    Args:
        magnitudes: (n,) float32, none negative.
    """
    if kept <= 0:
        return float("inf"), 0
    halves = (magnitudes.view(np.uint32) >> np.uint32(16)).astype(np.intp)
    larger = np.bincount(halves)[::-1].cumsum()
    place = int(np.searchsorted(larger, kept))
    more = int(larger[place - 1]) if place else 0
    inside = magnitudes[halves == len(larger) - 1 - place]
    position = inside.size - (kept - more)
    threshold = np.partition(inside, position)[position]
    return float(threshold), kept - more - int(np.count_nonzero(inside > threshold))


def above(magnitudes: Array, threshold: float, spare: int) -> tuple[Array, int]:
    """Mask of the entries over the threshold plus the first `spare` equal to it, and what is left
    of `spare`, so that a tensor can be masked piece by piece."""
    mask = magnitudes > threshold
    equal = np.flatnonzero(magnitudes == threshold)[:spare]
    mask.reshape(-1)[equal] = True
    return mask, spare - len(equal)
