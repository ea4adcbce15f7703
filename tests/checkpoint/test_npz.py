"""NumPy archives read in place."""

from __future__ import annotations

import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.checkpoint.npz import NpzFile
from fusekit.errors import CheckpointError
from tests.checkpoint.zip_files import read, write_zip


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        NpzFile(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    raw = header.encode() + b"\n"
    layout = "<H" if version == 1 else "<I"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(layout, len(raw)) + raw + data


def test_arrays_are_read_in_both_memory_orders(tmp_path: Path) -> None:
    arrays = {
        "c": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "f": np.asfortranarray(np.arange(24, dtype=np.float16).reshape(2, 3, 4)),
        "scalar": np.int64(7),
        "empty": np.zeros((0, 3), np.uint8),
        "bool": np.array([True, False]),
        "layer.0/weight": np.arange(3.0),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    source = NpzFile(tmp_path / "a.npz")
    assert list(source.tensors) == list(arrays)
    for name, array in arrays.items():
        found = read(source, name)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    out = bytearray(5 * 2)
    source.read_into("f", 7, 12, memoryview(out))
    np.testing.assert_array_equal(np.frombuffer(out, np.float16), np.arange(7, 12))


def test_compressed_archives_are_refused_with_the_reason(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", w=np.zeros(1 << 20))
    message = refused(tmp_path / "a.npz")
    assert "'w.npy' is compressed" in message
    assert "save it again without compression" in message


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.array([{"a": 1}], dtype=object), "object array, which holds a pickle"),
        (np.zeros(3, ">f4"), "big-endian"),
        (np.zeros(3, "<U4"), "<U4 is not supported"),
        (np.zeros(3, "c8"), "complex64 is not supported"),
        (np.zeros(3, [("a", "f4")]), "is not supported"),
        (np.zeros(3, ml_dtypes.bfloat16), "save float32 or safetensors instead"),
    ],
)
def test_element_types_that_checkpoints_do_not_have_are_refused(
    tmp_path: Path, array: np.ndarray, problem: str
) -> None:
    np.savez(tmp_path / "a.npz", w=array)
    message = refused(tmp_path / "a.npz")
    assert "'w.npy'" in message
    assert problem in message


FLOATS = "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }"


@pytest.mark.parametrize(
    ("member", "problem"),
    [
        (npy(FLOATS, bytes(11)), "needs 12 bytes, it has 11"),
        (npy(FLOATS, bytes(13)), "needs 12 bytes, it has 13"),
        (npy(FLOATS.replace("(3,)", "(-3,)"), bytes(12)), "negative length"),
        (npy(FLOATS.replace("(3,)", f"({1 << 70},)")), "needs"),
        (npy(FLOATS.replace("(3,)", "3"), bytes(12)), "not an array"),
        (npy(FLOATS.replace("<f4", "nonsense"), bytes(12)), "not an array"),
        (npy("{'descr': __import__('os').system('touch x')}"), "not an array"),
        (npy("(" * 5000), "not an array"),
        (npy(FLOATS)[:20], "not an array"),
        (npy(FLOATS, bytes(12), version=3), "not an array"),
        (b"\x80\x02}.", "not an array"),
        (b"", "not an array"),
    ],
)
def test_malformed_members_are_refused(tmp_path: Path, member: bytes, problem: str) -> None:
    assert problem in refused(write_zip(tmp_path / "a.npz", {"w.npy": member}))


def test_a_member_that_is_no_array_is_refused(tmp_path: Path) -> None:
    assert "'readme.txt'" in refused(write_zip(tmp_path / "a.npz", {"readme.txt": b"hi"}))


def test_second_header_version_is_read(tmp_path: Path) -> None:
    data = np.arange(3, dtype=np.float32).tobytes()
    path = write_zip(tmp_path / "a.npz", {"w.npy": npy(FLOATS, data, version=2)})
    assert read(NpzFile(path), "w").tolist() == [0, 1, 2]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_gives_the_array_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damage") / "a.npz"
    np.savez(path, w=np.arange(6.0).reshape(2, 3))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        source = NpzFile(path)
    except CheckpointError:
        return
    for name, info in source.tensors.items():
        assert info.nbytes <= len(raw)
        read(source, name)
