"""What methods share that keep one bit per entry and task beside the merged model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fusekit import kernels
from fusekit.methods.base import Block, Parameter, SidePart, SideTensor, Tensor

if TYPE_CHECKING:
    from fusekit.methods.base import Array

TASK = Parameter(
    "task",
    "text",
    "Name of the model's task, for reconstruct; left out, that of the model's folder.",
    default=None,
    per_model=True,
)


def mask_bytes(size: int) -> int:
    """Bytes of one task's mask of a tensor."""
    return -(-size // 8)


def masks(tensor: Tensor) -> SideTensor:
    """The packed masks of a tensor: (tasks, bytes)."""
    return SideTensor(f"masks.{tensor.name}", "U8", (tensor.models, mask_bytes(tensor.size)))


def scales(tensor: Tensor) -> SideTensor:
    """The tasks' scales for a tensor."""
    return SideTensor(f"scales.{tensor.name}", "F64", (tensor.models,))


def empty_masks(block: Block) -> Array:
    """Room for the masks of a block, one byte per entry, padded to whole bytes of bits."""
    shape = block.tensor.models, 8 * mask_bytes(block.size)
    return block.scratch("task masks", shape, "uint8")


def packed(block: Block, keep: Array) -> Iterator[SidePart]:
    """Where the bits of a block's masks go. Blocks start at whole bytes of the mask."""
    name, width = f"masks.{block.tensor.name}", mask_bytes(block.tensor.size)
    bits = block.scratch("task bits", (len(keep), keep.shape[1] // 8), "uint8")
    kernels.masks.pack(keep, bits)
    for task, row in enumerate(bits):
        yield name, task * width + block.start // 8, row
