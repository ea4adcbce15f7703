"""RAM: what one model alone changed stays at full strength, what several changed is averaged."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fusekit import kernels
from fusekit.methods.base import (
    Additive,
    Block,
    Combine,
    Method,
    Parameter,
    Rule,
    Scope,
    Summary,
    Tensor,
)

if TYPE_CHECKING:
    from fusekit.methods.base import Array

Steps = Generator[Summary, Any, Combine]


@dataclass(frozen=True)
class Overlap(Additive):
    """Per model, entries it changed alone and entries others changed too: (2, models)."""

    deltas: ClassVar[bool] = True
    in_registers: ClassVar[bool] = True

    epsilon: float
    scope: Scope = "group"

    def width(self, tensor: Tensor) -> int:
        return 2 * tensor.models

    def measure(self, block: Block, out: Array) -> None:
        out[:] = 0.0
        packed, overlap = block.bfloat16, kernels.overlap
        if packed is not None:
            place = packed.bits, packed.start, block.size
            if overlap.count_overlap_of_bits(*place, self.epsilon, out[0]):
                return
        overlap.count_overlap(block.rows, self.epsilon, out[0])

    def result(self, total: Array) -> Array:
        return total.reshape(2, -1)


@dataclass(frozen=True)
class Reinforced(Combine):
    """base + boosts[i] * delta_i where only model i changed, + the mean of changes elsewhere."""

    deltas: ClassVar[bool] = True
    in_registers: ClassVar[bool] = True

    epsilon: float
    boosts: tuple[float, ...]

    def encode(self, block: Block, out: Array) -> bool:
        import numpy as np

        packed = block.bfloat16
        if packed is None:
            return False
        settings = self.epsilon, np.array(self.boosts, dtype=np.float64)
        return bool(kernels.overlap.reinforce_bits(packed.bits, packed.start, *settings, out))

    def apply(self, block: Block, out: Array) -> None:
        import numpy as np

        boosts = np.array(self.boosts, dtype=np.float64)
        kernels.overlap.reinforce(block.rows, self.epsilon, boosts, block.base, out)


def _ram(tensor: Tensor) -> Steps:
    yield from ()
    return Reinforced(tensor["epsilon"], (1.0,) * tensor.models)


def _ramplus_tl(tensor: Tensor) -> Steps:
    return (yield from _boosted(tensor, "group"))


def _ramplus(tensor: Tensor) -> Steps:
    return (yield from _boosted(tensor, tensor["scope"]))


def _boosted(tensor: Tensor, scope: Scope) -> Steps:
    """RAM with entries of one model amplified by 1 + r * clamp(shared / unique, 0, alpha)."""
    epsilon = tensor["epsilon"]
    unique, shared = yield Overlap(epsilon, scope)
    boosts = tuple(
        1.0 + tensor["r"] * min(shared_ratio(u, s), tensor["alpha"])
        for u, s in zip(unique.tolist(), shared.tolist(), strict=True)
    )
    return Reinforced(epsilon, boosts)


def shared_ratio(unique: float, shared: float) -> float:
    """shared / unique entries of a model: 0 if it shares nothing, infinite if all is shared."""
    return shared / unique if unique else math.inf if shared else 0.0


_EPSILON = Parameter(
    "epsilon",
    "float",
    "An entry counts as changed where its update exceeds this in magnitude; smaller updates are "
    "dropped.",
    default=1e-5,
    minimum=0.0,
)
_BOOST = (
    Parameter("r", "float", "Strength of the amplification.", default=0.1, minimum=0.0),
    Parameter(
        "alpha",
        "float",
        "Largest ratio of shared to unique entries that counts.",
        default=0.2,
        minimum=0.0,
    ),
)
_CAVEATS = (
    "epsilon is in absolute weight units and should lie below one step of the storage type; where "
    "all models changed nearly everything (ordinary fine-tunes) the result is close to the average."
)
_USE_WHEN = "Models trained by reinforcement learning, whose updates are sparse and hardly overlap."


def _method(name: str, title: str, rule: Rule, **about: Any) -> Method:
    return Method(
        name=name,
        title=title,
        rule=rule,
        base="origin",
        base_required=True,
        references=(
            "Yuan et al., Behavior Knowledge Merge in Reinforced Agentic Models, 2026, "
            "arXiv 2601.13572",
        ),
        use_when=_USE_WHEN,
        caveats=_CAVEATS,
        **about,
    )


METHODS = (
    _method(
        "ram",
        "RAM (Reinforced Agent Merging)",
        _ram,
        summary="Keep what one model changed, average what several changed.",
        formula="y = base + d_i where only model i changed, base + mean of the changes elsewhere",
        parameters=(_EPSILON,),
        passes="one",
    ),
    _method(
        "ramplus_tl",
        "RAM+, tensor-local",
        _ramplus_tl,
        summary="RAM with each model's own changes amplified by how much it shares per tensor.",
        formula=(
            "y = base + lambda_i d_i where only model i changed, base + mean of the changes "
            "elsewhere;  lambda_i = 1 + r min(shared_i / unique_i, alpha)"
        ),
        parameters=(_EPSILON, *_BOOST),
        passes="two (counts, combine)",
    ),
    _method(
        "ramplus",
        "RAM+",
        _ramplus,
        summary="RAM with each model's own changes amplified by how much it shares overall.",
        formula="as ramplus_tl, with shared_i and unique_i counted over the whole model",
        parameters=(
            _EPSILON,
            *_BOOST,
            Parameter(
                "scope",
                "choice",
                "Over what entries are counted: the whole model, as in the paper, or a tensor.",
                default="model",
                choices=("model", "tensor"),
            ),
        ),
        passes="two (counts over the model, combine)",
        model_scope=True,
    ),
)
