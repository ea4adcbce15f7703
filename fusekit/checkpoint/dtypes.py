"""Element types of checkpoints, by their safetensors names, without importing NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fusekit.errors import FusekitError, did_you_mean

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """An element type: safetensors name, bytes per element, kind, and the name users write."""

    name: str
    itemsize: int
    kind: Literal["float", "int", "bool"]
    torch_name: str

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy (or ml_dtypes) type of the same bits."""
        import ml_dtypes
        import numpy as np

        extension = {
            "BF16": ml_dtypes.bfloat16,
            "F8_E4M3": ml_dtypes.float8_e4m3fn,
            "F8_E5M2": ml_dtypes.float8_e5m2,
        }
        numpy_type: np.dtype[Any] = np.dtype(extension.get(self.name, self.torch_name))
        return numpy_type


_ALL = (
    DType("F64", 8, "float", "float64"),
    DType("F32", 4, "float", "float32"),
    DType("F16", 2, "float", "float16"),
    DType("BF16", 2, "float", "bfloat16"),
    DType("F8_E4M3", 1, "float", "float8_e4m3fn"),
    DType("F8_E5M2", 1, "float", "float8_e5m2"),
    DType("I64", 8, "int", "int64"),
    DType("I32", 4, "int", "int32"),
    DType("I16", 2, "int", "int16"),
    DType("I8", 1, "int", "int8"),
    DType("U64", 8, "int", "uint64"),
    DType("U32", 4, "int", "uint32"),
    DType("U16", 2, "int", "uint16"),
    DType("U8", 1, "int", "uint8"),
    DType("BOOL", 1, "bool", "bool"),
)

DTYPES: dict[str, DType] = {dtype.name: dtype for dtype in _ALL}
_BY_TORCH_NAME: dict[str, DType] = {dtype.torch_name: dtype for dtype in _ALL}


def dtype_named(name: str) -> DType:
    """The type with a safetensors name (`BF16`) or a torch name (`bfloat16`, `torch.bfloat16`)."""
    plain = name.removeprefix("torch.")
    found = DTYPES.get(plain) or _BY_TORCH_NAME.get(plain)
    if found is None:
        raise FusekitError(f"unknown dtype {name!r}{did_you_mean(plain, _BY_TORCH_NAME)}")
    return found


def dtype_of(array_dtype: np.dtype[Any]) -> DType:
    """The checkpoint type with the bits of a NumPy (or ml_dtypes) array type."""
    return dtype_named(array_dtype.name)
