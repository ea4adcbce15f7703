"""Variation ratio merging: models weigh as much as they moved away from the pivot."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fusekit import kernels
from fusekit.errors import RecipeError
from fusekit.kernels import GRANULE
from fusekit.methods.base import (
    Additive,
    Block,
    Combine,
    Method,
    Parameter,
    Scope,
    Summary,
    Tensor,
)
from fusekit.methods.combines import linear
from fusekit.methods.summaries import delta_sums

if TYPE_CHECKING:
    from fusekit.methods.base import Array

_SUMMED = {"square": 0, "abs": 1, "signed": 2}


@dataclass(frozen=True)
class Variation(Additive):
    """Per model the sum over the group of d^2, |d| or d.

    With `by_tensor` every tensor adds its mean instead of its sum, however large it is.
    """

    deltas: ClassVar[bool] = True

    summed: int
    by_tensor: bool
    scope: Scope = "group"

    def width(self, tensor: Tensor) -> int:
        return tensor.models

    def measure(self, block: Block, out: Array) -> None:
        delta_sums(block, self.summed, GRANULE, out)
        if self.by_tensor:
            out /= block.tensor.size


@dataclass(frozen=True)
class AddUp(Additive):
    """Adds numbers that each tensor already knows over the tensors of a group."""

    own: tuple[float, ...]

    def width(self, tensor: Tensor) -> int:
        return len(self.own)

    def group_key(self) -> type:
        return AddUp

    def measure(self, block: Block, out: Array) -> None:
        out[:] = 0.0
        if block.start == 0:
            out[0] = self.own


@dataclass(frozen=True)
class MeanByChange(Combine):
    """base + sum_i v_i d_i / sum_i v_i with every entry's own v_i = d_i^2 or |d_i|."""

    deltas: ClassVar[bool] = True

    summed: int

    def apply(self, block: Block, out: Array) -> None:
        kernels.norms.mean_by_change(block.rows, self.summed, block.base, out)


def _varm(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    summed, temperature = _SUMMED[tensor["measure"]], tensor["temperature"]
    if tensor["elementwise"]:
        if temperature is not None:
            raise RecipeError("varm: temperature does not apply with elementwise: remove one")
        return MeanByChange(summed)
    uniform = [1.0 / tensor.models] * tensor.models
    if tensor.granularity == "layer" and tensor.layer is None:
        return linear(uniform)
    by_tensor = tensor.granularity != "model"
    if tensor["measure"] == "signed" and tensor.granularity in {"module", "layer"}:
        means = yield Variation(summed, by_tensor, scope="tensor")
        degrees = yield AddUp(tuple(abs(mean) for mean in means.tolist()))
    else:
        degrees = yield Variation(summed, by_tensor)
        if not by_tensor:
            degrees = degrees / tensor.group_size
    return linear(_shares([abs(degree) for degree in degrees.tolist()], temperature) or uniform)


def _shares(degrees: Sequence[float], temperature: float | None) -> list[float] | None:
    """Weights that sum to 1, or None where a model did not change at all."""
    if min(degrees) == 0.0:
        return None
    if temperature is not None:
        largest = max(degrees)
        degrees = [math.exp((degree - largest) / temperature) for degree in degrees]
    total = sum(degrees)
    return [degree / total for degree in degrees]


METHODS = (
    Method(
        name="varm",
        title="Variation ratio merge (FuseChat)",
        summary="Averages models weighted by the mean square of their update.",
        formula="y = sum_i v_i x_i / sum_i v_i,  v_i = mean (x_i - base)^2",
        references=(
            "Wan et al., FuseChat: Knowledge Fusion of Chat Models, 2024, arXiv 2402.16107",
        ),
        parameters=(
            Parameter(
                "measure",
                "choice",
                "Size of an update: the mean of its squares, of its magnitudes, or the magnitude "
                "of its mean.",
                default="square",
                choices=tuple(_SUMMED),
            ),
            Parameter(
                "temperature",
                "float",
                "Weights are softmax(v / temperature) instead of v / sum v.",
                default=None,
                above=0.0,
            ),
            Parameter(
                "elementwise",
                "bool",
                "Every entry gets its own weights; entries that no model changed keep the base.",
                default=False,
            ),
        ),
        rule=_varm,
        base="origin",
        base_required=True,
        passes="two (sizes of the updates, combine); one with elementwise",
        use_when=(
            "Fine-tunings of one pivot model that are to be averaged without tuning weights. "
            "granularity: tensor gives one weight per tensor (the authors' param), module, layer "
            "and model coarser ones."
        ),
        caveats=(
            "A model that moved far for no good reason gets the most weight. Modules and layers "
            "add up the means of their tensors, so a norm's vector counts as much as a matrix. "
            "Where one model did not change at all, all models weigh the same; at granularity "
            "layer so do tensors outside the layers."
        ),
    ),
)
