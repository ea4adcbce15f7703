"""A merge as data: for every output tensor what it is made of, how, and where its bytes will lie.

Planning reads headers only; its time is linear in the number of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from fusekit.checkpoint.dtypes import DType
from fusekit.checkpoint.folder import Checkpoint
from fusekit.checkpoint.layout import Layout
from fusekit.checkpoint.source import TensorSource
from fusekit.methods.base import Granularity, Method, Tensor

WHOLE_COPIES = 10
"""Copies of a tensor in float64 that the mathematics on whole tensors holds, if nothing is said."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One operand: a tensor of one of the plan's sources."""

    source: int
    name: str
    dtype: DType


Kind = Literal["merge", "same", "first"]


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor.

    `kind` is `merge` for floating-point tensors, `same` for integer and boolean ones, which must be
    equal in all operands and are copied, and `first` for what is copied from the base or else the
    first model whatever the others hold. `group` names the tensors that share summaries.
    """

    tensor: Tensor
    dtype: DType
    models: tuple[TensorRef, ...]
    base: TensorRef | None
    method: Method
    group: str
    kind: Kind = "merge"
    compute: Literal["float32", "float64"] = "float32"

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def size(self) -> int:
        return self.tensor.size

    @cached_property
    def is_whole(self) -> bool:
        """Whether the method takes the tensor as a whole, in torch."""
        whole = self.method.whole
        return self.kind == "merge" and whole is not None and whole(self.tensor)

    def operand(self, index: int) -> TensorRef:
        """A model's tensor; -1 is the base."""
        if index >= 0:
            return self.models[index]
        assert self.base is not None
        return self.base

    def operand_indices(self) -> list[int]:
        """Indices of all operands, the base's -1 first."""
        return ([-1] if self.base else []) + list(range(len(self.models)))

    @cached_property
    def input_bytes(self) -> int:
        """Bytes of all operands, each read once."""
        return self.size * sum(self.operand(i).dtype.itemsize for i in self.operand_indices())


@dataclass(frozen=True)
class Plan:
    """Everything a run needs to know before it reads the first weight."""

    tensors: tuple[PlannedTensor, ...]
    checkpoints: tuple[Checkpoint, ...]
    layout: Layout
    granularity: Granularity
    seed: int
    recipe: Mapping[str, Any]
    config_from: int | None
    warnings: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None
    """What config.json of the output says, or None where there is none."""
    files: Mapping[str, bytes | None] = field(default_factory=dict)
    """Files beside the weights that differ from those of `config_from`; None: left out."""

    @property
    def sources(self) -> list[TensorSource]:
        return [checkpoint.source for checkpoint in self.checkpoints]

    @property
    def shares_summaries(self) -> bool:
        """Whether tensors wait for each other: summaries over layers or the whole model."""
        return self.granularity != "tensor" or any(t.method.model_scope for t in self.tensors)

    @property
    def whole_bytes(self) -> int:
        """Most memory that merging tensors as a whole takes: operands of two, and float64 copies.

        While a tensor is computed the next one is read; statistics are as large as gradients
        (tensor-shaped) or Gram matrices (columns squared).
        """
        most = 0
        for planned in self.tensors:
            if planned.is_whole:
                operands = len(planned.operand_indices())
                extra = 0 if planned.method.statistic is None else len(planned.models)
                square = max(planned.size, planned.shape[-1] ** 2 if planned.shape else 1)
                held = 4 * (operands * planned.size + extra * square)
                working = planned.method.working
                wide = WHOLE_COPIES * planned.size if working is None else working(planned.tensor)
                most = max(most, 2 * held + 8 * wide)
        return most

    @property
    def input_bytes(self) -> int:
        """Bytes of all operands, each read once."""
        return sum(planned.input_bytes for planned in self.tensors)

    @property
    def output_bytes(self) -> int:
        return self.layout.nbytes

    def close(self) -> None:
        """Close all sources."""
        for source in self.sources:
            source.close()
