"""Checksums of tensors that do not depend on who wrote which part.

A tensor's checksum is the xxh3-128 of the xxh3-128 digests of its consecutive chunks of 2^20
elements, in hexadecimal: parts can be hashed where they are written, in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xxhash

Array = np.ndarray[Any, np.dtype[Any]]

CHUNK_ELEMENTS = 1 << 20
ALGORITHM = "xxh3-128/1Mi-elements"


class ChunkDigests:
    """The digests of one tensor's chunks, filled in by any thread."""

    def __init__(self, size: int) -> None:
        self._digests: list[bytes] = [b""] * max(1, -(-size // CHUNK_ELEMENTS))
        if size == 0:
            self._digests[0] = xxhash.xxh3_128_digest(b"")

    def from_chunk(self, start: int) -> RunningDigest:
        """A digest for bytes that come in order from element `start`, a chunk's first."""
        return RunningDigest(self._digests, start // CHUNK_ELEMENTS)

    def hexdigest(self) -> str:
        return xxhash.xxh3_128_hexdigest(b"".join(self._digests))


class RunningDigest:
    """Hashes consecutive bytes, closing a digest at every chunk boundary."""

    def __init__(self, digests: list[bytes], chunk: int) -> None:
        self._digests = digests
        self._chunk = chunk
        self._state = xxhash.xxh3_128()
        self._filled = 0

    def update(self, data: Array, itemsize: int) -> None:
        """Take in the next bytes, whole elements of `itemsize`."""
        limit = CHUNK_ELEMENTS * itemsize
        at = 0
        while at < data.nbytes:
            part = data[at : at + limit - self._filled]
            self._state.update(part.data)
            self._filled += part.nbytes
            at += part.nbytes
            if self._filled == limit:
                self.close()

    def close(self) -> None:
        """End the current chunk."""
        if self._filled:
            self._digests[self._chunk] = self._state.digest()
            self._chunk += 1
            self._filled = 0
            self._state.reset()


def checksum_of(size: int, itemsize: int, read: Callable[[int, int, memoryview], None]) -> str:
    """The checksum of `size` elements, which `read(start, stop, out)` gives part by part."""
    digests = ChunkDigests(size)
    buffer = np.empty(min(size, CHUNK_ELEMENTS) * itemsize, np.uint8)
    for start in range(0, size, CHUNK_ELEMENTS):
        stop = min(start + CHUNK_ELEMENTS, size)
        part = buffer[: (stop - start) * itemsize]
        read(start, stop, part.data)
        digest = digests.from_chunk(start)
        digest.update(part, itemsize)
        digest.close()
    return digests.hexdigest()
