"""PyTorch `.bin`/`.pt`/`.pth` checkpoints, read in place, without PyTorch, executing nothing.

Such a file is a ZIP of one pickle, which says how tensors lie in storages, and one stored member
per storage. The pickle goes through a reader that only builds data (see `unpickle`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusekit.checkpoint.archive import (
    ArchiveSource,
    LocalFile,
    Member,
    Placement,
    read_directory,
    row_major,
    stored_members,
)
from fusekit.checkpoint.dtypes import DTYPES, DType
from fusekit.checkpoint.safetensors import ShardedSource, read_index
from fusekit.checkpoint.shards import open_shards
from fusekit.checkpoint.source import TensorInfo
from fusekit.checkpoint.unpickle import MAX_PICKLE_BYTES, Constructor, Stateful, load_pickle
from fusekit.errors import CheckpointError

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth"})
PICKLE_INDEX_SUFFIX = ".bin.index.json"

CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "network", "params")
"""Keys under which training scripts keep the weights, in the order in which they are looked for."""

_MAX_DEPTH = 32
_MAX_ENTRIES = 2_000_000
_MAX_AXES = 64
_MAX_EXPANDED_ELEMENTS = 1 << 24

_STORAGE_TYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"


@dataclass(frozen=True, slots=True)
class _StorageType:
    """What a pickle says of a storage's elements: a dtype, or None for plain bytes."""

    dtype: DType | None


@dataclass(frozen=True, slots=True)
class _Storage:
    """A storage: the ZIP member's key, its element type, and how many elements it claims."""

    key: str
    dtype: DType | None
    count: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A view of a storage. `offset` and `strides` count elements of `dtype`."""

    storage: _Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Opaque:
    """A harmless value that is no tensor (a device, a tensor class, bytes)."""

    name: str


class PickleFile(ArchiveSource):
    """One PyTorch checkpoint in the ZIP format (`torch.save` since PyTorch 1.6).

    A dict of tensors is offered under its keys. Where the dict holds no tensor itself, the first
    of `CONTAINERS` that leads to tensors is opened instead, and what lies beside it is ignored;
    without one, nested dicts and lists are flattened with dots. `ignored` names what is left out.

    Raises:
        CheckpointError: not such a file, a pickle that wants anything but tensors and plain
            containers (named; nothing is executed), storages that are missing or shorter than
            the pickle says, views that leave their storage, big-endian files, the older formats.

    >>> source = PickleFile(Path("pytorch_model.bin"))              # doctest: +SKIP
    >>> source.read_into("lm_head.weight", 0, 1024, buffer)         # doctest: +SKIP
    """

    ignored: tuple[str, ...]

    def __init__(self, path: Path) -> None:
        file = LocalFile(path)
        try:
            _refuse_other_formats(file)
            directory = read_directory(file)
            members = stored_members(file, directory)
            folder = _archive_folder(file, members)
            tensors, ignored = _state_dict(_read_pickle(file, members, folder), file.label)
            placed = {
                name: _placed(name, tensor, members, folder, file.label)
                for name, tensor in tensors.items()
            }
        except BaseException:
            file.close()
            raise
        super().__init__(file, directory, placed)
        self.ignored = ignored


def open_pickle_index(index: Path) -> ShardedSource:
    """The checkpoint described by a `*.bin.index.json`.

    Raises:
        CheckpointError: a malformed index, a shard that is missing, names that are elsewhere.
    """
    weight_map = read_index(index.read_bytes(), str(index))
    for file in dict.fromkeys(weight_map.values()):
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index}: shard {file!r} is missing from {index.parent}")
    return open_shards(str(index.parent), weight_map, lambda file: PickleFile(index.parent / file))


def _refuse_other_formats(file: LocalFile) -> None:
    head = file.read(0, min(file.size, 512))
    if head[:4] == b"PK\x03\x04":
        return
    if head.startswith(_LEGACY_MAGIC) or head[257:262] == b"ustar":
        raise CheckpointError(
            f"{file.label}: written in PyTorch's format from before 1.6, which cannot be read in "
            "place; convert it: torch.save(torch.load(old, weights_only=True), new)"
        )
    raise CheckpointError(
        f"{file.label}: not a PyTorch checkpoint: expected a ZIP file, "
        f"found {head[:4].hex(' ') or 'an empty file'}"
    )


def _archive_folder(file: LocalFile, members: dict[str, Member]) -> str:
    """The one folder inside the archive, with its slash."""
    pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{file.label}: not a PyTorch checkpoint: expected one data.pkl in the ZIP file, "
            f"found {len(pickles)}"
        )
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in members:
        raise CheckpointError(
            f"{file.label}: a TorchScript archive, which holds a program; "
            "expected a state dict written by torch.save"
        )
    order = members.get(f"{folder}byteorder")
    if order is not None and order.end - order.begin <= 16:
        found = file.read(order.begin, order.end)
        if found != b"little":
            raise CheckpointError(f"{file.label}: byte order {found!r}, expected b'little'")
    return folder


def _read_pickle(file: LocalFile, members: dict[str, Member], folder: str) -> Any:
    member = members[f"{folder}data.pkl"]
    if member.end - member.begin > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{file.label}: data.pkl has {member.end - member.begin} bytes, "
            f"expected at most {MAX_PICKLE_BYTES}"
        )
    return load_pickle(file.read(member.begin, member.end), file.label, _NAMES, _storage)


def _storage(identifier: Any) -> _Storage:
    match identifier:
        case ("storage", _StorageType(dtype), str(key), str(), int(count)) if count >= 0:
            return _Storage(key, dtype, count)
    raise ValueError("a storage that is not described as PyTorch does")


def _ordered_dict(items: Any = ()) -> Stateful:
    pairs = Stateful()
    for key, value in items:
        if not isinstance(key, str):
            raise TypeError(f"a key of type {type(key).__name__}")
        pairs[key] = value
    return pairs


def _shape(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, tuple) or len(sizes) > _MAX_AXES:
        raise TypeError("sizes and strides must be short tuples")
    if any(type(size) is not int or not 0 <= size < 1 << 60 for size in sizes):
        raise ValueError("sizes and strides must be non-negative integers")
    return sizes


def _view(storage: Any, dtype: DType | None, offset: Any, sizes: Any, strides: Any) -> _Tensor:
    shape, steps = _shape(sizes), _shape(strides)
    if not isinstance(storage, _Storage) or dtype is None or len(shape) != len(steps):
        raise TypeError("expected a storage with a dtype, and as many strides as sizes")
    return _Tensor(storage, dtype, _shape((offset,))[0], shape, steps)


def _tensor_v2(
    storage: Any, offset: Any, sizes: Any, strides: Any, *_hooks_and_metadata: Any
) -> _Tensor:
    return _view(storage, getattr(storage, "dtype", None), offset, sizes, strides)


def _tensor_v3(
    storage: Any,
    offset: Any,
    sizes: Any,
    strides: Any,
    _gradient: Any,
    _hooks: Any,
    dtype: Any,
    *_metadata: Any,
) -> _Tensor:
    return _view(storage, dtype if isinstance(dtype, DType) else None, offset, sizes, strides)


def _parameter(tensor: Any, *_gradient_hooks_and_state: Any) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise TypeError(f"a parameter around a {type(tensor).__name__}")
    return tensor


def _tensor_with_attributes(build: Any, _class: Any, arguments: Any, _state: Any) -> Any:
    if not isinstance(build, Constructor) or not isinstance(arguments, tuple):
        raise TypeError("expected a function and its arguments")
    return _parameter(build.build(*arguments))


_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _shape,
    "torch.device": lambda *_: _Opaque("torch.device"),
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    # How protocol 2 writes bytes and sets: plain, and never tensors.
    "_codecs.encode": lambda _text, _encoding: _Opaque("bytes"),
    "__builtin__.set": lambda _items: _Opaque("set"),
}
_NAMES: dict[str, Any] = {name: Constructor(name, build) for name, build in _CONSTRUCTORS.items()}
_NAMES |= {f"torch.{name}": _StorageType(DTYPES[dtype]) for name, dtype in _STORAGE_TYPES.items()}
_NAMES |= dict.fromkeys(
    ("torch.storage.UntypedStorage", "torch.UntypedStorage"), _StorageType(None)
)
_NAMES |= {f"torch.{dtype.torch_name}": dtype for dtype in DTYPES.values()}
_NAMES |= {name: _Opaque(name) for name in ("torch.Tensor", "torch.nn.parameter.Parameter")}


def _state_dict(root: Any, label: str) -> tuple[dict[str, _Tensor], tuple[str, ...]]:
    """The tensors by name, and the names of everything else."""
    ignored: list[str] = []
    prefix = ""
    for _ in range(_MAX_DEPTH):
        if not isinstance(root, dict) or any(isinstance(v, _Tensor) for v in root.values()):
            break
        inner = next((key for key in CONTAINERS if _leads_to_tensors(root.get(key))), None)
        if inner is None:
            break
        ignored += [f"{prefix}{key}" for key in root if key != inner]
        prefix, root = f"{prefix}{inner}.", root[inner]
    if not isinstance(root, dict):
        raise CheckpointError(
            f"{label}: holds a {_described(root)}, expected a dict of tensors (a state dict)"
        )
    tensors: dict[str, _Tensor] = {}
    for name, value in _flattened(root, label):
        if not isinstance(value, _Tensor):
            ignored.append(f"{prefix}{name}")
        elif name in tensors:
            raise CheckpointError(f"{label}: two tensors are called {name!r} once flattened")
        else:
            tensors[name] = value
    if not tensors:
        raise CheckpointError(f"{label}: holds no tensors")
    return tensors, tuple(ignored)


def _leads_to_tensors(value: Any) -> bool:
    for _ in range(_MAX_DEPTH):
        if not isinstance(value, dict):
            return False
        if any(isinstance(item, _Tensor) for item in value.values()):
            return True
        value = next((item for item in value.values() if isinstance(item, dict)), None)
    return False


def _flattened(root: dict[Any, Any], label: str) -> Iterator[tuple[str, Any]]:
    """Leaves with dotted names, in file order. Shared containers unfold, so entries are counted."""
    pending: list[tuple[str, Any, int]] = [("", root, 0)]
    count = 0
    while pending:
        name, value, depth = pending.pop()
        if isinstance(value, dict):
            items = list(value.items())
        elif isinstance(value, (list, tuple)):
            items = list(enumerate(value))
        else:
            yield name, value
            continue
        count += len(items)
        if depth >= _MAX_DEPTH or count > _MAX_ENTRIES:
            raise CheckpointError(
                f"{label}: containers nested deeper than {_MAX_DEPTH} or holding more than "
                f"{_MAX_ENTRIES} entries"
            )
        start = f"{name}." if depth else ""
        pending += [(f"{start}{key}", item, depth + 1) for key, item in reversed(items)]


def _described(value: Any) -> str:
    return "single tensor" if isinstance(value, _Tensor) else type(value).__name__


def _placed(
    name: str, tensor: _Tensor, members: dict[str, Member], folder: str, label: str
) -> tuple[TensorInfo, Placement]:
    """Where a tensor's elements lie in the file, checked against its storage's bytes."""
    place = f"{label}: tensor {name!r}"
    storage, width = tensor.storage, tensor.dtype.itemsize
    member = members.get(f"{folder}data/{storage.key}")
    if member is None:
        raise CheckpointError(f"{place}: its storage {storage.key!r} is not in the file")
    claimed = storage.count * (storage.dtype.itemsize if storage.dtype else 1)
    held = member.end - member.begin
    if claimed > held:
        raise CheckpointError(
            f"{place}: its storage {storage.key!r} should have {claimed} bytes, it has {held}"
        )
    info = TensorInfo(name, tensor.dtype, tensor.shape)
    if info.size == 0:
        begin = member.begin
        return info, Placement(begin, begin, row_major(tensor.shape))
    last = tensor.offset + sum(
        (length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    if (last + 1) * width > claimed:
        raise CheckpointError(
            f"{place}: shape {list(tensor.shape)} with strides {list(tensor.strides)} reaches byte "
            f"{(last + 1) * width} of a storage of {claimed}"
        )
    if info.size > max(claimed // width, _MAX_EXPANDED_ELEMENTS):
        raise CheckpointError(
            f"{place}: an expanded view of {info.size} elements over a storage of "
            f"{claimed // width}, expected at most {_MAX_EXPANDED_ELEMENTS}"
        )
    return info, Placement(
        member.begin + tensor.offset * width, member.begin + claimed, tensor.strides
    )
