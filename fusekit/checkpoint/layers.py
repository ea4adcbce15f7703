"""Layer structure read off tensor names: which numbered block of which stack a tensor is in.

`model.layers.3.mlp.experts.7.w1.weight` is in block 3 of the stack `model.layers`: the outermost
number that follows a name counts, numbers further in (experts, submodules) belong to the block.
Only where that numbers a single wrapper (`module.0.layers.3`) do blocks that are called so count.
No list of architectures: any checkpoint whose blocks are numbered is understood.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_BLOCK_WORDS = frozenset({"layers", "layer", "blocks", "block", "resblocks", "h"})
"""What lists of blocks are called, wherever they are."""


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
    candidates = {name: _places(name) for name in names}
    wrappers = _wrappers(candidates.values())
    places = {
        name: next((place for place in found if place[0] not in wrappers), None)
        for name, found in candidates.items()
    }
    stacks = _stacks(place for place in places.values() if place is not None)
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


Place = tuple[str, int]
"""A stack and the number of a block in it."""


def _places(name: str) -> list[Place]:
    """Every number of a tensor's name that may be its block's, the outermost first."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdecimal()]
    # A leading number (`0.auto_model.encoder.layer.3...`) numbers a module list, not the blocks,
    # unless it is all there is (`0.weight`, `2.weight` of a plain Sequential).
    named = [i for i in numbers if i > 0] or numbers
    return [(".".join(parts[:at]), int(parts[at])) for at in named]


def _stacks(places: Iterable[Place]) -> dict[str, set[int]]:
    """The numbers of every stack's blocks."""
    stacks: dict[str, set[int]] = {}
    for stack, index in places:
        stacks.setdefault(stack, set()).add(index)
    return stacks


def _wrappers(candidates: Iterable[Sequence[Place]]) -> set[str]:
    """Outermost stacks of one block that do not sound like blocks, while what they hold does."""
    found = list(candidates)
    outermost = _stacks(places[0] for places in found if places)
    inside = {
        places[0][0] for places in found if any(_sounds_like_blocks(p[0]) for p in places[1:])
    }
    return {
        stack for stack in inside if len(outermost[stack]) == 1 and not _sounds_like_blocks(stack)
    }


def _sounds_like_blocks(stack: str) -> bool:
    return stack.rpartition(".")[2] in _BLOCK_WORDS
