"""Where every byte of an output checkpoint goes, decided before anything is read or written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from fusekit.checkpoint.source import TensorInfo
from fusekit.errors import FusekitError

DEFAULT_SHARD_BYTES = 5_000_000_000
MANIFEST = "manifest.json"
"""What every output has, written last: the sign that a folder is one."""

JOURNAL = "journal.jsonl"
"""What only an unfinished output has."""

SIDE_FILE = "task_masks.safetensors"
"""What a merge writes besides its model: tensors that no loader of the model should see."""

_SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Shard:
    """One output file: its name, its header's bytes and the place of each tensor in the file."""

    file_name: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """All shards of an output, and which one holds which tensor; a side file if it has one."""

    shards: tuple[Shard, ...]
    side: Shard | None = None
    side_tensors: tuple[TensorInfo, ...] = ()

    @property
    def files(self) -> tuple[Shard, ...]:
        """Every weight file, the side file last."""
        return self.shards if self.side is None else (*self.shards, self.side)

    @cached_property
    def shard_of(self) -> dict[str, Shard]:
        return {name: shard for shard in self.shards for name in shard.offsets}

    @property
    def nbytes(self) -> int:
        """Size of all files together."""
        return sum(shard.nbytes for shard in self.files)

    def indexes(self) -> dict[str, str]:
        """File name -> content of the index of every part that has several shards."""
        parts: dict[str, list[Shard]] = {}
        for shard in self.shards:
            stem = _SHARD_NUMBER.sub("", shard.file_name).removesuffix(".safetensors")
            parts.setdefault(stem, []).append(shard)
        return {
            f"{stem}.safetensors.index.json": _index(shards)
            for stem, shards in parts.items()
            if len(shards) > 1
        }


def _index(shards: Sequence[Shard]) -> str:
    data = sum(shard.nbytes - len(shard.header) for shard in shards)
    folder, slash, _ = shards[0].file_name.rpartition("/")
    weight_map = {
        name.removeprefix(folder + slash): shard.file_name.rpartition("/")[2]
        for shard in shards
        for name in shard.offsets
    }
    weight_map = dict(sorted(weight_map.items()))
    return json.dumps({"metadata": {"total_size": data}, "weight_map": weight_map}, indent=2)


def lay_out(
    tensors: Iterable[TensorInfo],
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    side: Sequence[TensorInfo] = (),
    side_metadata: Mapping[str, str] | None = None,
    parts: Mapping[str, str] | None = None,
) -> Layout:
    """Fill shards greedily in the given order; a new one starts where a tensor would not fit.

    A tensor larger than `shard_bytes` gets a shard of its own. Within a shard wider element types
    come first, so that every tensor is aligned to its type. `parts` maps the folders of a pipeline
    to the names of the files in them: with `{"unet": "model"}` a tensor `unet/w` goes to
    `unet/model.safetensors` as `w`; the part `""` is the folder itself. `side` tensors get
    a file of their own.
    """
    members: dict[str, list[TensorInfo]] = {}
    for info in tensors:
        folder = info.name.partition("/")[0]
        members.setdefault(folder if folder in (parts or {}) else "", []).append(info)
    shards = [
        shard
        for folder, infos in (members or {"": []}).items()
        for shard in _lay_out_part(folder, (parts or {}).get(folder, "model"), infos, shard_bytes)
    ]
    return Layout(
        tuple(shards), _shard(SIDE_FILE, side, side_metadata) if side else None, tuple(side)
    )


def _lay_out_part(
    folder: str, stem: str, tensors: Sequence[TensorInfo], shard_bytes: int
) -> list[Shard]:
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in tensors:
        if shards[-1] and filled + info.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += info.nbytes
    count = len(shards)
    path = f"{folder}/{stem}" if folder else stem
    return [
        _shard(
            f"{path}.safetensors"
            if count == 1
            else f"{path}-{number:05d}-of-{count:05d}.safetensors",
            members,
            prefix=f"{folder}/" if folder else "",
        )
        for number, members in enumerate(shards, start=1)
    ]


def _shard(
    file_name: str,
    members: Sequence[TensorInfo],
    metadata: Mapping[str, str] | None = None,
    prefix: str = "",
) -> Shard:
    ordered = sorted(members, key=lambda info: -info.dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for info in ordered:
        entries[info.name.removeprefix(prefix)] = {
            "dtype": info.dtype.name,
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        position += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets, place = {}, len(header)
    for info in ordered:
        offsets[info.name] = place
        place += info.nbytes
    return Shard(file_name, header, offsets, place)


def parse_size(text: str | float) -> int:
    """Bytes from `5GB`, `500MB`, `5G`, `5000000000`; units are powers of 1000.

    >>> parse_size("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"\s*([0-9]{0,30}\.?[0-9]{1,30})\s*([kmgt]?)b?\s*", str(text), re.I)
    if match is None:
        raise FusekitError(f"size {text!r}: expected a number with k, M, G or T, such as 5GB")
    value = int(Fraction(match[1]) * _UNITS[match[2].lower()])
    if value <= 0:
        raise FusekitError(f"size {text!r}: expected more than 0 bytes")
    return value
