"""The one interface everything that is read goes through."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusekit.checkpoint.dtypes import DType


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class TensorSource(ABC):
    """Named tensors whose elements can be read by flat range into a caller's buffer.

    Reads are thread-safe and positioned: no cursor, no mapping of whole files. Sources compose
    (a renamed view, a LoRA on top of a base), so a source may compute what it returns.
    """

    label: str
    """What messages call this source: a path, a hub id, `memory`."""

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor offered, in file order. Known without reading any weight."""

    @abstractmethod
    def read_into(self, name: str, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with the bytes of elements `[start, stop)` (row-major) of tensor `name`.

        `out` is a writable, contiguous view of unsigned bytes, exactly
        `(stop - start) * itemsize` long. Raises `CheckpointError` when the bytes are not there.
        """

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """Hint that a range will be read soon. May do nothing; never blocks."""

    def where(self, name: str) -> str:
        """The file a message about tensor `name` should name."""
        return self.label

    def identity(self) -> dict[str, Any]:
        """What pins this input in a manifest (path, sizes, header hash): JSON types only."""
        return {"label": self.label}

    def close(self) -> None:
        """Release file handles. The source must not be read afterwards."""
