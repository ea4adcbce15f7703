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


def _operands(block: Block) -> tuple[Array, Array]:
    """The elements of both models: bits of bfloat16 as they were read, else decoded rows."""
    packed = block.bfloat16
    if packed is None:
        return block.rows[0], block.rows[1]
    bits = packed.bits[:, packed.start : packed.start + block.size]
    return bits[0], bits[1]


def _place(block: Block) -> tuple[int, int]:
    """Where in the tensor the block begins, and how long the tensor's rows are."""
    return block.start, _row_length(block.tensor.shape)


@dataclass(frozen=True)
class RowDivergences(Sequential):
    """KL divergence of each row's softmax in the second model from that in the first: (rows,)."""

    in_registers: ClassVar[bool] = True

    def unit(self, shape: tuple[int, ...]) -> int:
        return _row_length(shape)

    def begin(self, tensor: Tensor) -> Array:
        import numpy as np

        return np.empty(tensor.size // _row_length(tensor.shape))

    def update(self, state: Array, block: Block) -> None:
        import numpy as np

        start, length = _place(block)
        rows = state[start // length : (start + block.size) // length]
        first, second = _operands(block)
        if first.dtype == np.float64:
            rows[:] = np.nan
        elif kernels.divergence.near(first, second, length, _EPSILON, rows):
            return
        kernels.divergence.softmax(block.rows[0], block.rows[1], length, _EPSILON, rows)


@dataclass(frozen=True, eq=False)
class Importances(OrderStatistics):
    """The importances of the given ranks (1 is the largest)."""

    absolute: ClassVar[bool] = False
    in_registers: ClassVar[bool] = True

    divergences: Array
    wanted: tuple[int, ...]
    scope: Scope = "group"

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        return (self.wanted,)

    def values(self, block: Block) -> Array:
        import numpy as np

        first, second = _operands(block)
        kind = np.float64 if first.dtype == np.float64 else np.float32
        out = block.scratch("importance", (1, block.size), kind)
        kernels.pairs.importance(first, second, self.divergences, *_place(block), out[0])
        return out

    def tally(self, block: Block, brackets: Array, bins: Array, above: Array) -> bool:
        first, second = _operands(block)
        if first.dtype.itemsize > 4:
            return False
        place, counts = _place(block), (brackets, bins, above)
        kernels.pairs.count_importances(first, second, self.divergences, *place, *counts)
        return True

    def group_key(self) -> tuple[Any, ...]:
        return (Importances, self.wanted)


@dataclass(frozen=True, eq=False)
class TakeImportant(Combine):
    """The second model's entries of at least a threshold's importance |b - a| K, else the first's.

    K is the divergence of the entry's row.
    """

    in_registers: ClassVar[bool] = True

    divergences: Array
    threshold: float

    def encode(self, block: Block, out: Array) -> bool:
        first, second = _operands(block)
        if first.dtype != out.dtype:
            return False
        self._choose(block, first, second, out)
        return True

    def apply(self, block: Block, out: Array) -> None:
        self._choose(block, block.rows[0], block.rows[1], out)

    def _choose(self, block: Block, first: Array, second: Array, out: Array) -> None:
        import numpy as np

        kind = np.float64 if first.dtype == np.float64 else np.float32
        least = np.array([self.threshold], kind)
        if least[0] < self.threshold:
            least = np.nextafter(least, kind(np.inf))
        kernels.pairs.choose(first, second, self.divergences, *_place(block), least, out)


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
