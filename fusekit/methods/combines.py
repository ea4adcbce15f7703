"""Ways to combine blocks that several methods share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fusekit import kernels
from fusekit.methods.base import Block, Combine, Copy

if TYPE_CHECKING:
    from fusekit.methods.base import Array


@dataclass(frozen=True)
class Linear(Combine):
    """base_weight * base + sum_i weights[i] * models[i], accumulated in float64."""

    in_registers: ClassVar[bool] = True

    weights: tuple[float, ...]
    base_weight: float = 0.0

    def encode(self, block: Block, out: Array) -> bool:
        import numpy as np

        packed = block.bfloat16
        if packed is None:
            return False
        with_base = len(packed.bits) > len(self.weights)
        weights = (*self.weights, self.base_weight) if with_base else self.weights
        return bool(kernels.direct.weighted_sum(packed.bits, packed.start, np.array(weights), out))

    def apply(self, block: Block, out: Array) -> None:
        import numpy as np

        weights = np.array(self.weights, dtype=np.float64)
        packed = block.packed
        if packed is None:
            base = block.base if self.base_weight else block.base[:0]
            kernels.linear.weighted_sum(block.rows, weights, base, self.base_weight, out)
            return
        kernels.tiles.combine(packed, weights, self.base_weight, out)

    def rescaled(self, scale: float) -> Combine:
        weights = [scale * weight for weight in self.weights]
        return linear(weights, 1.0 + scale * (self.base_weight - 1.0))


def linear(weights: list[float], base_weight: float = 0.0) -> Combine:
    """A linear combination, as a copy where it is one: weight 1 on one operand, 0 on all others."""
    if base_weight == 1.0 and not any(weights):
        return Copy(-1)
    if base_weight == 0.0 and sorted(weights) == [0.0] * (len(weights) - 1) + [1.0]:
        return Copy(weights.index(1.0))
    return Linear(tuple(weights), base_weight)


def move(weights: list[float], has_base: bool) -> Combine:
    """sum_i weights[i] * v_i, plus the base where the v_i are task vectors.

    base + sum_i w_i (x_i - base) is computed as (1 - sum_i w_i) base + sum_i w_i x_i: no rounded
    difference is ever formed.
    """
    return linear(weights, 1.0 - sum(weights) if has_base else 0.0)


@dataclass(frozen=True, eq=False)
class IndexedLinear(Combine):
    """A linear combination whose weights differ by column or by row of the tensor.

    `weights` is (models + 1, K), its last row for the base; element p uses k = (p // repeat) % K.
    """

    weights: Array
    repeat: int

    def apply(self, block: Block, out: Array) -> None:
        kernels.linear.indexed_sum(
            block.rows, self.weights, block.base, block.start, self.repeat, out
        )
