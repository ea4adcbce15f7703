"""LiNeS: scale what a merge changed by depth. A wrapper around any method that has a base."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from fusekit import kernels
from fusekit.checkpoint.layers import Layer
from fusekit.errors import RecipeError, did_you_mean
from fusekit.methods.base import (
    Additive,
    Block,
    Combine,
    Copy,
    Measured,
    Method,
    Remark,
    Scope,
    SidePart,
    Summary,
    Tensor,
)
from fusekit.methods.combines import Linear

if TYPE_CHECKING:
    import torch

    from fusekit.methods.base import Array

Outside = float | Literal["alpha", "last"]
"""Scale of tensors outside all blocks: that of the first block, of the last one, or a number."""


@dataclass(frozen=True)
class Place:
    """A tensor's scale as a function of the first block's: factor * alpha + offset."""

    factor: float
    offset: float


@dataclass(frozen=True)
class Schedule:
    """The place of every tensor; `alpha` None stands for the ratio of norms, to be measured."""

    alpha: float | None
    norm: Literal["l1", "l2"]
    places: Mapping[str, Place]


def schedule(
    layers: Mapping[str, Layer | None],
    *,
    alpha: float | Literal["auto"],
    beta: float,
    outside: Sequence[tuple[str | None, Outside]] = (),
    norm: Literal["l1", "l2"] = "l1",
    stack: str | None = None,
    stacks: Literal["separate", "concatenate"] = "separate",
) -> Schedule:
    """lambda = alpha + beta * depth for tensors in blocks, depth from 0 (first) to 1 (last).

    Args:
        layers: the layer of every tensor, or None outside blocks.
        alpha: scale of the first block; "auto" is (1/n) |sum_i tau_i| / |tau_merged|.
        beta: what the last block gets more.
        outside: scales of tensors outside blocks: the first (part of a name or None, value) that
            fits applies; tensors that none fits get alpha.
        norm: of alpha "auto".
        stack: only stacks whose name contains this are blocks.
        stacks: whether depth counts in every stack, or through all of them, encoders first.

    Raises:
        RecipeError: no tensor is in a block.

    References:
        Wang et al., LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model
        Merging, ICLR 2025, arXiv 2410.17146
    """
    depths = _depths(layers, stack, stacks)
    places = {}
    for name in layers:
        if name in depths:
            places[name] = Place(1.0, beta * depths[name])
            continue
        value = next((v for part, v in outside if part is None or part in name), "alpha")
        if isinstance(value, str):
            places[name] = Place(1.0, beta if value == "last" else 0.0)
        else:
            places[name] = Place(0.0, value)
    return Schedule(None if alpha == "auto" else alpha, norm, places)


def _depths(layers: Mapping[str, Layer | None], stack: str | None, stacks: str) -> dict[str, float]:
    """Relative depth of every tensor that is in a block."""
    found = {name: layer for name, layer in layers.items() if layer is not None}
    names = list(dict.fromkeys(layer.stack for layer in found.values()))
    chosen = [name for name in names if stack is None or stack in name]
    if not chosen:
        raise RecipeError(
            "layer_scaling: no tensor is in a numbered block, expected names such as "
            "'layers.0.weight'"
            if stack is None or not names
            else f"layer_scaling.stack: no stack of blocks contains {stack!r}"
            f"{did_you_mean(stack, names)}"
        )
    inside = {name: layer for name, layer in found.items() if layer.stack in chosen}
    if stacks == "separate":
        return {name: layer.position for name, layer in inside.items()}
    chosen.sort(key=lambda name: "decoder" in name)
    lengths = {layer.stack: layer.depth for layer in inside.values()}
    first = {name: sum(lengths[n] for n in chosen[:i]) for i, name in enumerate(chosen)}
    last = sum(lengths.values()) - 1
    return {
        name: (first[layer.stack] + layer.rank) / last if last else 1.0
        for name, layer in inside.items()
    }


def scale_layers(method: Method, by: Schedule) -> Method:
    """The method with its update scaled by depth: base + lambda(tensor) * (merged - base).

    Raises:
        RecipeError: alpha "auto" for a method on whole matrices, or a method that goes on from an
            earlier output.
    """
    if method.continual:
        raise RecipeError(
            f"layer_scaling: {method.name} sets the size of the merged update itself, after all "
            "models; scale its output instead, as the only model of a task_arithmetic recipe"
        )
    if method.matrix is not None and by.alpha is None:
        raise RecipeError(
            f"layer_scaling.alpha: 'auto' measures the merged update in blocks, and {method.name} "
            "merges whole matrices; give a number"
        )

    def rule(tensor: Tensor) -> Generator[Summary, Any, Combine]:
        combine = yield from method.rule(tensor)
        alpha = by.alpha
        if alpha is None:
            summed, merged = yield UpdateNorms(combine, by.norm)
            alpha = summed / merged / tensor.models if merged > 0 else 0.0
            if merged == 0:
                yield Remark("layer_scaling: the merged update is zero, alpha: auto undefined")
        place = by.places[tensor.name]
        scale = place.factor * alpha + place.offset
        if scale == 1.0 or (isinstance(combine, Copy) and combine.model < 0):
            return combine
        if isinstance(combine, Copy):
            combine = Linear(tuple(float(i == combine.model) for i in range(tensor.models)))
        return Copy(-1) if scale == 0.0 else combine.rescaled(scale) or Rescaled(combine, scale)

    def matrix(
        tensor: Tensor, rows: list[torch.Tensor], measured: list[Measured]
    ) -> Generator[Remark, None, torch.Tensor]:
        assert method.matrix is not None
        assert by.alpha is not None
        place = by.places[tensor.name]
        merged = yield from method.matrix(tensor, rows, measured)
        return merged * (place.factor * by.alpha + place.offset)

    return replace(
        method,
        rule=rule,
        matrix=None if method.matrix is None else matrix,
        model_scope=method.model_scope or by.alpha is None,
    )


@dataclass(frozen=True, eq=False)
class UpdateNorms(Additive):
    """Norms over the model of the sum of all task vectors and of the merged update."""

    combine: Combine
    norm: Literal["l1", "l2"]
    scope: Scope = "model"

    @property
    def deltas(self) -> bool:  # type: ignore[override]
        return self.combine.deltas

    def unit(self, shape: tuple[int, ...]) -> int:
        return self.combine.unit(shape)

    def group_key(self) -> tuple[Any, ...]:
        return (UpdateNorms, self.norm)

    def width(self, tensor: Tensor) -> int:
        return 2

    def measure(self, block: Block, out: Array) -> None:
        import numpy as np

        n, size = block.rows.shape
        updates = block.scratch("updates", (2, size), block.rows.dtype)
        base = block.base[:0] if self.deltas else block.base
        kernels.linear.weighted_sum(block.rows, np.ones(n), base, -float(n), updates[0])
        self.combine.apply(block, updates[1])
        updates[1] -= block.base
        what = {"l1": 1, "l2": 0}[self.norm]
        kernels.norms.sums(updates, what, self.grain(block.tensor.shape), out)

    def result(self, total: Array) -> tuple[float, float]:
        summed, merged = total.tolist()
        return (summed, merged) if self.norm == "l1" else (summed**0.5, merged**0.5)


@dataclass(frozen=True, eq=False)
class Rescaled(Combine):
    """base + scale * (what another combine changed)."""

    combine: Combine
    scale: float

    @property
    def deltas(self) -> bool:  # type: ignore[override]
        return self.combine.deltas

    def unit(self, shape: tuple[int, ...]) -> int:
        return self.combine.unit(shape)

    def apply(self, block: Block, out: Array) -> None:
        self.combine.apply(block, out)
        kernels.linear.rescale_update(block.base, self.scale, out)

    def side(self, block: Block) -> Iterable[SidePart]:
        return self.combine.side(block)
