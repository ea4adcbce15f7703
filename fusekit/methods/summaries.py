"""Summaries that several methods share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fusekit import kernels
from fusekit.kernels import GRANULE
from fusekit.methods.base import Additive, Block, Sequential, Tensor

if TYPE_CHECKING:
    from fusekit.methods.base import Array

Matrix = list[list[float]]

_IN_REGISTERS = (2, 3)
"""Numbers of models whose inner products need no decoded rows."""


@dataclass(frozen=True)
class Gram(Additive):
    """Inner products of the models with each other: a symmetric matrix in float64."""

    models: int

    @property
    def in_registers(self) -> bool:  # type: ignore[override]
        return self.models in _IN_REGISTERS

    def width(self, tensor: Tensor) -> int:
        return self.models * (self.models + 1) // 2

    def measure(self, block: Block, out: Array) -> None:
        import numpy as np

        packed = block.packed
        if packed is None:
            kernels.gram.gram(block.rows, out)
            return
        if self.models in _IN_REGISTERS and block.bfloat16 is not None:
            place = packed.bits, packed.start, block.size
            kernels.direct.products(*place, self.deltas, out)
            if np.isfinite(out).all():
                return
            exact = block.scratch("sums", out.shape, out.dtype)
            kernels.tiles.products(packed, block.size, self.deltas, self.models, exact)
            fill_unknown(out, exact)
            return
        kernels.tiles.products(packed, block.size, self.deltas, self.models, out)

    def result(self, total: Array) -> Matrix:
        return _symmetric(total.tolist(), self.models)


def delta_sums(block: Block, what: int, grain: int, out: Array) -> None:
    """One of `kernels.norms`' sums of every task vector, per grain: (grains, models)."""
    import numpy as np

    packed = block.bfloat16
    if packed is not None and grain == GRANULE:
        kernels.direct.sums(packed.bits, packed.start, block.size, what, out)
        if np.isfinite(out).all():
            return
    kernels.norms.sums(block.rows, what, grain, out)


def fill_unknown(sums: Array, others: Array) -> None:
    """Take the grains that are not finite from sums taken in another way.

    Whole blocks must not be taken: sums would then depend on where blocks begin.
    """
    import numpy as np

    known = np.isfinite(sums).all(axis=1)
    sums[~known] = others[~known]


class DeltaGram(Gram):
    """Inner products of the task vectors."""

    deltas: ClassVar[bool] = True


def _symmetric(triangle: list[float], n: int) -> Matrix:
    matrix = [[0.0] * n for _ in range(n)]
    values = iter(triangle)
    for i in range(n):
        for j in range(i, n):
            matrix[i][j] = matrix[j][i] = next(values)
    return matrix


@dataclass(frozen=True)
class ColumnGram(Sequential):
    """One Gram matrix per column: inner products along axis 0.

    The rule receives (pairs, columns) with the pairs of the upper triangle, row by row; a column is
    one combination of the trailing indices.
    """

    on_deltas: bool

    @property
    def deltas(self) -> bool:  # type: ignore[override]
        return self.on_deltas

    def begin(self, tensor: Tensor) -> Array:
        import numpy as np

        columns = math.prod(tensor.shape[1:])
        return np.zeros((tensor.models * (tensor.models + 1) // 2, columns))

    def update(self, state: Any, block: Block) -> None:
        kernels.columns.add_column_gram(block.rows, block.start, state)


@dataclass(frozen=True)
class RowGram(Sequential):
    """One Gram matrix per row: inner products along the last axis. The rule gets (pairs, rows)."""

    on_deltas: bool

    @property
    def deltas(self) -> bool:  # type: ignore[override]
        return self.on_deltas

    def unit(self, shape: tuple[int, ...]) -> int:
        return shape[-1]

    def begin(self, tensor: Tensor) -> Array:
        import numpy as np

        rows = tensor.size // tensor.shape[-1]
        return np.zeros((tensor.models * (tensor.models + 1) // 2, rows))

    def update(self, state: Any, block: Block) -> None:
        kernels.columns.add_row_gram(block.rows, block.start, block.tensor.shape[-1], state)
