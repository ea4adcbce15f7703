"""Bytes <-> decoded blocks: the working memory of one worker thread."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from fusekit.checkpoint.dtypes import DTYPES, DType
from fusekit.checkpoint.source import TensorSource
from fusekit.engine.plan import PlannedTensor
from fusekit.errors import CheckpointError
from fusekit.kernels import codecs, linear
from fusekit.kernels.packed import KINDS, Packed
from fusekit.methods.base import Block, Request

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK_ELEMENTS = 131072
"""Default block: its decoded rows stay in the cache, and Python's share of the work is small."""

WIDE_BLOCK, LONG_BLOCK = 2, 8
"""How many blocks are one where nothing is decoded; the second where all operands are in memory."""

MAX_VIEWS = 256
"""Views of working memory that are remembered; shapes beyond the usual few are the tails."""

_F8 = {"F8_E4M3": (3, 7, 0x7E, 0x7F, 0x7F), "F8_E5M2": (2, 15, 0x7B, 0x7C, 0x7E)}
"""mantissa bits, bias, codes of the largest finite value, of infinity's replacement and of NaN."""


class Workspace:
    """Reusable buffers of one worker; nothing in it outlives the next block."""

    def __init__(self, block_elements: int) -> None:
        self.block_elements = block_elements
        self.bytes_read = 0
        self._buffers: dict[str, Array] = {}
        self._views: dict[tuple[str, tuple[int, ...], Any], Array] = {}

    def scratch(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Uninitialised memory, the same each time for the same name."""
        key = (name, shape, dtype)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = self._make_view(name, shape, np.dtype(dtype))
        return view

    def _make_view(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        nbytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes or len(self._views) >= MAX_VIEWS:
            if buffer is None or buffer.nbytes < nbytes:
                buffer = self._buffers[name] = np.empty(nbytes, np.uint8)
            self._views.clear()  # views keep outgrown buffers alive
        view: Array = buffer[:nbytes].view(dtype).reshape(shape)
        return view

    def read(self, source: TensorSource, name: str, start: int, stop: int, out: Array) -> None:
        """Elements of a source into `out`; errors of the file system name file and tensor."""
        try:
            source.read_into(name, start, stop, out.data)
        except OSError as error:
            raise CheckpointError(
                f"{source.where(name)}: tensor {name!r} cannot be read: {error.strerror or error}"
            ) from error
        self.bytes_read += out.nbytes

    def decode(self, raw: Array, dtype: DType, out: Array) -> int:
        """Elements of a floating-point type -> a row of the compute type; counts NaN and Inf."""
        if out.dtype == np.float32:
            if dtype.name == "BF16":
                return int(codecs.decode_bf16(raw.view(np.uint16), out))
            if dtype.name == "F16":
                return int(codecs.decode_f16(raw.view(np.uint16), out))
            if dtype.name in _F8:
                return int(codecs.decode_table(raw, _f8_values(dtype.name), out))
            out[:] = raw.view(np.float32)
        elif dtype.name == "F64":
            out[:] = raw.view(np.float64)
        else:
            narrow = self.scratch("narrow", (out.size,), np.float32)
            self.decode(raw, dtype, narrow)
            out[:] = narrow
        return int(codecs.count_nonfinite(out))

    def encode(self, row: Array, dtype: DType) -> tuple[Array, int]:
        """A row -> bytes of a floating-point type, and how many values left its finite range."""
        if dtype.name == "F32" and row.dtype == np.float32:
            return row.view(np.uint8), 0
        out = self.scratch("encoded", (row.size * dtype.itemsize,), np.uint8)
        if dtype.name == "F64":
            out.view(np.float64)[:] = row
            return out, 0
        if row.dtype == np.float64:
            narrow = self.scratch("narrow", (row.size,), np.float32)
            if dtype.name == "F32":
                with np.errstate(over="ignore"):
                    narrow[:] = row
                overflows = int(codecs.count_nonfinite(narrow) - codecs.count_nonfinite(row))
                return narrow.view(np.uint8), overflows
            codecs.narrow_to_odd(row, narrow)
            row = narrow
        if dtype.name == "BF16":
            return out, int(codecs.encode_bf16(row, out.view(np.uint16)))
        if dtype.name == "F16":
            return out, int(codecs.encode_f16(row, out.view(np.uint16)))
        return out, int(codecs.encode_f8(row, out, *_F8[dtype.name]))


@functools.cache
def _f8_values(name: str) -> Array:
    """The float32 values of a one-byte type's 256 codes."""
    values: Array = np.arange(256, dtype=np.uint8).view(DTYPES[name].numpy).astype(np.float32)
    return values


class Fetch(Protocol):
    """Bytes of one planned tensor's operands; operand -1 is the base."""

    def raw(self, index: int, start: int, stop: int) -> Array:
        """The bytes of elements `[start, stop)`."""

    def bits(self, start: int, stop: int) -> tuple[Array, int]:
        """All operands' 16-bit elements, (operands, any), the base last, and where `start` is."""


class Streaming:
    """Reads every block from its source into the worker's buffer."""

    def __init__(
        self, planned: PlannedTensor, sources: list[TensorSource], space: Workspace
    ) -> None:
        self._planned = planned
        self._sources = sources
        self._space = space

    def raw(self, index: int, start: int, stop: int) -> Array:
        ref, space = self._planned.operand(index), self._space
        raw = space.scratch(f"raw{index}", ((stop - start) * ref.dtype.itemsize,), np.uint8)
        space.read(self._sources[ref.source], ref.name, start, stop, raw)
        return raw

    def bits(self, start: int, stop: int) -> tuple[Array, int]:
        bits = self.buffer(stop - start)
        self.read_bits(start, stop, bits)
        return bits, 0

    def buffer(self, elements: int) -> Array:
        """Room for so many 16-bit elements of every operand."""
        shape = (len(self._planned.operand_indices()), elements)
        return self._space.scratch("bits", shape, np.uint16)

    def read_bits(self, start: int, stop: int, out: Array) -> None:
        """Elements `[start, stop)` of every operand, the base last."""
        for index in self._planned.operand_indices():
            ref = self._planned.operand(index)
            row = out[index].view(np.uint8)
            self._space.read(self._sources[ref.source], ref.name, start, stop, row)


class Resident:
    """Holds the whole tensor of every operand, each element read once; blocks are slices of it.

    The first scan reads as it goes, so that it finds what it reads in the cache.
    """

    def __init__(
        self, planned: PlannedTensor, sources: list[TensorSource], space: Workspace
    ) -> None:
        self._whole = Streaming(planned, sources, space)
        self._planned = planned
        self._held: dict[int, Array] = {}
        self._bits: Array | None = None
        self._read = 0

    def raw(self, index: int, start: int, stop: int) -> Array:
        width = self._planned.operand(index).dtype.itemsize
        if index not in self._held:
            self._held[index] = self._whole.raw(index, 0, self._planned.size)
        return self._held[index][start * width : stop * width]

    def bits(self, start: int, stop: int) -> tuple[Array, int]:
        size = self._planned.size
        if self._bits is None:
            self._bits = self._whole.buffer(size)
        if stop > self._read:
            end = stop if start <= self._read else size
            self._whole.read_bits(self._read, end, self._bits[:, self._read : end])
            self._read = end
        return self._bits, start

    @property
    def is_complete(self) -> bool:
        """Whether everything has been read."""
        return self._read == self._planned.size


class BlockReader:
    """Blocks of one planned tensor, counting NaN and Inf once per element."""

    def __init__(self, planned: PlannedTensor, space: Workspace, fetch: Fetch) -> None:
        self.planned = planned
        self.space = space
        self.fetch = fetch
        self.compute = np.dtype(planned.compute)
        self._indices = [*range(len(planned.models)), *([-1] if planned.base else [])]
        self._kind = self._packed_kind()
        self._special = np.zeros(len(self._indices), np.int64)
        self._deltas = False
        self.reset_counts()

    def _packed_kind(self) -> int | None:
        names = {self.planned.operand(index).dtype.name for index in self._indices}
        if len(names) > 1 or self.compute != np.float32:
            return None
        return KINDS.get(names.pop())

    def reset_counts(self) -> None:
        """Start counting NaN and Inf from zero."""
        self._counts = np.zeros(len(self._indices), np.int64)

    @property
    def nonfinite(self) -> dict[int, int]:
        """NaN and infinite entries by operand."""
        return dict(zip(self._indices, self._counts.tolist(), strict=True))

    @property
    def block_is_finite(self) -> bool:
        """Whether neither NaN nor infinite entries were decoded for the current block."""
        return not self._special.any()

    def blocks(self, request: Request, start: int, stop: int) -> Iterator[Block]:
        """The blocks of `[start, stop)`, cut at multiples of the request's unit."""
        elements = self.space.block_elements
        if request.in_registers and self._kind is not None:
            held = isinstance(self.fetch, Resident) and self.fetch.is_complete
            elements *= LONG_BLOCK if held else WIDE_BLOCK
        step = block_length(request.unit(self.planned.shape), elements)
        self._deltas = request.deltas and self.planned.base is not None
        for begin in range(start, stop, step):
            self._special[:] = 0
            yield self._block(begin, min(begin + step, stop))
            self._counts += self._special

    def _block(self, start: int, stop: int) -> Block:
        planned, packed = self.planned, None
        if self._kind is not None:
            bits, at = self.fetch.bits(start, stop)
            packed = Packed(bits, self._kind, at, self._special)
        return Block(planned.tensor, start, stop - start, self.space.scratch, self, packed)

    def _raw(self, index: int, block: Block) -> Array:
        packed = block.packed
        if packed is None:
            return self.fetch.raw(index, block.start, block.start + block.size)
        bits: Array = packed.bits[index, packed.start : packed.start + block.size]
        return bits.view(np.uint8)

    def base(self, block: Block) -> Array:
        """The base's elements."""
        base = self.planned.base
        row = self.space.scratch("base", (block.size if base else 0,), self.compute)
        if base is not None:
            self._special[-1] = self.space.decode(self._raw(-1, block), base.dtype, row)
        return row

    def rows(self, block: Block) -> Array:
        """The models' elements, or their task vectors."""
        space, models = self.space, self.planned.models
        rows = space.scratch("rows", (len(models), block.size), self.compute)
        for index, ref in enumerate(models):
            raw, row = self._raw(index, block), rows[index]
            if self._deltas and ref.dtype.name == "BF16" and self.compute == np.float32:
                bits = raw.view(np.uint16)
                self._special[index] = codecs.decode_bf16_delta(bits, block.base, row)
                continue
            self._special[index] = space.decode(raw, ref.dtype, row)
            if self._deltas:
                linear.subtract(rows[index : index + 1], block.base)
        return rows


def block_length(unit: int, block_elements: int) -> int:
    """The largest multiple of `unit` within the block size, at least one unit."""
    return max(1, block_elements // unit) * unit


def nonfinite_error(where: str, name: str, count: int) -> CheckpointError:
    """The refusal of NaN and Inf in one operand."""
    return CheckpointError(
        f"{where}: tensor {name!r} has {count} NaN or infinite values, expected none; repair the "
        "model, or let them through with --allow-nonfinite (allow_nonfinite=True in Python)"
    )
