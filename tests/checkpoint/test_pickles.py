"""PyTorch ZIP checkpoints: real ones, hand-made ones, hostile ones."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.checkpoint import archive
from fusekit.checkpoint.pickles import PickleFile, open_pickle_index
from fusekit.checkpoint.unpickle import MAX_PICKLE_BYTES, load_pickle
from fusekit.errors import CheckpointError
from tests.checkpoint.zip_files import (
    global_name,
    number,
    read,
    state_dict,
    storage,
    tensor,
    text,
    write_checkpoint,
    write_zip,
)

VALUES = np.arange(12, dtype=np.float32)
PLAIN = state_dict({"w": tensor(storage("0", 12), (3, 4), (4, 1))})


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        PickleFile(path)
    message = str(caught.value)
    assert str(path) in message
    return message


# ---- what is offered --------------------------------------------------------------------------


def test_views_of_one_storage_are_read_with_their_offsets_and_strides(tmp_path: Path) -> None:
    stored = storage("0", 12)
    items = {
        "plain": tensor(stored, (3, 4), (4, 1)),
        "transposed": tensor(stored, (4, 3), (1, 4)),
        "row": tensor(stored, (4,), (1,), offset=4),
        "column": tensor(stored, (3,), (4,), offset=1),
        "expanded": tensor(stored, (2, 3), (0, 1), offset=2),
        "single": tensor(stored, (1, 4), (99, 1)),
        "scalar": tensor(stored, (), (), offset=5),
        "empty": tensor(stored, (0, 4), (4, 1)),
    }
    source = PickleFile(write_checkpoint(tmp_path / "a.pt", state_dict(items), {"0": VALUES}))
    matrix = VALUES.reshape(3, 4)
    expected = {
        "plain": matrix,
        "transposed": matrix.T,
        "row": matrix[1],
        "column": matrix[:, 1],
        "expanded": np.stack([VALUES[2:5]] * 2),
        "single": matrix[:1],
        "scalar": VALUES[5].reshape(()),
        "empty": np.zeros((0, 4), np.float32),
    }
    assert list(source.tensors) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(read(source, name), array)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_range_of_a_strided_tensor_equals_the_gathered_array(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)))
    axes = data.draw(st.permutations(range(len(shape))))
    skip = data.draw(st.integers(1, 3))
    kind, dtype = data.draw(
        st.sampled_from([("HalfStorage", "f2"), ("DoubleStorage", "f8"), ("ByteStorage", "u1")])
    )
    stored = np.arange(np.prod(shape) * skip).astype(dtype)
    view = stored[::skip].reshape(shape).transpose(axes)
    strides = tuple(step // stored.itemsize for step in view.strides)
    path = tmp_path_factory.mktemp("strided") / "a.pt"
    body = tensor(storage("0", stored.size, kind), view.shape, strides)
    write_checkpoint(path, state_dict({"w": body}), {"0": stored})
    start = data.draw(st.integers(0, view.size))
    stop = data.draw(st.integers(start, view.size))
    old = archive._PANEL_ELEMENTS
    archive._PANEL_ELEMENTS = data.draw(st.sampled_from([1, 7, 64, old]))
    try:
        source = PickleFile(path)
        out = bytearray((stop - start) * stored.itemsize)
        source.read_into("w", start, stop, memoryview(out))
    finally:
        archive._PANEL_ELEMENTS = old
    np.testing.assert_array_equal(np.frombuffer(out, dtype), view.reshape(-1)[start:stop])


def test_a_training_checkpoint_offers_its_weights_and_lists_the_rest(tmp_path: Path) -> None:
    weights = tensor(storage("0", 12), (12,), (1,))
    moments = b"}(" + text("m") + weights + b"u"
    inner = b"}(" + text("w") + weights + text("version") + number(3) + b"u"
    body = {"epoch": number(7), "optimizer": moments, "model_state_dict": inner}
    path = write_checkpoint(tmp_path / "a.pt", state_dict(body), {"0": VALUES})
    source = PickleFile(path)
    assert list(source.tensors) == ["w"]
    assert source.ignored == ("epoch", "optimizer", "model_state_dict.version")


def test_nested_dicts_without_a_known_container_are_flattened_with_dots(tmp_path: Path) -> None:
    weights = tensor(storage("0", 12), (12,), (1,))
    inner = b"}(" + text("w") + weights + text("list") + b"](" + weights + b"e" + b"u"
    path = write_checkpoint(tmp_path / "a.pt", state_dict({"unet": inner}), {"0": VALUES})
    assert list(PickleFile(path).tensors) == ["unet.w", "unet.list.0"]


def test_names_that_collide_once_flattened_are_refused(tmp_path: Path) -> None:
    weights = tensor(storage("0", 12), (12,), (1,))
    body = {"a.b": weights, "a": b"}(" + text("b") + weights + b"u"}
    message = refused(write_checkpoint(tmp_path / "a.pt", state_dict(body), {"0": VALUES}))
    assert "two tensors are called 'a.b'" in message


def test_sharded_checkpoint_is_opened_through_its_index(tmp_path: Path) -> None:
    for shard, name in (("x.bin", "a"), ("y.bin", "b")):
        body = state_dict({name: tensor(storage("0", 12), (3, 4), (4, 1))})
        write_checkpoint(tmp_path / shard, body, {"0": VALUES})
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.bin", "b": "y.bin"}}))
    source = open_pickle_index(index)
    np.testing.assert_array_equal(read(source, "b"), VALUES.reshape(3, 4))
    assert source.where("b") == str(tmp_path / "y.bin")

    index.write_text(json.dumps({"weight_map": {"a": "y.bin", "b": "y.bin"}}))
    with pytest.raises(CheckpointError, match=r"tensor 'a' is not in 'y\.bin'"):
        open_pickle_index(index)
    index.write_text(json.dumps({"weight_map": {"a": "z.bin"}}))
    with pytest.raises(CheckpointError, match=r"shard 'z\.bin' is missing"):
        open_pickle_index(index)
    index.write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    with pytest.raises(CheckpointError, match="expected a file name in this folder"):
        open_pickle_index(index)


def test_identity_changes_with_the_contents(tmp_path: Path) -> None:
    first = PickleFile(write_checkpoint(tmp_path / "a.pt", PLAIN, {"0": VALUES})).identity()
    os.utime(tmp_path / "a.pt", ns=(0, first["modified_ns"]))
    write_checkpoint(tmp_path / "a.pt", PLAIN, {"0": VALUES + 1})
    second = PickleFile(tmp_path / "a.pt").identity()
    assert first["size"] == second["size"]
    assert first["directory_xxh3"] != second["directory_xxh3"]


def test_file_truncated_after_opening_is_noticed_on_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.pt", PLAIN, {"0": VALUES})
    source = PickleFile(path)
    os.truncate(path, 40)
    with pytest.raises(CheckpointError, match="truncated after it had been opened"):
        read(source, "w")


# ---- hostile pickles --------------------------------------------------------------------------


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda marker: Call(os.system, f"touch {marker}"), f"{os.name}.system"),
        (lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"), "eval"),
        (lambda marker: Call(exec, f"open({str(marker)!r}, 'w')"), "exec"),
        (lambda marker: Call(open, str(marker), "w"), "io.open"),
        (lambda marker: {"w": [({}, Call(getattr, Call(__import__, "os"), "system"))]}, "getattr"),
        (lambda marker: OrderedDict(w=Call(os.mkdir, str(marker))), f"{os.name}.mkdir"),
    ],
)
def test_code_in_a_pickle_is_named_and_not_executed(
    tmp_path: Path, make: Any, named: str, protocol: int
) -> None:
    marker = tmp_path / "executed"
    body = pickle.dumps(make(marker), protocol=protocol)
    message = refused(write_checkpoint(tmp_path / "a.pt", body))
    assert named in message
    assert "nothing was executed" in message
    assert not marker.exists()


def test_numpy_objects_are_refused_by_name(tmp_path: Path) -> None:
    body = pickle.dumps({"w": VALUES}, protocol=2)
    assert "multiarray._reconstruct'" in refused(write_checkpoint(tmp_path / "a.pt", body))


ORDERED = global_name("collections", "OrderedDict")
REBUILD = global_name("torch._utils", "_rebuild_tensor_v2")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (REBUILD + b"}b.", "applies BUILD to Constructor"),
        (ORDERED + b"}\x86}b.", "applies BUILD to tuple"),
        (global_name("torch", "FloatStorage") + b"}b.", "applies BUILD to _StorageType"),
        (ORDERED + b")\x81.", "creates objects (NEWOBJ)"),
        (ORDERED + b")}\x92.", "creates objects (NEWOBJ_EX)"),
        (b"(ios\nsystem\n.", "creates objects (INST)"),
        (b"(" + ORDERED + b"o.", "creates objects (OBJ)"),
        (b"\x82\x01.", "creates objects (EXT1)"),
        (text("print") + b")R.", "calls a str"),
        (global_name("torch", "FloatStorage") + b")R.", "calls a _StorageType"),
        (REBUILD + b")R.", "torch._utils._rebuild_tensor_v2: unexpected arguments"),
        (REBUILD + b"}R.", "without a tuple of arguments"),
        (ORDERED + b"((" + b"NNttR.", "collections.OrderedDict: unexpected arguments"),
        (global_name("torch", "Size") + text("x") + b"\x85\x85R.", "non-negative integers"),
        (b"}()Nu.", "a key of type tuple"),
        (b"}NN\x86N" + b"s.", "a key of type tuple"),
        (b"}(Nu.", "a key without a value"),
        (b"NNs.", "applies SETITEM to nothing"),
        (b"(0.", "nothing on the stack"),
        (b"N.", "holds a NoneType"),
        (b"].", "holds a list"),
        (b"}.", "holds no tensors"),
        (b"u.", "no mark on the stack"),
        (b"h\x07.", "nothing remembered under 7"),
        (b"N" + b"r\xff\xff\xff\xff" + b".", "holds a NoneType"),
        (b"X\xff\xff\xff\xffabc", "cut short"),
        (b"\x8e" + b"\xff" * 8, "cut short"),
        (b"\x8b\xff\xff\xff\xff.", "cut short"),
        (b"X\x01\x00\x00\x00\xff.", "not UTF-8"),
        (b"cos", "cut short"),
        (b"NN\x93.", "a name that is not text"),
        (text("os") + text("system") + b"\x93.", "'os.system'"),
        (b"NQ.", "not described as PyTorch does"),
        (b"I1\n.", "unsupported pickle operation b'I'"),
        (b"\x97.", "unsupported pickle operation"),
        (b"", "cut short"),
    ],
)
def test_malformed_and_hostile_pickles_are_refused(
    tmp_path: Path, body: bytes, problem: str
) -> None:
    assert problem in refused(write_checkpoint(tmp_path / "a.pt", b"\x80\x02" + body))


def test_text_protocols_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.pt", b"\x80\x01}.")
    assert "pickle protocol 1, expected 2 to 5" in refused(path)


def test_containers_that_unfold_or_hold_themselves_are_refused(tmp_path: Path) -> None:
    bomb = b"](NNe" + b"q\x000](h\x00h\x00h\x00h\x00e" * 30
    assert "nested deeper" in refused(write_checkpoint(tmp_path / "a.pt", state_dict({"w": bomb})))
    itself = b"\x80\x02}q\x00(" + text("w") + b"h\x00u."
    assert "nested deeper" in refused(write_checkpoint(tmp_path / "b.pt", itself))


def test_deep_nesting_does_not_exhaust_the_interpreter(tmp_path: Path) -> None:
    body = b"\x80\x02" + b")" + b"\x85" * 200_000 + b"."
    assert "holds a tuple" in refused(write_checkpoint(tmp_path / "a.pt", body))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, len(PLAIN) - 1))
def test_any_bytes_give_data_or_a_refusal(noise: bytes, position: int) -> None:
    for raw in (b"\x80\x02" + noise, PLAIN[:position] + noise + PLAIN[position + len(noise) :]):
        try:
            load_pickle(raw, "noise", {}, lambda _: None)
        except CheckpointError as error:
            assert str(error).startswith("noise: ")


# ---- hostile storages -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (tensor(storage("1", 12), (3, 4), (4, 1)), "its storage '1' is not in the file"),
        (tensor(storage("../data.pkl", 1), (1,), (1,)), "is not in the file"),
        (tensor(storage("0", 13), (13,), (1,)), "should have 52 bytes, it has 48"),
        (tensor(storage("0", 1 << 60), (1,), (1,)), "it has 48"),
        (tensor(storage("0", 12), (3, 4), (5, 1)), "reaches byte 56 of a storage of 48"),
        (tensor(storage("0", 12), (1 << 58, 1 << 58), (1, 1)), "reaches byte"),
        (tensor(storage("0", 12), (1 << 40,), (0,)), "expanded view of 1099511627776 elements"),
        (tensor(storage("0", 12), (4,), (1,), offset=9), "reaches byte 52"),
        (tensor(storage("0", 12), (4,), (1,), offset=-1), "non-negative"),
        (tensor(storage("0", 12), (-3, 4), (4, 1)), "non-negative"),
        (tensor(storage("0", 12), (3, 4), (-4, 1)), "non-negative"),
        (tensor(storage("0", 12), (3, 4), (4,)), "as many strides as sizes"),
        (tensor(storage("0", -1), (0,), (1,)), "not described as PyTorch does"),
        (tensor(storage("0", 12, "ComplexFloatStorage"), (3,), (1,)), "torch.ComplexFloatStorage"),
        (tensor(storage("0", 12, "QInt8Storage"), (3,), (1,)), "torch.QInt8Storage"),
    ],
)
def test_tensors_outside_their_storage_are_refused(
    tmp_path: Path, body: bytes, problem: str
) -> None:
    path = write_checkpoint(tmp_path / "a.pt", state_dict({"w": body}), {"0": VALUES})
    assert problem in refused(path)


# ---- hostile ZIP files ------------------------------------------------------------------------


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    zeros = np.zeros(1 << 20, np.uint8).tobytes()
    members = {"archive/data.pkl": PLAIN, "archive/data/0": zeros}
    path = write_zip(tmp_path / "bomb.pt", members, zipfile.ZIP_DEFLATED)
    assert "'archive/data.pkl' is compressed (method 8)" in refused(path)


def test_older_formats_and_other_files_are_told_apart(tmp_path: Path) -> None:
    legacy = tmp_path / "old.pt"
    legacy.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + b"rest")
    assert "from before 1.6" in refused(legacy)
    tar = tmp_path / "tar.pt"
    tar.write_bytes(b"x" * 257 + b"ustar" + bytes(300))
    assert "from before 1.6" in refused(tar)
    other = tmp_path / "other.pt"
    other.write_bytes(b"hello")
    assert "expected a ZIP file, found 68 65 6c 6c" in refused(other)
    other.write_bytes(b"")
    assert "found an empty file" in refused(other)
    assert "cannot be opened" in refused(tmp_path / "absent.pt")


def test_torchscript_and_other_zips_are_told_apart(tmp_path: Path) -> None:
    script = write_checkpoint(
        tmp_path / "script.pt", PLAIN, {"0": VALUES}, **{"constants.pkl": b""}
    )
    assert "TorchScript" in refused(script)
    assert "found 0" in refused(write_zip(tmp_path / "a.zip", {"readme": b""}))
    two = {"a/data.pkl": PLAIN, "b/data.pkl": PLAIN}
    assert "found 2" in refused(write_zip(tmp_path / "b.zip", two))


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    members = {"a/data.pkl": PLAIN, "a/byteorder": b"big", "a/data/0": VALUES.tobytes()}
    assert "byte order b'big'" in refused(write_zip(tmp_path / "a.pt", members))


def test_oversized_pickle_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    size = MAX_PICKLE_BYTES + 1
    write_sparse_zip(path, "archive/data.pkl", size, zip64=False)
    assert f"data.pkl has {size} bytes" in refused(path)


def write_sparse_zip(path: Path, name: str, size: int, *, zip64: bool) -> None:
    """One stored member of zeros (a hole in the file), with 64-bit records on request."""
    raw = name.encode()
    small = 0xFFFFFFFF if zip64 else size
    extra = struct.pack("<2H3Q", 1, 24, size, size, 0) if zip64 else b""
    with path.open("wb") as file:
        file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 0, 0, 0, 0, len(raw), 0) + raw)
        file.seek(size, os.SEEK_CUR)
        begin = file.tell()
        offset = 0xFFFFFFFF if zip64 else 0
        fields = (45, 45, 0, 0, 0, 0, 0, small, small, len(raw), len(extra), 0, 0, 0, 0, offset)
        entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields) + raw + extra
        file.write(entry)
        if zip64:
            record = (44, 45, 45, 0, 0, 1, 1, len(entry), begin)
            file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", *record))
            file.write(struct.pack("<4sLQL", b"PK\6\7", 0, begin + len(entry), 1))
        end = (0, 0, 1, 1, len(entry), 0xFFFFFFFF if zip64 else begin, 0)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", *end))


def test_members_beyond_4_gib_are_found_through_64_bit_records(tmp_path: Path) -> None:
    path = tmp_path / "big.pt"
    write_sparse_zip(path, "archive/data/0", 5 << 30, zip64=True)
    file = archive.LocalFile(path)
    members = archive.stored_members(file, archive.read_directory(file))
    member = members["archive/data/0"]
    assert member.end - member.begin == 5 << 30
    assert member.begin == 30 + len("archive/data/0")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path: Path, keep: float) -> None:
    path = write_checkpoint(tmp_path / "a.pt", PLAIN, {"0": VALUES})
    os.truncate(path, max(4, int(path.stat().st_size * keep)))
    assert "truncated" in refused(path) or "damaged" in refused(path)


def patched(path: Path, find: bytes, offset: int, layout: str, value: int) -> Path:
    """Overwrite a field at `offset` from the last occurrence of `find`."""
    raw = bytearray(path.read_bytes())
    struct.pack_into(layout, raw, raw.rindex(find) + offset, value)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("find", "offset", "layout", "value", "problem"),
    [
        (b"PK\5\6", 16, "<L", 1 << 30, "is said to lie at bytes"),
        (b"PK\5\6", 12, "<L", (1 << 26) + 1, "expected at most"),
        (b"PK\1\2", 8, "<H", 1, "is encrypted"),
        (b"PK\1\2", 10, "<H", 8, "is compressed"),
        (b"PK\1\2", 20, "<L", 47, "47 bytes stored, 48 claimed"),
        (b"PK\1\2", 24, "<L", 0xFFFFFFFF, "ZIP64 sizes are missing"),
        (b"PK\1\2", 28, "<H", 60000, "cut short"),
        (b"PK\1\2", 42, "<L", 1 << 31, "its header is said to lie at byte"),
        (b"PK\1\2", 42, "<L", 0, "disagrees with the directory"),
        (b"PK\1\2", 0, "<L", 0, "expected a directory entry"),
        (b"PK\3\4", 26, "<H", 5, "disagrees with the directory"),
        (b"PK\3\4", 28, "<H", 60000, "is said to lie at bytes"),
    ],
)
def test_lying_directories_are_refused(
    tmp_path: Path, find: bytes, offset: int, layout: str, value: int, problem: str
) -> None:
    path = write_checkpoint(tmp_path / "a.pt", PLAIN, {"0": VALUES})
    assert problem in refused(patched(path, find, offset, layout, value))


def test_members_on_top_of_each_other_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.pt", PLAIN, {"0": VALUES})
    patched(path, b"PK\1\2", 20, "<L", 100)
    patched(path, b"PK\1\2", 24, "<L", 100)
    inner = VALUES.tobytes() + bytes(200)
    header = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 8, 8, 1, 0) + b"x"
    nested = write_zip(tmp_path / "b.pt", {"a": inner[:40] + header + inner[40:], "x": b"12345678"})
    patched(nested, b"PK\1\2", 42, "<L", 31 + 40)
    assert "lie on top of each other" in refused(nested)


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive_file, pytest.warns(UserWarning, match="Duplicate"):
        archive_file.writestr("a/data.pkl", PLAIN)
        archive_file.writestr("a/data.pkl", PLAIN)
    assert "'a/data.pkl' occurs twice" in refused(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_file_gives_the_tensor_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damage") / "a.pt"
    raw = bytearray(write_checkpoint(path, PLAIN, {"0": VALUES}).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        source = PickleFile(path)
    except CheckpointError:
        return
    for name, info in source.tensors.items():
        assert info.nbytes <= len(raw)
        read(source, name)


def test_directory_hash_covers_member_checksums(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.pt", PLAIN, {"0": VALUES})
    file = archive.LocalFile(path)
    assert struct.pack("<L", zlib.crc32(VALUES.tobytes())) in archive.read_directory(file)
