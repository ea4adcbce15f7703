"""Safetensors files that are well formed, and those that lie."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fusekit.checkpoint.dtypes import DTYPES
from fusekit.checkpoint.folder import open_checkpoint
from fusekit.checkpoint.safetensors import (
    SafetensorsFile,
    is_file_name,
    open_sharded,
    parse_header,
    read_index,
)
from fusekit.checkpoint.source import TensorSource
from fusekit.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]


def raw_file(header: bytes | object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header (JSON-encoded unless bytes), whatever it claims."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def refused(tmp_path: Path, content: bytes) -> str:
    """The message a file is refused with: it names the file, in one line."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 1000
    return message


def read(source: TensorSource, name: str, start: int = 0, stop: int | None = None) -> Array:
    info = source.tensors[name]
    out = np.empty((info.size if stop is None else stop) - start, info.dtype.numpy)
    source.read_into(name, start, start + out.size, memoryview(out.view(np.uint8)))
    return out


# -- good files -----------------------------------------------------------------------------------


def test_every_dtype_is_read_as_the_library_wrote_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        dtype.name: rng.integers(0, 2, (3, 5)).astype(dtype.numpy) for dtype in DTYPES.values()
    }
    save_file(tensors, tmp_path / "m.safetensors")
    source = SafetensorsFile(tmp_path / "m.safetensors")
    assert set(source.tensors) == set(DTYPES)
    for name, array in tensors.items():
        info = source.tensors[name]
        assert (info.dtype.name, info.shape, info.nbytes) == (name, (3, 5), array.nbytes)
        assert read(source, name).tobytes() == array.tobytes()


def test_any_range_of_elements_can_be_read(tmp_path: Path) -> None:
    values = np.arange(1000, dtype=np.float32).astype(ml_dtypes.bfloat16)
    save_file({"w": values.reshape(10, 100)}, tmp_path / "m.safetensors")
    source = SafetensorsFile(tmp_path / "m.safetensors")
    for start, stop in [(0, 1000), (0, 1), (999, 1000), (101, 577), (5, 5)]:
        assert read(source, "w", start, stop).tobytes() == values[start:stop].tobytes()


def test_empty_and_scalar_tensors_and_a_file_without_any(tmp_path: Path) -> None:
    tensors = {"s": np.array(3.0), "e": np.zeros((0, 4), np.float32), "t": np.zeros((2, 0), "i4")}
    save_file(tensors, tmp_path / "m.safetensors")
    source = SafetensorsFile(tmp_path / "m.safetensors")
    assert {k: v.shape for k, v in source.tensors.items()} == {"s": (), "e": (0, 4), "t": (2, 0)}
    assert read(source, "s").tolist() == [3.0]
    (tmp_path / "none.safetensors").write_bytes(raw_file({}))
    assert not SafetensorsFile(tmp_path / "none.safetensors").tensors


def test_metadata_is_kept_and_header_padding_ignored(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": entry(0, 4)}).encode() + b"   "
    (tmp_path / "m.safetensors").write_bytes(raw_file(header, bytes(4)))
    source = SafetensorsFile(tmp_path / "m.safetensors")
    assert source.metadata == {"format": "pt"}
    assert list(source.tensors) == ["w"]


def test_a_file_truncated_while_open_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": np.zeros(1000, np.float32)}, path)
    source = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="truncated after it had been opened"):
        read(source, "w")


def test_the_identity_changes_with_the_header_and_the_size(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    identities = []
    for name, size in [("a", 3), ("b", 3), ("a", 4)]:
        save_file({name: np.zeros(size, np.float32)}, path)
        identities.append(SafetensorsFile(path).identity())
    first, renamed, longer = identities
    assert first["header_xxh3"] != renamed["header_xxh3"]
    assert first["size"] + 4 == longer["size"]


# -- hostile files --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7])
def test_fewer_than_eight_bytes(tmp_path: Path, size: int) -> None:
    assert "expected at least 8" in refused(tmp_path, bytes(size))


@pytest.mark.parametrize("length", [3, 101, 10**9, 2**63, 2**64 - 1])
def test_absurd_header_lengths(tmp_path: Path, length: int) -> None:
    message = refused(tmp_path, raw_file(b"{}", length=length))
    assert f"a header of {length} bytes in a file of 10 bytes" in message


def test_a_huge_header_within_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)  # sparse
    with pytest.raises(CheckpointError, match="claims a header of 200000000 bytes"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"not JSON",
        b"{",
        b'{"w": }',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"w":' * 100_000,
        b'{"w": {"shape": [' + b"9" * 10_000 + b"]}}",
    ],
    ids=["empty", "text", "open", "no value", "not UTF-8", "deep list", "deep dict", "digits"],
)
def test_headers_that_are_not_json(tmp_path: Path, header: bytes) -> None:
    assert "the safetensors header is not JSON" in refused(tmp_path, raw_file(header))


@pytest.mark.parametrize("header", [[], 1, "text", None, [{"w": entry(0, 4)}]])
def test_headers_that_are_not_an_object(tmp_path: Path, header: object) -> None:
    assert "header is not a JSON object" in refused(tmp_path, raw_file(header))


def test_metadata_that_is_not_an_object(tmp_path: Path) -> None:
    assert "__metadata__" in refused(tmp_path, raw_file({"__metadata__": [1]}))


ODD_ENTRIES: dict[str, Any] = {
    "null": None,
    "number": 3,
    "text": "F32",
    "list": ["F32", [1], [0, 4]],
    "empty": {},
    "no dtype": {"shape": [1], "data_offsets": [0, 4]},
    "no shape": {"dtype": "F32", "data_offsets": [0, 4]},
    "no offsets": {"dtype": "F32", "shape": [1]},
    "one offset": {"dtype": "F32", "shape": [1], "data_offsets": [0]},
    "three offsets": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
    "offsets a number": {"dtype": "F32", "shape": [1], "data_offsets": 4},
    "offsets text": {"dtype": "F32", "shape": [1], "data_offsets": "04"},
    "offsets null": {"dtype": "F32", "shape": [1], "data_offsets": [None, None]},
    "shape null": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]},
    "shape text": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
    "shape of floats": entry(0, 4, [1.0]),
    "shape of booleans": entry(0, 4, [True]),
    "shape nested": entry(0, 4, [[1]]),
    "offsets floats": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]},
    "offsets booleans": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]},
    "not a number": {"dtype": "F32", "shape": [float("nan")], "data_offsets": [0, 4]},
    "dtype unknown": entry(0, 4, [1], "F31"),
    "dtype torch's name": entry(0, 4, [1], "float32"),
    "dtype null": entry(0, 4, [1], None),
    "dtype a list": entry(0, 4, [1], ["F32"]),
    "dtype an object": entry(0, 4, [1], {"F32": 1}),
    "negative shape": entry(0, 4, [-1]),
    "two negative dimensions": entry(0, 4, [-1, -1]),
    "negative begin": entry(-4, 0, [1]),
    "end before begin": entry(4, 0, [1]),
    "shape too large": entry(0, 4, [2]),
    "shape too small": entry(0, 4, []) | {"data_offsets": [0, 8]},
    "product beyond 64 bits": entry(0, 4, [2**32, 2**32, 2**32]),
    "product that wraps to the right size": entry(0, 4, [2**63, 2]),
    "product of thousands of digits": entry(0, 4, [10**4000, 10**4000]),
    "thousands of dimensions": entry(0, 4, [9] * 5000),
    "dtype of a thousand letters": entry(0, 4, [1], "F" * 1000),
    "zero-size with bytes": entry(0, 4, [0]),
}


@pytest.mark.parametrize("odd", ODD_ENTRIES.values(), ids=ODD_ENTRIES.keys())
def test_odd_entries_are_refused_by_tensor_name(tmp_path: Path, odd: Any) -> None:
    message = refused(tmp_path, raw_file({"odd.weight": odd}, bytes(4)))
    assert "tensor 'odd.weight'" in message


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' starts at byte .* overlap or leave a gap"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "overlap or leave a gap"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "'b' starts at byte .* overlap or leave a gap"),
        ({"a": entry(4, 8)}, 8, "'a' starts at byte .* overlap or leave a gap"),
        ({"a": entry(0, 8)}, 7, "truncated"),
        ({"a": entry(0, 8)}, 0, "truncated"),
        ({"a": entry(0, 2**62)}, 8, "truncated"),
        ({"a": entry(0, 8)}, 9, "trailing bytes"),
        ({}, 1, "trailing bytes"),
    ],
)
def test_tensors_must_fill_the_file_without_gap_or_overlap(
    tmp_path: Path, entries: dict[str, Any], data: int, message: str
) -> None:
    assert re.search(message, refused(tmp_path, raw_file(entries, bytes(data))))


@pytest.mark.parametrize("name", [b"\\ud800", b"w\\udc00x", b"\xed\xa0\x80"])
def test_names_that_are_no_text(tmp_path: Path, name: bytes) -> None:
    header = b'{"%s": %s}' % (name, json.dumps(entry(0, 4)).encode())
    assert "is no valid text" in refused(tmp_path, raw_file(header, bytes(4)))


def test_names_that_occur_twice(tmp_path: Path) -> None:
    text = json.dumps(entry(0, 4))
    header = f'{{"w": {text}, "w": {text}}}'.encode()
    assert "'w' occurs twice" in refused(tmp_path, raw_file(header, bytes(4)))
    header = b'{"w": {"dtype": "F32", "dtype": "F16", "shape": [1], "data_offsets": [0, 4]}}'
    assert "'dtype' occurs twice" in refused(tmp_path, raw_file(header, bytes(4)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_to_a_header_gets_past_the_checks(data: st.DataObject) -> None:
    """Whatever is changed: refused, or tensors that lie within the file and fill it."""
    header = bytearray(json.dumps({"a": entry(0, 8), "b": entry(8, 12)}).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    size = 8 + len(header) + 12
    try:
        extents, _ = parse_header(bytes(header), size, "file")
    except CheckpointError:
        return
    assert sum(end - begin for _, begin, end in extents.values()) == 12
    for info, begin, end in extents.values():
        assert 8 + len(header) <= begin <= end <= size
        assert end - begin == info.nbytes


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["dtype", "shape", "data_offsets", "w", "__metadata__"]),
                inner,
                max_size=3,
            )
        ),
        max_leaves=12,
    )
)
def test_arbitrary_json_is_refused_or_empty(header: Any) -> None:
    raw = json.dumps(header).encode()
    try:
        extents, _ = parse_header(raw, 8 + len(raw), "file")
    except CheckpointError:
        return
    assert all(begin == end for _, begin, end in extents.values())


# -- several files --------------------------------------------------------------------------------


def write_shards(folder: Path, weight_map: Any = None) -> Path:
    """Two shards and their index; returns the index."""
    folder.mkdir(exist_ok=True)
    save_file({"a": np.arange(3, dtype=np.float32)}, folder / "model-1.safetensors")
    save_file({"b": np.arange(4, dtype=np.float32)}, folder / "model-2.safetensors")
    index = folder / "model.safetensors.index.json"
    if weight_map is None:
        weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards_are_one_source(tmp_path: Path) -> None:
    source = open_sharded(write_shards(tmp_path / "m"))
    assert list(source.tensors) == ["a", "b"]
    assert read(source, "b", 1, 3).tolist() == [1.0, 2.0]
    assert source.where("b") == str(tmp_path / "m/model-2.safetensors")
    assert [f["path"].rsplit("/")[-1] for f in source.identity()["files"]] == [
        "model-1.safetensors",
        "model-2.safetensors",
    ]


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a/..", 3, None],
)
def test_an_index_may_not_point_out_of_its_folder(tmp_path: Path, shard: Any) -> None:
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "secret.safetensors")
    index = write_shards(tmp_path / "m", {"a": shard})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tmp_path / "m"))
    assert str(caught.value) == (
        f"{index}: tensor 'a' points to {shard!r}, expected a file name in this folder"
    )


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "m")
    (tmp_path / "m/model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard 'model-2\.safetensors' is missing") as caught:
        open_sharded(index)
    assert str(index) in str(caught.value)


def test_a_tensor_must_be_in_the_shard_the_index_names(tmp_path: Path) -> None:
    weight_map = {
        "a": "model-1.safetensors",
        "b": "model-2.safetensors",
        "c": "model-2.safetensors",
    }
    with pytest.raises(CheckpointError, match=r"tensor 'c' is not in 'model-2\.safetensors'"):
        open_sharded(write_shards(tmp_path / "m", weight_map))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "m")
    both = {"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}
    save_file(both, tmp_path / "m/model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'a' is in .*model-1.* again in .*model-2"):
        open_sharded(index)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": null}', b"\xff", b"[" * 100_000],
)
def test_indexes_that_are_none(tmp_path: Path, content: bytes) -> None:
    index = write_shards(tmp_path / "m")
    index.write_bytes(content)
    with pytest.raises(CheckpointError, match="'weight_map' object") as caught:
        open_checkpoint(str(tmp_path / "m"))
    assert str(index) in str(caught.value)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path / "m")
    path = tmp_path / "m/model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        open_checkpoint(str(tmp_path / "m"))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "a\0", "x" * 256, "é" * 128, "\ud800", 3]
)
def test_what_cannot_name_a_file_of_the_folder(name: object) -> None:
    assert not is_file_name(name)
    index = json.dumps({"weight_map": {"w": name}}).encode()
    with pytest.raises(CheckpointError, match="expected a file name in this folder"):
        read_index(index, "index")
    assert is_file_name("model-00001-of-00002.safetensors")
