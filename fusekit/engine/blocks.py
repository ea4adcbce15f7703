"""Bytes <-> decoded blocks: the working memory of one worker thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fusekit.checkpoint.dtypes import DType
from fusekit.checkpoint.source import TensorSource
from fusekit.engine.plan import PlannedTensor
from fusekit.errors import CheckpointError
from fusekit.kernels import codecs, linear
from fusekit.methods.base import Block, Request

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK_ELEMENTS = 32768
"""Default block: a handful of decoded rows of it fit the second-level cache."""

_F8 = {"F8_E4M3": (3, 7, 0x7E, 0x7F, 0x7F), "F8_E5M2": (2, 15, 0x7B, 0x7C, 0x7E)}
"""mantissa bits, bias, codes of the largest finite value, of infinity's replacement and of NaN."""


class Workspace:
    """Reusable buffers of one worker; nothing in it outlives the next block."""

    def __init__(self, block_elements: int) -> None:
        self.block_elements = block_elements
        self.bytes_read = 0
        self._buffers: dict[str, Array] = {}
        self._tables: dict[str, Array] = {}

    def scratch(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Uninitialised memory, the same each time for the same name."""
        wanted = np.dtype(dtype)
        nbytes = int(np.prod(shape)) * wanted.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self._buffers[name] = np.empty(nbytes, np.uint8)
        view: Array = buffer[:nbytes].view(wanted).reshape(shape)
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
        if dtype.numpy == out.dtype:
            out[:] = raw.view(out.dtype)
            return int(codecs.count_nonfinite(out))
        if out.dtype != np.float32:
            narrow = raw.view(np.float64) if dtype.name == "F64" else self._narrow(raw, dtype)
            out[:] = narrow
            return int(codecs.count_nonfinite(out))
        if dtype.name == "BF16":
            return int(codecs.decode_bf16(raw.view(np.uint16), out))
        if dtype.name == "F16":
            return int(codecs.decode_f16(raw.view(np.uint16), out))
        return int(codecs.decode_table(raw, self._table(dtype), out))

    def _narrow(self, raw: Array, dtype: DType) -> Array:
        narrow = self.scratch("narrow", (raw.nbytes // dtype.itemsize,), np.float32)
        self.decode(raw, dtype, narrow)
        return narrow

    def _table(self, dtype: DType) -> Array:
        if dtype.name not in self._tables:
            codes = np.arange(256, dtype=np.uint8).view(dtype.numpy)
            self._tables[dtype.name] = codes.astype(np.float32)
        return self._tables[dtype.name]

    def encode(self, row: Array, dtype: DType) -> tuple[Array, int]:
        """A row -> bytes of a floating-point type, and how many values left its finite range."""
        if dtype.numpy == row.dtype:
            return row.view(np.uint8), 0
        out = self.scratch("encoded", (row.size * dtype.itemsize,), np.uint8)
        if row.dtype == np.float64:
            narrow = self.scratch("narrow", (row.size,), np.float32)
            if dtype.name == "F32":
                with np.errstate(over="ignore"):
                    narrow[:] = row
                overflows = int(codecs.count_nonfinite(narrow) - codecs.count_nonfinite(row))
                return narrow.view(np.uint8), overflows
            codecs.narrow_to_odd(row, narrow)
            row = narrow
        elif dtype.name == "F64":
            out.view(np.float64)[:] = row
            return out, 0
        if dtype.name == "BF16":
            return out, int(codecs.encode_bf16(row, out.view(np.uint16)))
        if dtype.name == "F16":
            return out, int(codecs.encode_f16(row, out.view(np.uint16)))
        return out, int(codecs.encode_f8(row, out, *_F8[dtype.name]))


Fetch = Callable[[int, int, int], Array]
"""(operand, start, stop) -> the bytes of those elements; operand -1 is the base."""


def streaming(planned: PlannedTensor, sources: list[TensorSource], space: Workspace) -> Fetch:
    """Read every block from its source into the worker's buffer."""

    def fetch(index: int, start: int, stop: int) -> Array:
        ref = planned.operand(index)
        raw = space.scratch(f"raw{index}", ((stop - start) * ref.dtype.itemsize,), np.uint8)
        space.read(sources[ref.source], ref.name, start, stop, raw)
        return raw

    return fetch


def resident(planned: PlannedTensor, sources: list[TensorSource], space: Workspace) -> Fetch:
    """Read the whole tensor of every operand once; blocks are slices of it."""
    held: dict[int, Array] = {}

    def fetch(index: int, start: int, stop: int) -> Array:
        ref = planned.operand(index)
        width = ref.dtype.itemsize
        if index not in held:
            whole = space.scratch(f"whole{index}", (planned.size * width,), np.uint8)
            space.read(sources[ref.source], ref.name, 0, planned.size, whole)
            held[index] = whole
        return held[index][start * width : stop * width]

    return fetch


class BlockReader:
    """Decoded blocks of one planned tensor, counting NaN and Inf once per element."""

    def __init__(self, planned: PlannedTensor, space: Workspace, fetch: Fetch) -> None:
        self.planned = planned
        self.space = space
        self.fetch = fetch
        self.compute = np.dtype(planned.compute)
        self.reset_counts()

    def reset_counts(self) -> None:
        """Start counting NaN and Inf from zero."""
        self.nonfinite = dict.fromkeys(self.planned.operand_indices(), 0)

    def blocks(self, request: Request, start: int, stop: int) -> Iterator[Block]:
        """The blocks of `[start, stop)`, cut at multiples of the request's unit."""
        step = block_length(request.unit(self.planned.shape), self.space.block_elements)
        for begin in range(start, stop, step):
            yield self.block(request, begin, min(begin + step, stop))

    def block(self, request: Request, start: int, stop: int) -> Block:
        """One decoded block."""
        space, planned = self.space, self.planned
        length = stop - start
        rows = space.scratch("rows", (len(planned.models), length), self.compute)
        for index, row in enumerate(rows):
            self._decode(index, start, stop, row)
        base = space.scratch("base", (length if planned.base else 0,), self.compute)
        if planned.base is not None:
            self._decode(-1, start, stop, base)
            if request.deltas:
                linear.subtract(rows, base)
        return Block(planned.tensor, rows, base, start, space.scratch)

    def _decode(self, index: int, start: int, stop: int, out: Array) -> None:
        raw = self.fetch(index, start, stop)
        self.nonfinite[index] += self.space.decode(raw, self.planned.operand(index).dtype, out)


def block_length(unit: int, block_elements: int) -> int:
    """The largest multiple of `unit` within the block size, at least one unit."""
    return max(1, block_elements // unit) * unit
