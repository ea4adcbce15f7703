"""Local safetensors files, single or sharded with an index, read by position.

The format: 8 bytes of little-endian header length, a JSON header, then the tensors' bytes without
gaps. Everything a header claims is checked by arithmetic against the file's size before any of it
is believed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fusekit.checkpoint.dtypes import DTYPES
from fusekit.checkpoint.source import TensorInfo, TensorSource
from fusekit.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit on the header, in bytes."""

MAX_DIMENSIONS = 64
"""As NumPy and PyTorch have it. Keeps hostile shapes from being expensive to multiply out."""

INDEX_SUFFIX = ".safetensors.index.json"
_LONGEST_NAME = 255

Extent = tuple[TensorInfo, int, int]
"""A tensor with its absolute byte range `[begin, end)` in the file."""


def header_length(prefix: bytes, file_size: int, label: str) -> int:
    """The header's length from the file's first 8 bytes, checked against the file's size."""
    if len(prefix) < 8:
        raise CheckpointError(
            f"{label}: not a safetensors file: {len(prefix)} bytes, expected at least 8"
        )
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES or length > file_size - 8:
        raise CheckpointError(
            f"{label}: not a safetensors file, or truncated: it claims a header of {length} bytes "
            f"in a file of {file_size} bytes"
        )
    return length


def parse_header(
    raw: bytes, file_size: int, label: str
) -> tuple[dict[str, Extent], dict[str, str]]:
    """Tensors (in file order) and metadata from a header's JSON.

    Args:
        raw: the header, without its 8-byte length.
        file_size: size of the whole file in bytes.
        label: what error messages call the file.

    Raises:
        CheckpointError: malformed JSON, duplicate names, unknown dtypes, sizes that do not follow
            from shape and dtype, gaps, overlaps, or tensors beyond the end of the file.
    """
    try:
        entries = json.loads(raw, object_pairs_hook=lambda pairs: _unique(pairs, label))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label}: the safetensors header is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{label}: the safetensors header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{label}: __metadata__ in the header is not a JSON object")

    if b"\\u" in raw or not raw.isascii():
        _refuse_broken_names(entries, label)
    data_start = 8 + len(raw)
    extents = [_extent(name, entry, data_start, label) for name, entry in entries.items()]
    extents.sort(key=lambda extent: (extent[1], extent[2]))
    position = data_start
    for info, begin, end in extents:
        if begin != position:
            raise CheckpointError(
                f"{label}: tensor {info.name!r} starts at byte {begin}, expected {position}: "
                "tensors overlap or leave a gap"
            )
        position = end
    if position != file_size:
        raise CheckpointError(
            f"{label}: the header describes {position} bytes, the file has {file_size}: "
            + ("truncated" if position > file_size else "trailing bytes")
        )
    return {info.name: (info, begin, end) for info, begin, end in extents}, {
        str(key): str(value) for key, value in metadata.items()
    }


def _refuse_broken_names(names: Iterable[str], label: str) -> None:
    """JSON can escape halves of characters, which no other text can hold."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"{label}: the tensor name {name!a} is no valid text") from None


def _unique(pairs: list[tuple[str, Any]], label: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise CheckpointError(f"{label}: {twice!r} occurs twice in the header")
    return found


def _extent(name: str, entry: Any, data_start: int, label: str) -> Extent:
    place = f"{label}: tensor {name!r}"
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        shape = tuple(shape)
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{place}: expected dtype, shape and two data_offsets") from None
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        known = ", ".join(DTYPES)
        raise CheckpointError(
            f"{place}: dtype {dtype_name!r:.40} is not supported (known: {known})"
        )
    if len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(
            f"{place}: {len(shape)} dimensions, expected at most {MAX_DIMENSIONS}"
        )
    numbers = (*shape, begin, end)
    if set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) >= 2**63:
        raise CheckpointError(f"{place}: shape and offsets must be non-negative 64-bit integers")
    dtype = DTYPES[dtype_name]
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{place}: shape {list(shape)} of {dtype_name} needs {expected} bytes, "
            f"its offsets span {end - begin}"
        )
    return TensorInfo(name, dtype, shape), data_start + begin, data_start + end


class SafetensorsFile(TensorSource):
    """One local `.safetensors` file.

    >>> source = SafetensorsFile(Path("model.safetensors"))        # doctest: +SKIP
    >>> source.read_into("lm_head.weight", 0, 1024, buffer)         # doctest: +SKIP
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = str(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            self._stat = os.fstat(self._fd)
            size = self._stat.st_size
            length = header_length(os.pread(self._fd, 8, 0), size, self.label)
            self._header = os.pread(self._fd, length, 8)
            self._extents, self.metadata = parse_header(self._header, size, self.label)
        except OSError as error:
            os.close(self._fd)
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        except BaseException:
            os.close(self._fd)
            raise
        self._tensors = {name: extent[0] for name, extent in self._extents.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read_into(self, name: str, start: int, stop: int, out: memoryview) -> None:
        try:
            self._read(name, start, out)
        except OSError as error:
            raise CheckpointError(
                f"{self.label}: tensor {name!r}: cannot be read: {error.strerror}"
            ) from None

    def _read(self, name: str, start: int, out: memoryview) -> None:
        info, begin, _ = self._extents[name]
        position = begin + start * info.dtype.itemsize
        done = os.preadv(self._fd, [out], position)
        while done < len(out):  # a signal or a slow file system may return less than asked
            more = os.preadv(self._fd, [out[done:]], position + done)
            if more == 0:
                raise CheckpointError(
                    f"{self.label}: tensor {name!r}: the file ended at byte {position + done}; "
                    "it was truncated after it had been opened"
                )
            done += more

    def prefetch(self, name: str, start: int, stop: int) -> None:
        if not hasattr(os, "posix_fadvise") or stop == start:
            return
        info, begin, _ = self._extents[name]
        first, end = (begin + position * info.dtype.itemsize for position in (start, stop))
        if not (self._is_cached(first) and self._is_cached(end - 1)):
            os.posix_fadvise(self._fd, first, end - first, os.POSIX_FADV_WILLNEED)

    def _is_cached(self, position: int) -> bool:
        """Whether a byte is in memory: asking for the rest walks every page, which costs time."""
        try:
            return os.preadv(self._fd, [bytearray(1)], position, os.RWF_NOWAIT) == 1
        except (OSError, AttributeError):  # not cached, or a system that cannot tell
            return False

    def identity(self) -> dict[str, Any]:
        import xxhash

        now = os.fstat(self._fd)
        return {
            "path": str(self.path.resolve()),
            "size": now.st_size,
            "modified_ns": now.st_mtime_ns,
            "header_xxh3": xxhash.xxh3_128_hexdigest(self._header),
        }

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ShardedSource(TensorSource):
    """Several sources that together hold one checkpoint, no name in two of them."""

    def __init__(self, label: str, shards: list[TensorSource]) -> None:
        self.label = label
        self._shards = shards
        self._owner: dict[str, TensorSource] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            for name, info in shard.tensors.items():
                if name in self._owner:
                    raise CheckpointError(
                        f"{label}: tensor {name!r} is in {self._owner[name].label} "
                        f"and again in {shard.label}"
                    )
                self._owner[name] = shard
                self._tensors[name] = info

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read_into(self, name: str, start: int, stop: int, out: memoryview) -> None:
        self._owner[name].read_into(name, start, stop, out)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        self._owner[name].prefetch(name, start, stop)

    def where(self, name: str) -> str:
        return self._owner[name].where(name)

    def identity(self) -> dict[str, Any]:
        return {"label": self.label, "files": [shard.identity() for shard in self._shards]}

    def close(self) -> None:
        for shard in self._shards:
            shard.close()


def is_file_name(name: object) -> bool:
    """Whether something found in a file can name a file in a folder, and none elsewhere."""
    if not isinstance(name, str) or Path(name).name != name or name in {"", ".", ".."}:
        return False
    try:
        return len(name.encode()) <= _LONGEST_NAME and "\0" not in name
    except UnicodeEncodeError:
        return False


def read_index(raw: bytes, label: str) -> dict[str, str]:
    """`tensor name -> shard file name` from an index file, with names that stay in the folder."""
    try:
        weight_map = json.loads(raw)["weight_map"]
        items = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{label}: expected JSON with a 'weight_map' object") from None
    for name, shard in items:
        if not is_file_name(shard):
            raise CheckpointError(
                f"{label}: tensor {name!r} points to {shard!r}, expected a file name in this folder"
            )
    return dict(items)


def open_sharded(index: Path) -> ShardedSource:
    """The checkpoint described by a `*.safetensors.index.json`."""
    from fusekit.checkpoint.shards import open_shards  # which needs ShardedSource

    weight_map = read_index(index.read_bytes(), str(index))
    files = dict.fromkeys(weight_map.values())
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: shard {missing[0]!r} is missing from {index.parent}")
    return open_shards(str(index), weight_map, lambda name: SafetensorsFile(index.parent / name))
