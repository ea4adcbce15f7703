"""Tensors lying uncompressed inside a local ZIP file (PyTorch's and NumPy's containers), in place.

The central directory is checked against the file's size and against every member's own header
before anything in it is believed. Nothing is unpacked: a tensor is read by its byte position.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fusekit.checkpoint.recent import Recent
from fusekit.checkpoint.source import TensorInfo, TensorSource
from fusekit.errors import CheckpointError

MAX_DIRECTORY_BYTES = 1 << 26
"""Largest central directory that is read: about half a million members."""

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF

_PANEL_ELEMENTS = 1 << 21
_PANELS_KEPT = 4


class LocalFile:
    """A file read by position: no cursor, safe from several threads."""

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None
        self.size = os.fstat(self._fd).st_size

    def read(self, begin: int, end: int) -> bytes:
        """The bytes `[begin, end)`; the caller has checked them against `size`."""
        buffer = bytearray(end - begin)
        self.read_into(begin, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, begin: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            try:
                more = os.preadv(self._fd, [out[done:]], begin + done)
            except OSError as error:
                reason = f"{self.label}: cannot be read: {error.strerror}"
                raise CheckpointError(reason) from None
            if more == 0:
                raise CheckpointError(
                    f"{self.label}: the file ended at byte {begin + done}; "
                    "it was truncated after it had been opened"
                )
            done += more

    def will_need(self, begin: int, end: int) -> None:
        """Tell the operating system that `[begin, end)` is read soon."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def identity(self) -> dict[str, Any]:
        now = os.fstat(self._fd)
        return {
            "path": str(self._path.resolve()),
            "size": now.st_size,
            "modified_ns": now.st_mtime_ns,
        }

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class Member:
    """An uncompressed member's byte range `[begin, end)` in the ZIP file."""

    begin: int
    end: int


def read_directory(file: LocalFile) -> bytes:
    """The central directory's bytes.

    Raises:
        CheckpointError: not a ZIP file, truncated, or a directory that is larger than
            `MAX_DIRECTORY_BYTES` or does not lie where the end record says.
    """
    tail_begin = max(0, file.size - _END.size - _FULL16)
    tail = file.read(tail_begin, file.size)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise CheckpointError(f"{file.label}: not a ZIP file, or truncated: it has no end record")
    end_begin = tail_begin + at
    *_, size, begin, _ = _END.unpack_from(tail, at)
    limit = end_begin
    locator_begin = end_begin - _END64_LOCATOR.size
    if locator_begin >= 0 and file.read(locator_begin, locator_begin + 4) == b"PK\x06\x07":
        size, begin, limit = _zip64_directory(file, locator_begin)
    if size > MAX_DIRECTORY_BYTES:
        raise CheckpointError(
            f"{file.label}: a central directory of {size} bytes, expected at most "
            f"{MAX_DIRECTORY_BYTES}"
        )
    if begin + size != limit:
        raise CheckpointError(
            f"{file.label}: the central directory is said to lie at bytes {begin} to "
            f"{begin + size}, expected it to end at {limit}: damaged or truncated"
        )
    return file.read(begin, begin + size)


def _zip64_directory(file: LocalFile, locator_begin: int) -> tuple[int, int, int]:
    """Size and begin of the directory, and where the ZIP64 end record after it begins."""
    locator = file.read(locator_begin, locator_begin + _END64_LOCATOR.size)
    begin = _END64_LOCATOR.unpack(locator)[2]
    if begin + _END64.size <= locator_begin:
        record = _END64.unpack(file.read(begin, begin + _END64.size))
        if record[0] == b"PK\x06\x06":
            return record[8], record[9], begin
    raise CheckpointError(f"{file.label}: damaged ZIP file: no ZIP64 end record at byte {begin}")


def stored_members(file: LocalFile, directory: bytes) -> dict[str, Member]:
    """Members by name, each checked to be stored, unencrypted, in the file and on its own.

    Raises:
        CheckpointError: a compressed or encrypted member, a name that occurs twice, sizes that
            disagree, members beyond the end of the file or on top of each other.
    """
    members: dict[str, Member] = {}
    position = 0
    while position < len(directory):
        if directory[position : position + 4] != b"PK\x01\x02":
            raise CheckpointError(
                f"{file.label}: damaged ZIP file: expected a directory entry at byte {position} "
                "of the central directory"
            )
        if position + _ENTRY.size > len(directory):
            raise CheckpointError(f"{file.label}: damaged ZIP file: the directory is cut short")
        name, member, position = _entry(file, directory, position)
        if name in members:
            raise CheckpointError(f"{file.label}: member {name!r} occurs twice")
        members[name] = member
    ordered = sorted(members.items(), key=lambda item: (item[1].begin, item[1].end))
    for (name, member), (next_name, following) in pairwise(ordered):
        if following.begin < member.end:
            raise CheckpointError(
                f"{file.label}: members {name!r} and {next_name!r} lie on top of each other"
            )
    return members


def _entry(file: LocalFile, directory: bytes, position: int) -> tuple[str, Member, int]:
    fields = _ENTRY.unpack_from(directory, position)
    flags, method = fields[3], fields[4]
    packed, size, name_length, extra_length, comment_length = fields[8:13]
    header = fields[16]
    name_begin = position + _ENTRY.size
    extra_begin = name_begin + name_length
    after = extra_begin + extra_length + comment_length
    raw_name = directory[name_begin:extra_begin]
    name = raw_name.decode("utf-8", "backslashreplace")
    place = f"{file.label}: member {name!r}"
    if after > len(directory):
        raise CheckpointError(f"{place}: its directory entry is cut short")
    if flags & 1:
        raise CheckpointError(f"{place} is encrypted")
    if method != 0:
        raise CheckpointError(
            f"{place} is compressed (method {method}), expected stored members: "
            "save it again without compression"
        )
    size, packed, header = _zip64_sizes(
        directory[extra_begin : extra_begin + extra_length], size, packed, header, place
    )
    if size != packed:
        raise CheckpointError(f"{place}: {packed} bytes stored, {size} claimed")
    begin = _data_begin(file, header, raw_name, place)
    if begin + size > file.size:
        raise CheckpointError(
            f"{place} is said to lie at bytes {begin} to {begin + size}, the file has {file.size}"
        )
    return name, Member(begin, begin + size), after


def _zip64_sizes(
    extra: bytes, size: int, packed: int, header: int, place: str
) -> tuple[int, int, int]:
    """Size, packed size and header position, from the ZIP64 field where 32 bits were too few."""
    values = [size, packed, header]
    if _FULL32 not in values:
        return size, packed, header
    position = 0
    while position + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, position)
        if tag == 1:
            field = extra[position + 4 : position + 4 + length]
            wanted = [index for index, value in enumerate(values) if value == _FULL32]
            if len(field) >= 8 * len(wanted):
                for index, value in zip(
                    wanted, struct.unpack_from(f"<{len(wanted)}Q", field), strict=True
                ):
                    values[index] = value
                return values[0], values[1], values[2]
        position += 4 + length
    raise CheckpointError(f"{place}: its ZIP64 sizes are missing")


def _data_begin(file: LocalFile, header: int, raw_name: bytes, place: str) -> int:
    """Where a member's bytes begin, from its local header, which must agree with the directory."""
    name_begin = header + _LOCAL.size
    name_end = name_begin + len(raw_name)
    if name_end > file.size:
        raise CheckpointError(
            f"{place}: its header is said to lie at byte {header}, the file has {file.size}"
        )
    local = _LOCAL.unpack(file.read(header, name_begin))
    signature, method, name_length, extra_length = local[0], local[3], local[9], local[10]
    if (
        signature != b"PK\x03\x04"
        or method != 0
        or name_length != len(raw_name)
        or file.read(name_begin, name_end) != raw_name
    ):
        raise CheckpointError(f"{place}: its own header disagrees with the directory")
    return name_end + int(extra_length)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a tensor's elements lie: the byte range that holds them and each axis' step.

    `begin` is element 0, no element reaches past `end`, `strides` count elements.
    """

    begin: int
    end: int
    strides: tuple[int, ...]


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides (in elements) of a row-major tensor."""
    strides = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements lie in reading order; the stride of an axis of length 1 does not matter."""
    return 0 in shape or all(
        length == 1 or stride == expected
        for length, stride, expected in zip(shape, strides, row_major(shape), strict=True)
    )


class ArchiveSource(TensorSource):
    """Tensors at known places of one ZIP file. Strided ones are gathered in panels when read."""

    def __init__(
        self,
        file: LocalFile,
        directory: bytes,
        placed: Mapping[str, tuple[TensorInfo, Placement]],
    ) -> None:
        self.label = file.label
        self._file = file
        self._directory = directory
        self._tensors = {name: info for name, (info, _) in placed.items()}
        self._places = {name: place for name, (_, place) in placed.items()}
        self._panels: Recent[tuple[str, int], memoryview] = Recent(_PANELS_KEPT)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read_into(self, name: str, start: int, stop: int, out: memoryview) -> None:
        info, place = self._tensors[name], self._places[name]
        width = info.dtype.itemsize
        if is_row_major(info.shape, place.strides):
            self._file.read_into(place.begin + start * width, out)
            return
        at = start
        while at < stop:
            panel = _panel_at(info.shape, at)
            until = min(stop, panel.stop)
            raw = self._panels.get((name, panel.start), partial(self._gather, name, panel))
            out[(at - start) * width : (until - start) * width] = raw[
                (at - panel.start) * width : (until - panel.start) * width
            ]
            at = until

    def prefetch(self, name: str, start: int, stop: int) -> None:
        info, place = self._tensors[name], self._places[name]
        if is_row_major(info.shape, place.strides):
            width = info.dtype.itemsize
            self._file.will_need(place.begin + start * width, place.begin + stop * width)

    def identity(self) -> dict[str, Any]:
        import xxhash

        # The directory holds every member's CRC-32: its hash changes with the contents.
        return self._file.identity() | {
            "directory_xxh3": xxhash.xxh3_128_hexdigest(self._directory)
        }

    def close(self) -> None:
        self._file.close()

    def _gather(self, name: str, panel: _Panel) -> memoryview:
        """A panel's elements in reading order, from as few and as long reads as reasonable."""
        place, kind = self._places[name], np.dtype(f"u{self._tensors[name].dtype.itemsize}")
        strides = place.strides[len(place.strides) - len(panel.shape) :]
        begin = place.begin + kind.itemsize * sum(
            index * stride for index, stride in zip(panel.corner, place.strides, strict=False)
        )
        axes = sorted(range(len(strides)), key=lambda axis: -strides[axis])
        shape = tuple(panel.shape[axis] for axis in axes)
        steps = tuple(strides[axis] * kind.itemsize for axis in axes)
        gathered = np.empty(shape, kind)
        outer = _outer_axes(shape, steps, kind.itemsize)
        span = np.empty(_span(shape[outer:], steps[outer:], kind.itemsize), np.uint8)
        view = np.ndarray(shape[outer:], kind, span, strides=steps[outer:])
        for index in np.ndindex(shape[:outer]):
            offset = sum(i * step for i, step in zip(index, steps, strict=False))
            self._file.read_into(begin + offset, span.data)
            gathered[index] = view
        ordered = np.ascontiguousarray(gathered.transpose(np.argsort(axes)))
        raw: memoryview = ordered.reshape(-1).view(np.uint8).data
        return raw


@dataclass(frozen=True, slots=True)
class _Panel:
    """A box of a tensor that is contiguous in reading order: elements `[start, stop)`.

    It begins at index `corner` of the tensor's first axes and has `shape` over its last ones.
    """

    start: int
    stop: int
    corner: tuple[int, ...]
    shape: tuple[int, ...]


def _panel_at(shape: tuple[int, ...], element: int) -> _Panel:
    """The panel that holds an element.

    Neighbours in reading order lie far apart in the file; a panel larger than the usual read lets
    each visit to a place bring back everything that is wanted from it.
    """
    axis, inner = len(shape) - 1, 1
    while axis > 0 and inner * shape[axis] <= _PANEL_ELEMENTS:
        inner *= shape[axis]
        axis -= 1
    rows = max(1, _PANEL_ELEMENTS // inner)
    coordinates = []
    remaining = element // inner
    for length in reversed(shape[: axis + 1]):
        remaining, coordinate = divmod(remaining, length)
        coordinates.append(coordinate)
    *lead, row = reversed(coordinates)
    first = row - row % rows
    count = min(rows, shape[axis] - first)
    start = element - (element % inner) - (row - first) * inner
    return _Panel(start, start + count * inner, (*lead, first), (count, *shape[axis + 1 :]))


def _span(shape: tuple[int, ...], steps: tuple[int, ...], width: int) -> int:
    """Bytes from the first to the last element of a strided box."""
    return width + sum((length - 1) * step for length, step in zip(shape, steps, strict=True))


def _outer_axes(shape: tuple[int, ...], steps: tuple[int, ...], width: int) -> int:
    """How many axes (of largest step) to visit one by one; the rest is read in one go.

    More is read in one go as long as at least an eighth of what is read is wanted.
    """
    outer = len(shape)
    while outer > 0:
        wanted = math.prod(shape[outer - 1 :]) * width
        if _span(shape[outer - 1 :], steps[outer - 1 :], width) > 8 * wanted:
            break
        outer -= 1
    return outer
