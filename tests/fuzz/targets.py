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

from fusekit.adapters import load_adapter
from fusekit.adapters.recipe import merges_adapters
from fusekit.checkpoint.folder import Checkpoint, open_checkpoint
from fusekit.checkpoint.memory import MemorySource
from fusekit.checkpoint.npz import NpzFile
from fusekit.checkpoint.pickles import PickleFile
from fusekit.checkpoint.pipelines import listed_parts, read_file
from fusekit.checkpoint.safetensors import SafetensorsFile, read_index
from fusekit.checkpoint.source import TensorSource
from fusekit.checkpoint.views import LoraSource
from fusekit.engine.explain import explain
from fusekit.engine.manifest import verify
from fusekit.engine.operands import choose_operands
from fusekit.engine.planner import plan, plan_checkpoints
from fusekit.errors import FusekitError
from fusekit.methods import find
from fusekit.recipe.schema import load_recipe
from fusekit.structure.upcycle import load_moe_recipe
from tests.checkpoint.zip_files import state_dict, storage, tensor, write_checkpoint
from tests.fuzz.structured import DOCUMENTS, as_bytes

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
    """An index of shards: the names in it stay in the folder, whose files are read through it."""
    try:
        found = read_index(data, "index")
    except FusekitError:
        return
    assert all("/" not in file and file not in {"", ".", ".."} for file in found.values())
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate("vw", start=1):
            path = Path(folder) / f"model-{number}.safetensors"
            path.write_bytes(save({name: np.zeros(6, np.float32)}))
        (Path(folder) / "model.safetensors.index.json").write_bytes(data)
        _open_and_close(folder)


def recipe(data: bytes) -> None:
    """A recipe of a merge, planned for small models, and one of a mixture."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yml"
        path.write_bytes(data)
        with contextlib.suppress(FusekitError):
            load_moe_recipe(path)
        with contextlib.suppress(FusekitError):
            parsed = load_recipe(path)
            if merges_adapters(parsed):
                return
            method = find(parsed.merge_method)
            operands = choose_operands(parsed, method)
            opened = [Checkpoint(name, MemorySource(MODEL)) for name in operands.models()[:50]]
            if len(opened) == len(operands.models()):
                explain(plan_checkpoints(parsed, method, operands, opened))


def config(data: bytes) -> None:
    """A config.json of a model whose layers are stacked anew."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(save(MODEL))
        (Path(folder) / "config.json").write_bytes(data)
        model = {"model": folder}
        slices = [{"sources": [{**model, "layer_range": each}]} for each in ([0, 3], [1, 2])]
        for what in ({"slices": slices}, {"models": [model]}):
            with contextlib.suppress(FusekitError):
                plan({"merge_method": "passthrough", "out_dtype": "float16", **what}).close()


def _write_files(data: bytes, folder: Path) -> bool:
    """Write the files that a JSON object of their contents by name describes."""
    try:
        files = json.loads(data)
    except (ValueError, RecursionError):
        return False
    if not isinstance(files, dict):
        return False
    for name, content in files.items():
        if name in FILES:
            (folder / name).write_bytes(json.dumps(content).encode("utf-8", "surrogatepass"))
    return True


def pipeline(data: bytes) -> None:
    """The files that name a pipeline's parts: no part is outside of the folder."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "m"
        (folder / "unet").mkdir(parents=True)
        (folder / "unet/model.safetensors").write_bytes(save({"w": np.zeros(6, np.float32)}))
        if _write_files(data, folder):
            _open_and_close(str(folder))
            with contextlib.suppress(FusekitError):
                for part in listed_parts(lambda name: read_file(folder / name), "m"):
                    assert (folder / part).resolve().parent == folder.resolve()
                    (folder / part).mkdir(exist_ok=True)


def tokenizer(data: bytes) -> None:
    """A tokenizer that is merged with a good one, and kept as it is."""
    with tempfile.TemporaryDirectory() as place:
        for name in "ab":
            (Path(place) / name).mkdir()
            (Path(place) / name / "model.safetensors").write_bytes(save(MODEL))
        good = {"tokenizer.json": {"model": {"type": "BPE", "vocab": {"a": 0, "z": 1}}}}
        _write_files(json.dumps(good).encode(), Path(place) / "a")
        if not _write_files(data, Path(place) / "b"):
            return
        models = [{"model": f"{place}/{name}"} for name in "ab"]
        content = {"merge_method": "linear", "parameters": {"weight": 1.0}}
        for ordered in (models, models[::-1]):
            for source in ("union", "base"):
                with contextlib.suppress(FusekitError):
                    plan(
                        {
                            **content,
                            "models": ordered,
                            "tokenizer_source": source,
                            "chat_template": "auto",
                        }
                    ).close()


def adapter(data: bytes) -> None:
    """An adapter's config beside good factors."""
    name = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {
        f"{name}.lora_A.weight": np.ones((2, 4), np.float32),
        f"{name}.lora_B.weight": np.ones((4, 2), np.float32),
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "adapter_model.safetensors").write_bytes(save(factors))
        (Path(folder) / "adapter_config.json").write_bytes(data)
        with contextlib.suppress(FusekitError):
            base = MemorySource(MODEL)
            source = LoraSource(base, load_adapter(folder, base.tensors))
            for info in source.tensors.values():
                buffer = np.empty(info.nbytes, np.uint8)
                source.read_into(info.name, 0, info.size, buffer.data)


def manifest(data: bytes) -> None:
    """The manifest of an output that is verified."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(SEEDS["header"][0])
        (Path(folder) / "manifest.json").write_bytes(data)
        with contextlib.suppress(FusekitError):
            verify(folder)


def _open_and_close(folder: str) -> None:
    with contextlib.suppress(FusekitError):
        checkpoint = open_checkpoint(folder)
        checkpoint.config()
        checkpoint.parts()
        checkpoint.companions()
        checkpoint.source.close()


MODEL = {
    "model.embed_tokens.weight": np.zeros((8, 4), np.float32),
    **{f"model.layers.{i}.mlp.up_proj.weight": np.zeros((4, 4), np.float32) for i in range(3)},
    **{f"model.layers.{i}.self_attn.q.weight": np.zeros((4, 4), np.float32) for i in range(3)},
    "model.norm.weight": np.zeros(4, np.float32),
    "lm_head.weight": np.zeros((8, 4), np.float32),
}
"""A model that everything can be planned with."""

FILES = {name for documents in DOCUMENTS.values() for each in documents for name in each}
"""Names of files that documents describe."""

TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        header,
        pickle,
        archive,
        index,
        recipe,
        config,
        pipeline,
        tokenizer,
        adapter,
        manifest,
    )
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
for _name, _documents in DOCUMENTS.items():
    SEEDS.setdefault(_name, []).extend(map(as_bytes, _documents))
