"""Where bytes go: shards, alignment, index, and sizes as users write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.checkpoint.dtypes import DTYPES
from fusekit.checkpoint.layout import DEFAULT_SHARD_BYTES, Layout, lay_out, parse_size
from fusekit.checkpoint.safetensors import parse_header
from fusekit.checkpoint.source import TensorInfo
from fusekit.checkpoint.writer import CheckpointWriter, PartialFolder
from fusekit.errors import FusekitError


def info(name: str, count: int, dtype: str = "F32") -> TensorInfo:
    return TensorInfo(name, DTYPES[dtype], (count,))


def members(layout: Layout) -> list[list[str]]:
    return [list(shard.offsets) for shard in layout.shards]


def test_a_single_shard_needs_no_index() -> None:
    layout = lay_out([info("a", 10), info("b", 20)])
    (shard,) = layout.shards
    assert shard.file_name == "model.safetensors"
    assert layout.indexes() == {}
    assert shard.nbytes == layout.nbytes == len(shard.header) + 120


def test_a_new_shard_starts_where_a_tensor_would_not_fit() -> None:
    tensors = [info("a", 25), info("b", 25), info("c", 1), info("d", 49), info("e", 1)]
    layout = lay_out(tensors, shard_bytes=200)
    assert members(layout) == [["a", "b"], ["c", "d"], ["e"]]
    assert [s.file_name for s in layout.shards] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    ((name, text),) = layout.indexes().items()
    assert name == "model.safetensors.index.json"
    index = json.loads(text)
    assert index["metadata"]["total_size"] == 4 * 101
    assert index["weight_map"]["d"] == "model-00002-of-00003.safetensors"


def test_a_tensor_larger_than_the_limit_gets_a_shard_of_its_own() -> None:
    layout = lay_out([info("a", 1), info("huge", 1000), info("b", 1)], shard_bytes=100)
    assert members(layout) == [["a"], ["huge"], ["b"]]


def test_parts_of_a_pipeline_get_files_of_their_own() -> None:
    names = ["unet/a", "unet/b", "w", "../x/w"]
    layout = lay_out(
        [info(name, 20) for name in names],
        shard_bytes=100,
        parts={"unet": "diffusion_pytorch_model"},
    )
    assert {shard.file_name: list(shard.offsets) for shard in layout.shards} == {
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors": ["unet/a"],
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors": ["unet/b"],
        "model-00001-of-00002.safetensors": ["w"],
        "model-00002-of-00002.safetensors": ["../x/w"],
    }
    assert list(parse_header(layout.shards[0].header[8:], layout.shards[0].nbytes, "f")[0]) == ["a"]
    index = json.loads(layout.indexes()["unet/diffusion_pytorch_model.safetensors.index.json"])
    assert index["weight_map"]["b"] == "diffusion_pytorch_model-00002-of-00002.safetensors"


def test_nothing_to_write_is_one_empty_file() -> None:
    layout = lay_out([])
    assert members(layout) == [[]]
    assert parse_header(layout.shards[0].header[8:], layout.nbytes, "file")[0] == {}


TENSORS = st.lists(
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 9), max_size=3)), max_size=20
)


@settings(max_examples=100, deadline=None)
@given(specified=TENSORS, limit=st.integers(1, 2000))
def test_every_tensor_is_aligned_and_every_header_is_valid(
    specified: list[tuple[str, list[int]]], limit: int
) -> None:
    tensors = [
        TensorInfo(f"t{i}", DTYPES[dtype], tuple(shape))
        for i, (dtype, shape) in enumerate(specified)
    ]
    layout = lay_out(tensors, limit)
    assert set(layout.shard_of) == {tensor.name for tensor in tensors}
    assert layout.nbytes == sum(shard.nbytes for shard in layout.shards)
    for shard in layout.shards:
        length = int.from_bytes(shard.header[:8], "little")
        assert len(shard.header) == 8 + length
        extents, metadata = parse_header(shard.header[8:], shard.nbytes, shard.file_name)
        assert metadata == {"format": "pt"}
        data = sum(tensor.nbytes for tensor, _, _ in extents.values())
        assert data <= limit or len([t for t, _, _ in extents.values() if t.nbytes]) == 1
        for name, (tensor, begin, _) in extents.items():
            assert tensor in tensors
            assert shard.offsets[name] == begin
            assert begin % tensor.dtype.itemsize == 0


def test_what_is_written_loads_with_the_safetensors_library(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        f"{dtype.name}.{i}": rng.integers(0, 2, (i + 1, 3)).astype(dtype.numpy)
        for i, dtype in enumerate(DTYPES.values())
    }
    arrays |= {"scalar": np.array(2.5), "empty": np.zeros((3, 0), np.float32)}
    arrays['quote"d näme\\ \u2028'] = np.ones(1, np.float32)
    tensors = [
        TensorInfo(k, next(d for d in DTYPES.values() if d.numpy == v.dtype), v.shape)
        for k, v in arrays.items()
    ]
    writer = CheckpointWriter(PartialFolder(tmp_path / "out"), lay_out(tensors, 64))
    for name, array in reversed(arrays.items()):
        raw = memoryview(array.reshape(-1).view(np.uint8))
        half = len(raw) // 2
        writer.write(name, half, raw[half:])
        writer.write(name, 0, raw[:half])
    assert not (tmp_path / "out").exists()
    writer.publish()
    found: dict[str, Any] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= dict(safetensors.deserialize(path.read_bytes()))
    assert set(found) == set(arrays)
    for tensor in tensors:
        assert found[tensor.name]["dtype"] == tensor.dtype.name
        assert found[tensor.name]["shape"] == list(tensor.shape)
        assert bytes(found[tensor.name]["data"]) == arrays[tensor.name].tobytes()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5G", 5 * 10**9),
        ("5g", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("1.5 kb", 1500),
        (" 2T ", 2 * 10**12),
        ("12345", 12345),
        ("12345B", 12345),
        (".5k", 500),
        (77, 77),
        (5e9, 5 * 10**9),
        ("9" * 20 + "GB", int("9" * 20) * 10**9),
    ],
)
def test_sizes_are_read_in_powers_of_1000(text: str | float, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "5 apples",
        "5GiB",
        "-5GB",
        "1e9",
        "0",
        "0GB",
        "0.1",
        0,
        -3,
        "nan",
        "5GB5",
        None,
        "9" * 5000,
    ],
)
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(FusekitError) as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


def test_shards_are_five_gigabytes_unless_said_otherwise() -> None:
    assert parse_size("5GB") == DEFAULT_SHARD_BYTES
