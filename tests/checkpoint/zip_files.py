"""Hand-made ZIP files and PyTorch pickles for the reader tests; needs no PyTorch."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fusekit.checkpoint.source import TensorSource


def read(source: TensorSource, name: str) -> np.ndarray:
    """A whole tensor as an array of its own type."""
    info = source.tensors[name]
    buffer = bytearray(info.nbytes)
    source.read_into(name, 0, info.size, memoryview(buffer))
    return np.frombuffer(buffer, info.dtype.numpy).reshape(info.shape)


def write_zip(
    path: Path, members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def global_name(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def storage(key: str, count: int, kind: str = "FloatStorage") -> bytes:
    parts = text("storage") + global_name("torch", kind) + text(key) + text("cpu") + number(count)
    return b"(" + parts + b"tQ"


def tensor(
    stored: bytes, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0
) -> bytes:
    rebuild = global_name("torch._utils", "_rebuild_tensor_v2")
    hooks = global_name("collections", "OrderedDict") + b")R"
    arguments = stored + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + hooks
    return rebuild + b"(" + arguments + b"tR"


def state_dict(items: Mapping[str, bytes]) -> bytes:
    body = b"".join(text(name) + value for name, value in items.items())
    return b"\x80\x02}(" + body + b"u."


def write_checkpoint(
    path: Path, pickle: bytes, storages: Mapping[str, np.ndarray] | None = None, **extra: bytes
) -> Path:
    members = {"archive/data.pkl": pickle, "archive/byteorder": b"little"}
    members |= {f"archive/data/{key}": array.tobytes() for key, array in (storages or {}).items()}
    members |= {f"archive/{name}": data for name, data in extra.items()}
    return write_zip(path, members)
