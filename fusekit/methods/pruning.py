"""Ways to thin a task vector out. A pruning changes one row of a block in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fusekit import kernels
from fusekit.kernels import GRANULE
from fusekit.methods.base import (
    Additive,
    Block,
    Cumulative,
    OrderStatistics,
    OrderValue,
    Scope,
    Summary,
    Tensor,
)

if TYPE_CHECKING:
    from fusekit.methods.base import Array


class Pruning(ABC):
    """Zeroes some entries of one model's row."""

    @abstractmethod
    def apply(self, row: Array, block: Block, model: int) -> None:
        """Change `row` (the block's row of `model`, or what is left of it) in place."""


Prunings = tuple[tuple[Pruning, ...], ...]
"""Per model, the prunings applied to its task vector, in order."""


def prune(block: Block, prunings: Prunings) -> Array:
    """The block's rows after each model's prunings."""
    for model, steps in enumerate(prunings):
        for step in steps:
            step.apply(block.rows[model], block, model)
    return block.rows


@dataclass(frozen=True)
class Scale(Pruning):
    """Multiply what is left."""

    factor: float

    def apply(self, row: Array, block: Block, model: int) -> None:
        row *= row.dtype.type(self.factor)


@dataclass(frozen=True)
class RandomDrop(Pruning):
    """Keep each entry with probability `density`, or where the user's mask says so."""

    density: float

    def apply(self, row: Array, block: Block, model: int) -> None:
        import numpy as np

        mask = block.tensor.masks[model] if block.tensor.masks else None
        if mask is not None:
            row *= mask[block.start : block.start + row.size]
        elif self.density < 1.0:
            bits = block.scratch("bits", (row.size,), np.uint32)
            key = np.uint64(block.tensor.keys[model])
            kernels.random.drop(row, self.density, key, block.start, bits)


@dataclass(frozen=True)
class OfModel(Pruning):
    """Apply a pruning to the model's own weights instead of its task vector."""

    inner: Pruning

    def apply(self, row: Array, block: Block, model: int) -> None:
        row += block.base
        self.inner.apply(row, block, model)
        row -= block.base


@dataclass(frozen=True)
class KeepAbove(Pruning):
    """Keep entries whose magnitude exceeds a threshold."""

    threshold: float

    def apply(self, row: Array, block: Block, model: int) -> None:
        kernels.order.keep_above(row, row.dtype.type(self.threshold))


@dataclass(frozen=True, eq=False)
class KeepLargest(Pruning):
    """Keep entries of at least a magnitude; of those equal to it, only the first `ties` if given.

    `ties_before` holds, per granule of the tensor, how many equal entries came before it.
    """

    threshold: float
    ties: int | None = None
    ties_before: Array | None = None

    def apply(self, row: Array, block: Block, model: int) -> None:
        threshold = row.dtype.type(self.threshold)
        if self.ties is None or self.ties_before is None:
            kernels.order.keep_at_least(row, threshold)
            return
        granule, after = block.start // GRANULE, -(-(block.start + row.size) // GRANULE)
        left = self.ties - int(self.ties_before[granule])
        if left <= 0:
            kernels.order.keep_above(row, threshold)
        elif after < len(self.ties_before) and self.ties_before[after] <= self.ties:
            kernels.order.keep_at_least(row, threshold)
        else:
            kernels.order.keep_above_and_first(row, threshold, left)


@dataclass(frozen=True, eq=False)
class Magnitudes(OrderStatistics):
    """Largest magnitudes of the task vectors, after prunings that come first.

    `wanted` has, per model, the ranks of interest (1 is the largest).
    """

    deltas: ClassVar[bool] = True

    wanted: tuple[tuple[int, ...], ...]
    first: Prunings
    scope: Scope = "group"

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        return self.wanted

    def values(self, block: Block) -> Array:
        return prune(block, self.first)

    def group_key(self) -> tuple[Any, ...]:
        return (Magnitudes, self.wanted)


@dataclass(frozen=True, eq=False)
class TiesBefore(Cumulative):
    """Per model, how many entries equal its threshold come before each granule."""

    deltas: ClassVar[bool] = True

    thresholds: tuple[float, ...]
    first: Prunings
    scope: Scope = "group"

    def width(self, tensor: Tensor) -> int:
        return len(self.thresholds)

    def group_key(self) -> tuple[Any, ...]:
        return (TiesBefore, self.thresholds)

    def measure(self, block: Block, out: Array) -> None:
        rows = prune(block, self.first)
        for grain in range(len(out)):
            part = rows[:, grain * GRANULE : (grain + 1) * GRANULE]
            for model, threshold in enumerate(self.thresholds):
                row = part[model]
                out[grain, model] = kernels.order.count_equal(row, row.dtype.type(threshold))


@dataclass(frozen=True, eq=False)
class PrunedSums(Additive):
    """sum |v| of every task vector before and after pruning: (2, models)."""

    deltas: ClassVar[bool] = True

    prunings: Prunings
    scope: Scope = "tensor"

    def width(self, tensor: Tensor) -> int:
        return 2 * tensor.models

    def group_key(self) -> type:
        return PrunedSums

    def measure(self, block: Block, out: Array) -> None:
        n = len(self.prunings)
        kernels.gram.absolute_sums(block.rows, out[:, :n])
        kernels.gram.absolute_sums(prune(block, self.prunings), out[:, n:])

    def result(self, total: Array) -> Array:
        return total.reshape(2, -1)


def trim_exact(
    tensor: Tensor, densities: Sequence[float], first: Prunings
) -> Generator[Summary, Any, Prunings]:
    """Keep exactly max(1, int(density * D)) entries per model, ties by lowest position first."""
    size = tensor.group_size
    counts = [max(1, int(density * size)) if density < 1.0 else size for density in densities]
    if all(count == size for count in counts):
        return first
    largest: Sequence[tuple[OrderValue, ...]] = yield Magnitudes(
        tuple(() if count == size else (count,) for count in counts), first
    )
    found = [values[0] if values else None for values in largest]
    ties = [
        None
        if value is None or value.value == 0.0 or value.greater + value.equal == count
        else count - value.greater
        for value, count in zip(found, counts, strict=True)
    ]
    before = None
    if any(tie is not None for tie in ties):
        before = yield TiesBefore(tuple(v.value if v else -1.0 for v in found), first)
    return tuple(
        steps
        if value is None
        else (
            *steps,
            KeepLargest(value.value, tie, None if before is None else before[:, model]),
        )
        for model, (steps, value, tie) in enumerate(zip(first, found, ties, strict=True))
    )


def trim_threshold(
    tensor: Tensor, dropped: Sequence[int], first: Prunings
) -> Generator[Summary, Any, Prunings]:
    """Keep entries of at least the dropped[i]-th smallest magnitude, all ties included."""
    size = tensor.group_size
    if not any(dropped):
        return first
    largest: Sequence[tuple[OrderValue, ...]] = yield Magnitudes(
        tuple((size - k + 1,) if k else () for k in dropped), first
    )
    return tuple(
        (*steps, KeepLargest(values[0].value)) if values else steps
        for steps, values in zip(first, largest, strict=True)
    )


def drop_smallest(
    tensor: Tensor, densities: Sequence[float], first: Prunings
) -> Generator[Summary, Any, Prunings]:
    """Drop entries not above the int((1 - density) * D)-th smallest magnitude of the tensor."""
    dropped = [int(tensor.size * (1.0 - density)) for density in densities]
    if not any(dropped):
        return first
    largest: Sequence[tuple[OrderValue, ...]] = yield Magnitudes(
        tuple((tensor.size - k + 1,) if k else () for k in dropped), first, scope="tensor"
    )
    return tuple(
        (*steps, KeepAbove(values[0].value)) if values else steps
        for steps, values in zip(first, largest, strict=True)
    )


def match_l1(tensor: Tensor, prunings: Prunings) -> Generator[Summary, Any, Prunings]:
    """Scale every pruned task vector so that it keeps the tensor's sum of magnitudes."""
    if not any(prunings):
        return prunings
    whole, kept = yield PrunedSums(prunings)
    return scaled(
        prunings,
        [
            a / b if min(a, b) >= 1e-7 else 1.0
            for a, b in zip(whole.tolist(), kept.tolist(), strict=True)
        ],
    )


def scaled(prunings: Prunings, factors: Sequence[float]) -> Prunings:
    """The prunings followed by a factor per model."""
    return tuple(
        steps if factor == 1.0 else (*steps, Scale(factor))
        for steps, factor in zip(prunings, factors, strict=True)
    )


def inverse_density(prunings: Prunings, densities: Sequence[float]) -> Prunings:
    """Divide what is kept by the probability of keeping it: unbiased."""
    return scaled(
        prunings, [1.0 / density if 0.0 < density < 1.0 else 1.0 for density in densities]
    )
