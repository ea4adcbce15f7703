"""What strangers can hand us, as functions of bytes: each may refuse its input, never more."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from fusekit.checkpoint.folder import open_checkpoint
from fusekit.checkpoint.npz import NpzFile
from fusekit.checkpoint.pickles import PickleFile
from fusekit.checkpoint.safetensors import SafetensorsFile, read_index
from fusekit.checkpoint.source import TensorSource
from fusekit.engine.operands import choose_operands
from fusekit.errors import FusekitError
from fusekit.methods import find
from fusekit.recipe.schema import load_recipe
from fusekit.structure.upcycle import load_moe_recipe
from tests.checkpoint.zip_files import state_dict, storage, tensor, write_checkpoint

MAX_READ = 1 << 20


def _read(open_source: Callable[[Path], TensorSource], data: bytes) -> None:
    """Open a file of these bytes and read the tensors that it claims to hold."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            source = open_source(Path(file.name))
        except FusekitError:
            return
        try:
            for name, info in source.tensors.items():
                assert info.nbytes <= MAX_READ or info.nbytes <= len(data), "more than is there"
                buffer = np.empty(info.nbytes, np.uint8)
                source.read_into(name, 0, info.size, buffer.data)
        except FusekitError:
            pass
        finally:
            source.close()


def header(data: bytes) -> None:
    """A safetensors file."""
    _read(SafetensorsFile, data)


def pickle(data: bytes) -> None:
    """A PyTorch checkpoint whose pickle is these bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder) / "m.bin", data, {"0": np.zeros(6, np.float32)})
        _read(PickleFile, path.read_bytes())


def archive(data: bytes) -> None:
    """A ZIP archive, read as a PyTorch checkpoint and as a NumPy archive."""
    _read(PickleFile, data)
    _read(NpzFile, data)


def index(data: bytes) -> None:
    """An index of shards: the names in it stay in the folder."""
    try:
        found = read_index(data, "index")
    except FusekitError:
        return
    assert all("/" not in file and file not in {"", ".", ".."} for file in found.values())


def recipe(data: bytes) -> None:
    """A recipe of a merge, and one of a mixture."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yml"
        path.write_bytes(data)
        with contextlib.suppress(FusekitError):
            load_moe_recipe(path)
        with contextlib.suppress(FusekitError):
            parsed = load_recipe(path)
            choose_operands(parsed, find(parsed.merge_method))


def config(data: bytes) -> None:
    """A config.json beside good weights."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(SEEDS["header"][0])
        (Path(folder) / "config.json").write_bytes(data)
        checkpoint = open_checkpoint(folder)
        try:
            checkpoint.config()
        except FusekitError:
            pass
        finally:
            checkpoint.source.close()


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (header, pickle, archive, index, recipe, config)
}


def _header(content: object, data: bytes = b"") -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def _entry(begin: int, end: int, *shape: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _zip(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as made:
        for name, content in members:
            made.writestr(name, content)
    return file.getvalue()


def _npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, w=np.zeros((2, 3), np.float32))
    return file.getvalue()


_PLAIN = state_dict({"w": tensor(storage("0", 6), (2, 3), (3, 1))})

SEEDS: dict[str, list[bytes]] = {
    "header": [
        save({"w": np.zeros((2, 3), np.float32)}),
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 100_000_001) + b"{}",
        _header({"w": _entry(0, 24, 2, 3)}),
        _header({"w": _entry(-8, 16, 2, 3)}, bytes(24)),
        _header({"w": _entry(0, 2**62, 2**30, 2**30)}, bytes(8)),
        _header({"w": _entry(0, 0, *[2**31] * 60, 0)}),
        _header({"a": _entry(0, 8, 2), "b": _entry(4, 12, 2)}, bytes(12)),
        _header({"a": _entry(0, 8, 2), "b": _entry(16, 24, 2)}, bytes(24)),
        _header(b'{"w":' + b"[" * 5000),
        _header(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":1}', bytes(4)),
        _header({"w": _entry(0, 4, 1, dtype="F99")}, bytes(4)),
        _header({"__metadata__": [1], "w": _entry(0, 4, 1)}, bytes(4)),
        _header({"../../w": _entry(0, 4, True)}, bytes(4)),
    ],
    "pickle": [
        _PLAIN,
        b"",
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02" + b"(" * 5000 + b"t" * 5000 + b".",
        b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".",
        b"\x80\x02r\xff\xff\xff\x7f.",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        state_dict({"w": tensor(storage("0", 2**60), (2**30, 2**30), (2**30, 1))}),
        state_dict({"w": tensor(storage("../0", 6), (2, 3), (3, 1))}),
        state_dict({"w": tensor(storage("0", 6), (6,), (1,), offset=1)}),
    ],
    "archive": [
        _npz(),
        _zip(("archive/data.pkl", _PLAIN), ("archive/data/0", bytes(24))),
        _zip(("archive/data.pkl", bytes(1 << 20)), method=zipfile.ZIP_DEFLATED),
        _zip(("../../etc/w.npy", _npz())),
        _zip(("w.npy", b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 300)),
        b"PK\x05\x06" + bytes(18),
        b"PK\x03\x04",
    ],
    "index": [
        b'{"weight_map": {"w": "model.safetensors"}}',
        b'{"weight_map": {"w": "../model.safetensors"}}',
        b'{"weight_map": {"w": "/etc/passwd"}}',
        b'{"weight_map": {"w": ".."}}',
        b'{"weight_map": {"w": 3}}',
        b'{"weight_map": []}',
        b"[" * 5000,
    ],
    "recipe": [
        b"merge_method: linear\nmodels: [{model: a}]\n"
        b"parameters: {weight: [{filter: x, value: 1}]}",
        b"merge_method: ties\nbase_model: b\n"
        b"slices: [{sources: [{model: a, layer_range: [0, 2]}]}]",
        b"name: x\nmerge_method: linear\nmodels: [{model: x}]\n---\nmerge_method: linear\n",
        b"merge_method: slerp\n"
        b"modules: {a: {models: [{model: {model: {path: p}, lora: {path: q}}}]}}",
        b"base_model: a\nexperts: [{source_model: b, positive_prompts: [x]}]\ngate_mode: random",
        b"a: &a [*a]",
        b"merge_method: linear\nmodels: [{model: 2026-00-01}]",
        b"a: &a [1,1]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: &d [*c,*c]\ne: [*d,*d]",
        b"!!python/object/apply:os.system [ls]",
        b"? [1]\n: 2",
        b"merge_method: [1]\nmodels: {1: 2}",
        b"tokenizer: {tokens: 3}\nmerge_method: linear\nmodels: [{model: 2026-01-01}]",
        b"<<: 3",
    ],
    "config": [b"{}", b"[", b"3", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000],
}
"""The corpus: what is right, and every kind of wrong that is known."""
