"""Layer structure read off tensor names: which numbered block of which stack a tensor is in.

`model.layers.3.mlp.experts.7.w1.weight` is in block 3 of the stack `model.layers`: the outermost
number that follows a name counts, numbers further in (experts, submodules) belong to the block.
No list of architectures: any checkpoint whose blocks are numbered is understood.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layer:
    """A block's place: its stack's name, its number, and its rank among the stack's blocks."""

    stack: str
    index: int
    rank: int
    depth: int

    @property
    def position(self) -> float:
        """Depth on a scale from 0 (first block) to 1 (last); a stack of one block is at 1."""
        return self.rank / (self.depth - 1) if self.depth > 1 else 1.0


def within_block(name: str, layer: Layer) -> str:
    """What follows the block's number in a tensor's name: `mlp.down_proj.weight`."""
    return name.split(".", layer.stack.count(".") + 2 if layer.stack else 1)[-1]


def infer_layers(names: Iterable[str]) -> dict[str, Layer | None]:
    """The layer of every tensor, or None for tensors outside numbered blocks.

    Ranks follow the numbers present, so pruned models (blocks 0, 1, 5) count 0, 1, 2.
    """
    places = {name: _place(name) for name in names}
    stacks: dict[str, set[int]] = {}
    for place in places.values():
        if place is not None:
            stacks.setdefault(place[0], set()).add(place[1])
    ranks = {
        stack: {index: rank for rank, index in enumerate(sorted(indices))}
        for stack, indices in stacks.items()
    }
    return {
        name: None
        if place is None
        else Layer(place[0], place[1], ranks[place[0]][place[1]], len(ranks[place[0]]))
        for name, place in places.items()
    }


def _place(name: str) -> tuple[str, int] | None:
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdecimal()]
    if not numbers:
        return None
    # A leading number (`0.auto_model.encoder.layer.3...`) numbers a module list, not the blocks,
    # unless it is all there is (`0.weight`, `2.weight` of a plain Sequential).
    named = [i for i in numbers if i > 0]
    at = named[0] if named else 0
    return ".".join(parts[:at]), int(parts[at])
