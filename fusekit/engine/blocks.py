"""Bytes <-> decoded blocks: the working memory of one worker thread."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fusekit.checkpoint.dtypes import DTYPES, DType
from fusekit.checkpoint.source import TensorSource
from fusekit.engine.plan import PlannedTensor
from fusekit.errors import CheckpointError
from fusekit.kernels import codecs, linear
from fusekit.methods.base import Block, Request

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK_ELEMENTS = 131072
"""Default block: its decoded rows stay in the cache, and Python's share of the work is small."""

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
        base = space.scratch("base", (length if planned.base else 0,), self.compute)
        if planned.base is not None:
            raw = self.fetch(-1, start, stop)
            self.nonfinite[-1] += space.decode(raw, planned.base.dtype, base)
        for index, ref in enumerate(planned.models):
            raw = self.fetch(index, start, stop)
            row = rows[index]
            if not request.deltas or planned.base is None:
                self.nonfinite[index] += space.decode(raw, ref.dtype, row)
            elif ref.dtype.name == "BF16" and self.compute == np.float32:
                self.nonfinite[index] += codecs.decode_bf16_delta(raw.view(np.uint16), base, row)
            else:
                self.nonfinite[index] += space.decode(raw, ref.dtype, row)
                linear.subtract(rows[index : index + 1], base)
        return Block(planned.tensor, rows, base, start, space.scratch)


def block_length(unit: int, block_elements: int) -> int:
    """The largest multiple of `unit` within the block size, at least one unit."""
    return max(1, block_elements // unit) * unit


def nonfinite_error(where: str, name: str, count: int) -> CheckpointError:
    """The refusal of NaN and Inf in one operand."""
    return CheckpointError(
        f"{where}: tensor {name!r} has {count} NaN or infinite values, expected none; repair the "
        "model, or let them through with --allow-nonfinite (allow_nonfinite=True in Python)"
    )
