"""Which input tensors make up which output tensor: whole models, stacked slices, modules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fusekit.checkpoint.folder import Checkpoint
from fusekit.checkpoint.layers import Layer, infer_layers, within_block
from fusekit.engine.operands import Operand, Operands, Section, Slice
from fusekit.errors import RecipeError, did_you_mean
from fusekit.tokenizers.embedding import EMBEDDING_NAMES, HEAD_NAMES

_BEFORE_LAYERS = re.compile(
    r"embed|(^|\.)(wte|wpe|shared|conv1|conv2|conv_in|stem|ln_pre|project_in)\."
    r"|patch|cls_token|class_token|position|pre_la?yr?norm|rotary"
)
"""Tensors outside the layers that a model uses before them; all others come after."""

_MODULE_NAMES: Mapping[str, tuple[str, ...]] = {
    "text_decoder": ("text_decoder", "language_model", "text_model", "decoder"),
    "text_encoder": ("text_encoder", "text_model", "encoder"),
    "vision_tower": ("vision_tower", "vision_model", "visual", "vision_encoder"),
    "vision_encoder": ("vision_encoder", "vision_tower", "vision_model", "visual"),
    "multi_modal_projector": ("multi_modal_projector", "mm_projector", "connector", "merger"),
}
"""Module names that recipes use, and the parts of tensor names that they stand for."""

_MINOR_STACK = 0.1
"""Stacks with a smaller share of the elements in blocks (a projector's two layers) are no layers
in the sense of `layer_range`."""


@dataclass(frozen=True)
class Unit:
    """Tensors that are matched together: per operand (the base first) output name -> input name.

    `positions` gives the relative depth of each output tensor, or of all of them. `after` are, for
    the tensors after stacked layers, the models whose embedding comes before these.
    """

    part: Slice
    offered: tuple[Mapping[str, str], ...]
    positions: Mapping[str, float] | float
    after: tuple[str, ...] = ()

    def position(self, name: str) -> float:
        if isinstance(self.positions, float):
            return self.positions
        return self.positions.get(name, 0.0)


class Structure:
    """The blocks of one model."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.names = list(checkpoint.source.tensors)

    @cached_property
    def layers(self) -> dict[str, Layer | None]:
        return infer_layers(self.names)

    @cached_property
    def positions(self) -> dict[str, float]:
        return {name: layer.position for name, layer in self.layers.items() if layer is not None}

    @cached_property
    def blocks(self) -> dict[str, list[dict[str, str]]]:
        """Per stack, its blocks in order: name within the block -> tensor name."""
        stacks: dict[str, list[dict[str, str]]] = {}
        for name, layer in self.layers.items():
            if layer is not None:
                members = stacks.setdefault(layer.stack, [{} for _ in range(layer.depth)])
                members[layer.rank][within_block(name, layer)] = name
        return stacks

    def uniform_shapes(self, stack: str) -> dict[str, tuple[int, ...]]:
        """Name within the block -> shape, of the tensors that have one shape in all blocks."""
        shapes: dict[str, set[tuple[int, ...]]] = {}
        for block in self.blocks.get(stack, []):
            for within, name in block.items():
                shapes.setdefault(within, set()).add(self.checkpoint.source.tensors[name].shape)
        return {within: found.pop() for within, found in shapes.items() if len(found) == 1}

    def is_dense(self, stack: str) -> bool:
        """Whether the numbers of a stack's blocks have no gaps."""
        last = max(layer.index for layer in self.layers.values() if layer and layer.stack == stack)
        return last == len(self.blocks[stack]) - 1

    def stack_elements(self, names: Sequence[str]) -> dict[str, int]:
        """Elements in every stack, counting only the named tensors."""
        counts: dict[str, int] = {}
        for name in names:
            layer = self.layers[name]
            if layer is not None:
                size = self.checkpoint.source.tensors[name].size
                counts[layer.stack] = counts.get(layer.stack, 0) + size
        return counts


@dataclass(frozen=True)
class StackedLayers:
    """Where the layers of a stack of the output come from: model and layer, one by one."""

    stack: str
    origins: tuple[tuple[str, int], ...]
    depth: int
    """How many layers the first origin's model has in the stack."""


def units(
    operands: Operands, structures: Mapping[str, Structure]
) -> tuple[list[Unit], list[StackedLayers]]:
    """All units of a merge in output order, and the stacks that slices have put together.

    Raises:
        RecipeError: a layer range beyond a model's layers, several stacks of layers where only one
            can be meant, layers of different sizes, a module that no tensor or a tensor that no
            module belongs to.
    """
    made: list[Unit] = []
    stacks: list[StackedLayers] = []
    modules = [section.module for section in operands.sections]
    for section in operands.sections:
        if section.slices[0].length is None:
            made.append(_whole(section, modules, structures))
        else:
            stacked = _Stacked(section, modules, structures)
            stacked.check_sizes(operands.reference)
            made.extend(stacked.units())
            stacks.append(stacked.origins())
    return made, stacks


def _whole(
    section: Section, modules: Sequence[str | None], structures: Mapping[str, Structure]
) -> Unit:
    (part,) = section.slices
    offered = []
    for operand in part.operands:
        names = _members(section.module, modules, structures[operand.model])
        offered.append(dict(zip(names, names, strict=True)))
    return Unit(part, tuple(offered), structures[part.operands[0].model].positions)


def _members(module: str | None, modules: Sequence[str | None], structure: Structure) -> list[str]:
    """The tensors of a model that belong to a module; `default` gets what no other does."""
    if module is None:
        return structure.names
    owners = _owners([each for each in modules if each is not None], structure)
    found = [name for name, owner in owners.items() if owner == module]
    model = structure.checkpoint.reference
    if not found and module != "default":
        heads = dict.fromkeys(part for name in structure.names for part in name.split(".")[:2])
        raise RecipeError(
            f"modules.{module}: no tensor of {model} has this in its name"
            f"{did_you_mean(module, heads)}"
        )
    left = next((name for name, owner in owners.items() if owner is None), None)
    if left is not None:
        raise RecipeError(
            f"modules: tensor {left!r} of {model} belongs to none of them; add a module 'default' "
            "for all that is left"
        )
    return found


def _owners(modules: Sequence[str], structure: Structure) -> dict[str, str | None]:
    """The module of every tensor of a model.

    Of two modules in a tensor's name the outer one has it, unless the other lies inside of that
    with all of its tensors (`visual.merger` in `visual`). A language model without a name of its
    own is what is left.
    """
    starts = {module: _starts(module, structure.names) for module in modules}
    rest = "default" if "default" in modules else None
    if rest is None and "text_decoder" in modules and not starts["text_decoder"]:
        rest = "text_decoder"
    owners: dict[str, str | None] = {}
    for name in structure.names:
        holders = [module for module in modules if name in starts[module]]
        inner = [
            module
            for module in holders
            if not any(starts[other].keys() < starts[module].keys() for other in holders)
        ]
        owners[name] = min(inner, key=lambda module: starts[module][name], default=rest)
    return owners


def _starts(module: str, names: Sequence[str]) -> dict[str, int]:
    """The tensors with a module in their name, in its first spelling that occurs, and where."""
    for spelling in _MODULE_NAMES.get(module, (module,)):
        pattern = re.compile(rf"(^|[./]){re.escape(spelling)}[./]")
        found = {name: match.start() for name in names if (match := pattern.search(name))}
        if found:
            return found
    return {}


class _Stacked:
    """One section whose layers are put together from slices."""

    def __init__(
        self,
        section: Section,
        modules: Sequence[str | None],
        structures: Mapping[str, Structure],
    ) -> None:
        self._section = section
        self._structures = structures
        self._names = {
            operand.model: _members(section.module, modules, structures[operand.model])
            for part in section.slices
            for operand in part.operands
        }
        self._stacks = {model: self._stack(model) for model in self._names}

    def _stack(self, model: str) -> str:
        """The stack whose layers `layer_range` counts."""
        counts = self._structures[model].stack_elements(self._names[model])
        total = sum(counts.values())
        large = [stack for stack, count in counts.items() if count >= _MINOR_STACK * total]
        if len(large) > 1:  # a projector's linear layers have gaps where its activations are
            large = [each for each in large if self._structures[model].is_dense(each)] or large
        if len(large) != 1:
            place = f"modules.{self._section.module}." if self._section.module else ""
            found = f"several stacks of layers ({', '.join(large)})" if large else "no layers"
            raise RecipeError(
                f"{place}slices: {model} has {found}, expected one; "
                "use modules to merge each by itself"
            )
        return large[0]

    def check_sizes(self, reference: str) -> None:
        """Refuse layers that one config cannot describe.

        Raises:
            RecipeError: models of different width, or tensors that have one shape in all layers of
                a model and another in those of another, where the config of `reference` has no
                numbers per layer.
        """
        first = self._section.slices[0].operands[0].model
        for other in dict.fromkeys([*self._names, reference]):
            for what, shape, theirs in self._differences(first, other, reference):
                raise RecipeError(
                    f"slices: {what} has shape {list(shape)} in {first} but {list(theirs)} in "
                    f"{other}; slices take layers of models of one size"
                )

    def _differences(
        self, first: str, other: str, reference: str
    ) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        mine, theirs = (
            self._structures[model].checkpoint.source.tensors for model in (first, other)
        )
        for name in self._names[first]:
            if name in theirs and self._structures[first].layers[name] is None:
                ours, others = mine[name].shape, theirs[name].shape
                if _width(name, ours) != _width(name, others):
                    yield repr(name), ours, others
        stack = self._stacks[first]
        depth = len(self._structures[first].blocks[stack])
        if _has_numbers_per_layer(self._structures[reference].checkpoint.config() or {}, depth):
            return
        others_shapes = self._structures[other].uniform_shapes(self._stacks.get(other, stack))
        for within, shape in self._structures[first].uniform_shapes(stack).items():
            if others_shapes.get(within, shape) != shape:
                yield f"{within!r} of every layer", shape, others_shapes[within]

    def units(self) -> Iterator[Unit]:
        """Tensors before the layers, the layers, tensors after them."""
        slices = self._section.slices
        yield self._outside(slices[0], before=True)
        stack = self._stacks[slices[0].operands[0].model]
        number = 0
        for part in slices:
            blocks = [self._blocks(operand) for operand in part.operands]
            for rank, block in enumerate(zip(*blocks, strict=True)):
                prefix = f"{stack}.{number}." if stack else f"{number}."
                offered = tuple(
                    {prefix + within: name for within, name in members.items()} for members in block
                )
                length = len(blocks[0])
                yield Unit(part, offered, rank / (length - 1) if length > 1 else 1.0)
                number += 1
        yield self._outside(slices[-1], before=False)

    def origins(self) -> StackedLayers:
        slices = self._section.slices
        first = slices[0].operands[0].model
        origins = []
        for part in slices:
            operand = part.operands[0]
            assert operand.layers is not None
            origins += [(operand.model, index) for index in range(*operand.layers)]
        stack = self._stacks[first]
        return StackedLayers(stack, tuple(origins), len(self._structures[first].blocks[stack]))

    def _blocks(self, operand: Operand) -> list[dict[str, str]]:
        assert operand.layers is not None
        blocks = self._structures[operand.model].blocks[self._stacks[operand.model]]
        start, end = operand.layers
        if end > len(blocks):
            raise RecipeError(
                f"{operand.place}: found layer_range [{start}, {end}), but {operand.model} has "
                f"{len(blocks)} layers"
            )
        return blocks[start:end]

    def _outside(self, part: Slice, before: bool) -> Unit:
        offered = []
        for operand in part.operands:
            layers = self._structures[operand.model].layers
            stack = self._stacks[operand.model]
            names = [
                name
                for name in self._names[operand.model]
                if ((layer := layers[name]) is None or layer.stack != stack)
                and _comes_before(name) == before
            ]
            offered.append({name: name for name in names})
        after = () if before else tuple(each.model for each in self._section.slices[0].operands)
        return Unit(part, tuple(offered), 0.0, after)


def _comes_before(name: str) -> bool:
    return HEAD_NAMES.search(name) is None and _BEFORE_LAYERS.search(name) is not None


def _width(name: str, shape: tuple[int, ...]) -> int | None:
    """The model's width as a tensor outside the layers shows it: a norm, a table of tokens."""
    is_vocabulary = bool(EMBEDDING_NAMES.search(name) or HEAD_NAMES.search(name))
    return shape[-1] if len(shape) == (2 if is_vocabulary else 1) else None


def _has_numbers_per_layer(config: Mapping[str, Any], depth: int) -> bool:
    """Whether a config lists numbers layer by layer, such as the sizes of its MLPs."""
    return any(
        _has_numbers_per_layer(value, depth)
        if isinstance(value, Mapping)
        else isinstance(value, list)
        and len(value) == depth
        and all(isinstance(each, int | float) and not isinstance(each, bool) for each in value)
        for value in config.values()
    )
