"""Experts in one tensor per layer, as the classes of transformers hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusekit.checkpoint.dtypes import DType
from fusekit.checkpoint.source import TensorInfo, TensorSource


class StackedSource(TensorSource):
    """A source some of whose tensors are offered end to end, as one tensor.

    Args:
        source: where the tensors are.
        stacks: offered name -> the tensors it is made of, in order, and its shape. Those are no
            longer offered by themselves.
        dtype: element type of the stacks, to which tensors of other types are rounded.
    """

    def __init__(
        self,
        source: TensorSource,
        stacks: Mapping[str, tuple[Sequence[str], tuple[int, ...]]],
        dtype: DType,
    ) -> None:
        self.label = source.label
        self._source = source
        self._parts = {name: tuple(parts) for name, (parts, _) in stacks.items()}
        inside = {part for parts in self._parts.values() for part in parts}
        self._tensors = {name: info for name, info in source.tensors.items() if name not in inside}
        for name, (_, shape) in stacks.items():
            self._tensors[name] = TensorInfo(name, dtype, shape)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read_into(self, name: str, start: int, stop: int, out: memoryview) -> None:
        if name not in self._parts:
            self._source.read_into(name, start, stop, out)
            return
        kind = self._tensors[name].dtype
        begin = 0
        for part in self._parts[name]:
            info = self._source.tensors[part]
            first, last = max(start - begin, 0), min(stop - begin, info.size)
            if first < last:
                offset = begin + first - start
                place = out[offset * kind.itemsize : (offset + last - first) * kind.itemsize]
                self._read_part(info, first, last, place, kind)
            begin += info.size

    def _read_part(
        self, info: TensorInfo, first: int, last: int, out: memoryview, kind: DType
    ) -> None:
        if info.dtype == kind:
            self._source.read_into(info.name, first, last, out)
            return
        own = np.empty(last - first, info.dtype.numpy)
        self._source.read_into(info.name, first, last, own.view(np.uint8).data)
        np.frombuffer(out, kind.numpy)[:] = own.astype(np.float64).astype(kind.numpy)

    def where(self, name: str) -> str:
        return self._source.where(self._parts.get(name, (name,))[0])

    def identity(self) -> dict[str, Any]:
        return self._source.identity()

    def close(self) -> None:
        self._source.close()
