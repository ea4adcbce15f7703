"""State dicts of NumPy arrays as sources."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fusekit.checkpoint.dtypes import DTYPES
from fusekit.checkpoint.memory import MemorySource, array_bytes
from fusekit.errors import CheckpointError, FusekitError


def read(source: MemorySource, name: str, start: int, stop: int) -> Any:
    info = source.tensors[name]
    out = np.empty(stop - start, info.dtype.numpy)
    source.read_into(name, start, stop, memoryview(out.view(np.uint8)))
    return out


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_arrays_of_every_dtype_are_read_by_range(dtype: Any) -> None:
    values = np.arange(24).reshape(4, 6).astype(dtype.numpy)
    source = MemorySource({"w": values})
    assert (source.tensors["w"].dtype, source.tensors["w"].shape) == (dtype, (4, 6))
    assert read(source, "w", 5, 19).tobytes() == values.reshape(-1)[5:19].tobytes()


def test_contiguous_arrays_are_not_copied() -> None:
    values = np.zeros(10, np.float32)
    source = MemorySource({"w": values})
    values[3] = 7.0
    assert read(source, "w", 3, 4) == [7.0]


@pytest.mark.parametrize(
    "view",
    [lambda a: a.T, lambda a: a[::2], lambda a: a[:, ::-1], lambda a: a.astype(">f8")],
    ids=["transposed", "strided", "reversed", "big-endian"],
)
def test_other_layouts_are_read_in_row_major_order(view: Any) -> None:
    values = view(np.arange(24.0).reshape(4, 6))
    source = MemorySource({"w": values})
    assert source.tensors["w"].shape == values.shape
    np.testing.assert_array_equal(
        read(source, "w", 0, 24 if values.size == 24 else 12), values.flat
    )


def test_scalars_and_empty_arrays() -> None:
    source = MemorySource({"a": np.array(2.5), "b": np.float32(3.5), "c": np.zeros((0, 3))})
    assert {k: v.shape for k, v in source.tensors.items()} == {"a": (), "b": (), "c": (0, 3)}
    assert read(source, "a", 0, 1) == [2.5]
    assert read(source, "b", 0, 1) == [3.5]


def test_bytes_type_and_shape_of_an_array() -> None:
    values = np.ones((2, 3), ml_dtypes.bfloat16)
    dtype, shape, raw = array_bytes(values)
    assert (dtype.name, shape, raw.tobytes()) == ("BF16", (2, 3), values.tobytes())


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ([1.0, 2.0], "expected a NumPy array or a torch tensor, found list"),
        (None, "found NoneType"),
        (np.zeros(2, np.complex64), "unknown dtype 'complex64'"),
        (np.array(["text"]), "unknown dtype"),
        (np.array([object()]), "unknown dtype 'object'"),
    ],
)
def test_what_is_no_tensor_is_refused_by_name(array: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        MemorySource({"odd": array}, "model 3")
    assert str(caught.value).startswith("model 3: tensor 'odd': ")
    assert message in str(caught.value)
    with pytest.raises(FusekitError):
        array_bytes(array)
