"""Arrays in memory (NumPy incl. ml_dtypes, torch) as a source, and merged results as arrays."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from fusekit.checkpoint.dtypes import DType, dtype_named, dtype_of
from fusekit.checkpoint.source import TensorInfo, TensorSource
from fusekit.errors import CheckpointError, FusekitError


class MemorySource(TensorSource):
    """A state dict of NumPy arrays or torch tensors. Contiguous ones are not copied."""

    def __init__(self, arrays: Mapping[str, Any], label: str = "memory") -> None:
        self.label = label
        self._bytes: dict[str, memoryview] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for name, array in arrays.items():
            try:
                dtype, shape, raw = array_bytes(array)
            except FusekitError as error:
                raise CheckpointError(f"{label}: tensor {name!r}: {error}") from None
            self._tensors[name] = TensorInfo(name, dtype, shape)
            self._bytes[name] = raw

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read_into(self, name: str, start: int, stop: int, out: memoryview) -> None:
        width = self._tensors[name].dtype.itemsize
        out[:] = self._bytes[name][start * width : stop * width]


def array_bytes(array: Any) -> tuple[DType, tuple[int, ...], memoryview]:
    """Type, shape and row-major bytes of a NumPy array or torch tensor.

    Raises:
        FusekitError: an array type or element type that checkpoints do not have.
    """
    if isinstance(array, (np.ndarray, np.generic)):
        native = np.asarray(array).dtype.newbyteorder("=")
        flat = np.ascontiguousarray(array, dtype=native)
        dtype = dtype_of(flat.dtype)
        return dtype, np.shape(array), flat.reshape(-1).view(np.uint8).data
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        dtype = dtype_named(str(array.dtype))
        if array.layout is not torch.strided or array.is_meta:
            kind = "no data (device meta)" if array.is_meta else str(array.layout)
            raise FusekitError(f"expected a dense tensor, found {kind}")
        flat_tensor = array.detach().cpu().contiguous().reshape(-1)
        raw = flat_tensor.view(torch.uint8).numpy()
        return dtype, tuple(array.shape), raw.data
    raise FusekitError(f"expected a NumPy array or a torch tensor, found {type(array).__name__}")


def is_torch(arrays: Mapping[str, Any]) -> bool:
    """Whether a state dict holds torch tensors."""
    torch = sys.modules.get("torch")
    return torch is not None and any(isinstance(array, torch.Tensor) for array in arrays.values())


def to_torch(array: np.ndarray[Any, Any]) -> Any:
    """The torch tensor with the bits of a NumPy (or ml_dtypes) array."""
    import torch

    name = dtype_of(array.dtype).torch_name
    raw = torch.from_numpy(array.reshape(-1).view(np.uint8))
    return raw.view(getattr(torch, name)).reshape(array.shape)
