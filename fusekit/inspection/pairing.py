"""Which tensors of which checkpoints can be compared: headers only."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusekit.checkpoint.layers import Layer, infer_layers
from fusekit.checkpoint.source import TensorInfo, TensorSource

OUTSIDE = "outside the blocks"
"""The layer of embeddings, heads and final norms."""


@dataclass(frozen=True)
class Comparison:
    """One tensor name and who has it.

    `infos` maps a source's index to what its header says. `compared` are the sources whose elements
    are measured against each other (the base's among them, if there is one), over `shape`: their
    common leading rows.
    """

    name: str
    shape: tuple[int, ...]
    layer: Layer | None
    kind: str
    infos: Mapping[int, TensorInfo]
    compared: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def layer_name(self) -> str:
        return f"{self.layer.stack}.{self.layer.index}" if self.layer else OUTSIDE

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns): convolutions by output channel, stacked experts by row."""
        if len(self.shape) < 2:
            return 1, self.size
        columns = self.shape[-1] if len(self.shape) < 4 else math.prod(self.shape[1:])
        return self.size // columns if columns else 0, columns

    @property
    def is_matrix(self) -> bool:
        return min(self.matrix_shape) > 1

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())


def pair(sources: Sequence[TensorSource], has_base: bool) -> list[Comparison]:
    """Every tensor name of any source, numbers in names in their order (2 before 10)."""
    names = sorted({name for source in sources for name in source.tensors}, key=_natural)
    layers = infer_layers(names)
    return [_comparison(name, sources, layers[name], has_base) for name in names]


def _comparison(
    name: str, sources: Sequence[TensorSource], layer: Layer | None, has_base: bool
) -> Comparison:
    infos = {i: source.tensors[name] for i, source in enumerate(sources) if name in source.tensors}
    reference = infos[min(infos)]
    alike = tuple(i for i, info in infos.items() if _comparable(info, reference))
    if (has_base and 0 not in infos) or len(alike) < 2 or reference.size == 0:
        alike = ()
    shape = reference.shape
    if alike and shape:
        shape = (min(infos[i].shape[0] for i in alike), *shape[1:])
    return Comparison(name, shape, layer, _kind(name, layer), infos, alike)


def _comparable(info: TensorInfo, reference: TensorInfo) -> bool:
    return (
        info.dtype.is_float
        and reference.dtype.is_float
        and len(info.shape) == len(reference.shape)
        and info.shape[1:] == reference.shape[1:]
        and (len(info.shape) > 1 or info.shape == reference.shape)
    )


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _kind(name: str, layer: Layer | None) -> str:
    """The module's role: its name without its block, numbers and `.weight`."""
    if layer is not None:
        name = name.removeprefix(f"{layer.stack}.{layer.index}.".lstrip("."))
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name).removesuffix(".weight")
