"""NumPy `.npz` archives (`numpy.savez`), each array read in place by its position in the file.

Compressed archives (`numpy.savez_compressed`) are refused: their arrays cannot be read by range.
"""

from __future__ import annotations

import io
import tokenize
from pathlib import Path

import numpy as np

from fusekit.checkpoint.archive import (
    ArchiveSource,
    LocalFile,
    Member,
    Placement,
    read_directory,
    row_major,
    stored_members,
)
from fusekit.checkpoint.dtypes import dtype_of
from fusekit.checkpoint.source import TensorInfo
from fusekit.errors import CheckpointError, FusekitError

_MAX_HEADER_BYTES = 16_384
_HEADER_ERRORS = (
    ValueError,
    KeyError,
    TypeError,
    SyntaxError,
    RecursionError,
    MemoryError,
    tokenize.TokenError,
)


class NpzFile(ArchiveSource):
    """A `.npz` file: each `name.npy` in it is offered as tensor `name`.

    Raises:
        CheckpointError: not an uncompressed `.npz`, a member that is no array, object arrays
            (which hold pickles), element types that checkpoints do not have, sizes that disagree.

    >>> source = NpzFile(Path("weights.npz"))                        # doctest: +SKIP
    """

    def __init__(self, path: Path) -> None:
        file = LocalFile(path)
        try:
            directory = read_directory(file)
            placed = dict(
                _placed(file, member_name, member)
                for member_name, member in stored_members(file, directory).items()
            )
        except BaseException:
            file.close()
            raise
        super().__init__(file, directory, placed)


def _placed(
    file: LocalFile, member_name: str, member: Member
) -> tuple[str, tuple[TensorInfo, Placement]]:
    place = f"{file.label}: member {member_name!r}"
    if not member_name.endswith(".npy"):
        raise CheckpointError(f"{place}: expected only arrays (.npy) in a .npz file")
    name = member_name.removesuffix(".npy")
    head = io.BytesIO(file.read(member.begin, min(member.end, member.begin + _MAX_HEADER_BYTES)))
    shape, fortran_order, array_dtype = _array_header(head, place)
    begin = member.begin + head.tell()
    if array_dtype.hasobject:
        raise CheckpointError(f"{place}: an object array, which holds a pickle; refused")
    if array_dtype.byteorder == ">":
        raise CheckpointError(f"{place}: dtype {array_dtype} is big-endian, expected little-endian")
    try:
        dtype = dtype_of(array_dtype)
    except FusekitError:
        hint = (
            "; NumPy writes bfloat16 and float8 as raw bytes: save float32 or safetensors instead"
            if array_dtype.kind == "V"
            else ""
        )
        raise CheckpointError(f"{place}: dtype {array_dtype} is not supported{hint}") from None
    info = TensorInfo(name, dtype, shape)
    if info.nbytes != member.end - begin:
        raise CheckpointError(
            f"{place}: shape {list(shape)} of {dtype.name} needs {info.nbytes} bytes, "
            f"it has {member.end - begin}"
        )
    strides = tuple(reversed(row_major(shape[::-1]))) if fortran_order else row_major(shape)
    return name, (info, Placement(begin, member.end, strides))


def _array_header(head: io.BytesIO, place: str) -> tuple[tuple[int, ...], bool, np.dtype[np.void]]:
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(head)
        shape, fortran_order, dtype = readers[version](head)
    except _HEADER_ERRORS as error:
        raise CheckpointError(f"{place}: not an array in NumPy's format: {error}") from None
    if any(length < 0 for length in shape):
        raise CheckpointError(f"{place}: shape {list(shape)} has a negative length")
    return shape, fortran_order, dtype
