"""NearSwap: take over a second model's values where they are near, bounded moves elsewhere."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fusekit import kernels
from fusekit.methods.base import Block, Combine, Copy, Method, Parameter, Summary, Tensor

if TYPE_CHECKING:
    from fusekit.methods.base import Array

_FLOOR = 1e-6
"""Differences below this are treated as this: with a smaller t they shrink in proportion."""


@dataclass(frozen=True)
class MoveAtMost(Combine):
    """The first model, moved by at most `limit` per entry towards the second."""

    in_registers: ClassVar[bool] = True

    limit: float

    @property
    def slope(self) -> float:
        """What small differences are multiplied by."""
        return min(1.0, self.limit / _FLOOR)

    def encode(self, block: Block, out: Array) -> bool:
        packed = block.bfloat16
        if packed is None:
            return False
        place = packed.bits, packed.start
        return bool(kernels.direct.move_at_most(*place, self.slope, self.limit, out))

    def apply(self, block: Block, out: Array) -> None:
        kernels.pairs.move_at_most(block.rows[0], block.rows[1], self.slope, self.limit, out)


def _nearswap(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    yield from ()
    if tensor.models == 1 or tensor["t"] <= 0.0:
        return Copy(0)
    return MoveAtMost(tensor["t"])


METHODS = (
    Method(
        name="nearswap",
        title="NearSwap",
        summary="Pull every weight towards a second model's by at most t.",
        formula="y = a + clip(b - a, -t, t)",
        references=("alchemonaut, QuartetAnemoi-70B (model card describing the recipe), 2024",),
        parameters=(
            Parameter(
                "t",
                "float",
                "Largest change of a weight, in absolute units (about 1e-4 for language models); "
                "0 or less changes nothing.",
            ),
        ),
        rule=_nearswap,
        base="first",
        max_models=2,
        use_when="A large model is to be flavoured gently with a second one.",
        caveats=(
            "t is in units of the weights, so layers of different scale are moved differently. "
            "bfloat16 storage swallows changes below half a step of the weight."
        ),
    ),
)
