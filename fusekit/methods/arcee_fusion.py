"""Arcee Fusion: take over the entries of a second model whose importance is an outlier."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fusekit import kernels
from fusekit.methods.base import (
    Block,
    Combine,
    Method,
    OrderStatistics,
    Parameter,
    Scope,
    Sequential,
    Summary,
    Tensor,
)

if TYPE_CHECKING:
    from fusekit.methods.base import Array

_EPSILON = 1e-8


def _row_length(shape: tuple[int, ...]) -> int:
    """Rows run along the last axis; a vector is one row."""
    return shape[-1] if len(shape) > 1 else math.prod(shape)


@dataclass(frozen=True)
class RowDivergences(Sequential):
    """KL divergence of each row's softmax in the second model from that in the first: (rows,)."""

    def unit(self, shape: tuple[int, ...]) -> int:
        return _row_length(shape)

    def begin(self, tensor: Tensor) -> Array:
        import numpy as np

        return np.empty(tensor.size // _row_length(tensor.shape))

    def update(self, state: Array, block: Block) -> None:
        length = _row_length(block.tensor.shape)
        first = block.start // length
        rows = state[first : first + block.rows.shape[1] // length]
        kernels.pairs.softmax_divergences(block.rows[0], block.rows[1], length, _EPSILON, rows)


def importance(block: Block, divergences: Array) -> Array:
    """(1, m) importance |b - a| * K of the entries, K the divergence of their row."""
    out = block.scratch("importance", (1, block.rows.shape[1]), block.rows.dtype)
    length = _row_length(block.tensor.shape)
    kernels.pairs.importance(block.rows[0], block.rows[1], divergences, block.start, length, out[0])
    return out


@dataclass(frozen=True, eq=False)
class Importances(OrderStatistics):
    """The importances of the given ranks (1 is the largest)."""

    absolute: ClassVar[bool] = False

    divergences: Array
    wanted: tuple[int, ...]
    scope: Scope = "group"

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        return (self.wanted,)

    def values(self, block: Block) -> Array:
        return importance(block, self.divergences)

    def group_key(self) -> tuple[Any, ...]:
        return (Importances, self.wanted)


@dataclass(frozen=True, eq=False)
class TakeImportant(Combine):
    """The second model's entries of at least a threshold's importance, else the first's."""

    divergences: Array
    threshold: float

    def apply(self, block: Block, out: Array) -> None:
        scores = importance(block, self.divergences)[0]
        kernels.pairs.choose(block.rows[0], block.rows[1], scores, self.threshold, out)


def _arcee_fusion(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    divergences = yield RowDivergences()
    size = tensor.group_size
    ranks = tuple(size - math.floor(share * (size - 1)) for share in (0.25, 0.5, 0.75))
    ((first, median, third),) = yield Importances(divergences, ranks)
    spread = third.value - first.value
    return TakeImportant(divergences, median.value + tensor["factor"] * spread)


METHODS = (
    Method(
        name="arcee_fusion",
        title="Arcee Fusion",
        summary="Copy from a second model only the entries whose change stands out.",
        formula=(
            "s = |b - a| KL(softmax(b) || softmax(a)) per row;  y = b where s >= q50 + factor "
            "(q75 - q25), else a"
        ),
        references=("Arcee AI, mergekit: arcee_fusion (described by its authors), 2025",),
        parameters=(
            Parameter(
                "factor",
                "float",
                "How many interquartile ranges above the median an importance must lie.",
                default=1.5,
            ),
        ),
        rule=_arcee_fusion,
        base="first",
        min_models=2,
        max_models=2,
        passes="three (row divergences, order statistics, combine)",
        use_when="Adding the most salient changes of one model to another with care.",
        caveats=(
            "The softmax is over raw weights: scaling both models changes the selection. Where "
            "most entries are equal in both models the quartiles are 0 and everything that differs "
            "is taken over. Quartiles are exact; mergekit samples them in tensors beyond 1e6 "
            "entries."
        ),
    ),
)
