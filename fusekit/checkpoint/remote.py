"""Safetensors checkpoints over HTTP(S) or any fsspec URL, read where they are, never stored.

Bytes come in large aligned chunks that all tensors of a checkpoint share: block-sized requests
would spend their time waiting for the network.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from fusekit.checkpoint.pickles import PICKLE_INDEX_SUFFIX
from fusekit.checkpoint.pipelines import (
    DIFFUSERS_FILE,
    PIPELINE_FILES,
    ROUTER_FILE,
    join_parts,
    listed_parts,
    read_file,
)
from fusekit.checkpoint.ranges import MissingFileError, RangeReader, open_ranges
from fusekit.checkpoint.recent import Recent
from fusekit.checkpoint.safetensors import INDEX_SUFFIX, header_length, parse_header, read_index
from fusekit.checkpoint.shards import open_shards
from fusekit.checkpoint.source import TensorInfo, TensorSource
from fusekit.errors import CheckpointError

CHUNK_BYTES = 8 << 20
CHUNKS_KEPT = 16
READ_AHEAD = 2
MAX_SMALL_FILE_BYTES = 256 << 20

COMPANION_NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "scheduler_config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "LICENSE",
    *PIPELINE_FILES,
    ROUTER_FILE,
)
"""Small files that are looked for beside remote weights, where folders cannot be listed."""

_STEMS = ("model", "diffusion_pytorch_model")
_PICKLES = ("pytorch_model", "diffusion_pytorch_model")
_CONNECTIONS = 8


class ChunkCache:
    """The chunks of one checkpoint that were used last, and a few that come next."""

    def __init__(self) -> None:
        self._chunks: Recent[tuple[str, int], bytes] = Recent(CHUNKS_KEPT)
        self._workers = ThreadPoolExecutor(READ_AHEAD * 2, thread_name_prefix="fusekit-fetch")
        self._lock = threading.Lock()
        self._scheduled: set[tuple[str, int]] = set()

    def read_into(self, file: RangeReader, begin: int, out: memoryview) -> None:
        """Fill `out` from byte `begin` of `file`."""
        done = 0
        while done < len(out):
            index, offset = divmod(begin + done, CHUNK_BYTES)
            chunk = self._chunk(file, index)
            part = memoryview(chunk)[offset : offset + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            self.fetch(file, index + 1, index + 1 + READ_AHEAD)

    def fetch(self, file: RangeReader, first: int, last: int) -> None:
        """Start fetching chunks `[first, last)` in the background."""
        for index in range(first, min(last, -(-file.size // CHUNK_BYTES))):
            key = (file.label, index)
            with self._lock:
                if key in self._scheduled or key in self._chunks:
                    continue
                self._scheduled.add(key)
            self._workers.submit(self._fetch, file, index)

    def close(self) -> None:
        self._workers.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, file: RangeReader, index: int) -> None:
        try:
            self._chunk(file, index)
        finally:
            with self._lock:
                self._scheduled.discard((file.label, index))

    def _chunk(self, file: RangeReader, index: int) -> bytes:
        begin = index * CHUNK_BYTES
        end = min(file.size, begin + CHUNK_BYTES)
        return self._chunks.get((file.label, index), lambda: file.read(begin, end))


class RemoteSafetensors(TensorSource):
    """One remote `.safetensors` file. Opening it reads its header only.

    Raises:
        CheckpointError: a malformed header, as for local files.
    """

    def __init__(self, file: RangeReader, chunks: ChunkCache) -> None:
        self.label = file.label
        self._file = file
        self._chunks = chunks
        prefix = file.read(0, min(8, file.size))
        length = header_length(prefix, file.size, self.label)
        self._header = file.read(8, 8 + length)
        self._extents, self.metadata = parse_header(self._header, file.size, self.label)
        self._tensors = {name: extent[0] for name, extent in self._extents.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read_into(self, name: str, start: int, stop: int, out: memoryview) -> None:
        info, begin, _ = self._extents[name]
        self._chunks.read_into(self._file, begin + start * info.dtype.itemsize, out)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        info, begin, _ = self._extents[name]
        first = begin + start * info.dtype.itemsize
        last = begin + stop * info.dtype.itemsize
        chunk = first // CHUNK_BYTES
        self._chunks.fetch(
            self._file, chunk, min(chunk + CHUNKS_KEPT // 2, -(-last // CHUNK_BYTES))
        )

    def identity(self) -> dict[str, Any]:
        import xxhash

        return {
            **self._file.identity(),
            "header_xxh3": xxhash.xxh3_128_hexdigest(self._header),
        }

    def close(self) -> None:
        self._chunks.close()


def is_url(reference: str) -> bool:
    """Whether a model reference is a URL that `open_url` reads (so not a path, nor `hf://`)."""
    scheme, separator, _ = reference.partition("://")
    return bool(separator) and scheme.isidentifier() and scheme not in {"file", "hf"}


def open_url(url: str) -> TensorSource:
    """The safetensors checkpoint at a URL: a file, an index, a folder or a pipeline of folders.

    Args:
        url: `https://host/model.safetensors`, `s3://bucket/model`, `memory://m/...index.json`, ...

    Raises:
        CheckpointError: unreachable, no weights there, or malformed files.

    >>> source = open_url("s3://bucket/model")                       # doctest: +SKIP
    """
    path = urlsplit(url).path
    if path.endswith(".safetensors"):
        return RemoteSafetensors(open_ranges(url), ChunkCache())
    if path.endswith(INDEX_SUFFIX):
        return _open_index(url, open_ranges(url))
    parts = listed_parts(lambda name: _content(within(url, name)), url)
    if parts:
        return _open_pipeline(url, parts)
    weights = _open_folder(url)
    if weights is None:
        raise CheckpointError(
            f"{url}: no weights found, expected model.safetensors or model{INDEX_SUFFIX} there"
        )
    return weights


def _open_folder(url: str) -> TensorSource | None:
    """The weights in one folder, or None.

    Raises:
        CheckpointError: there are some, but only as pickles.
    """
    for stem in _STEMS:
        for name in (f"{stem}{INDEX_SUFFIX}", f"{stem}.safetensors"):
            place = within(url, name)
            try:
                file = open_ranges(place)
            except MissingFileError:
                continue
            if name.endswith(INDEX_SUFFIX):
                return _open_index(place, file)
            return RemoteSafetensors(file, ChunkCache())
    for name in (stem + end for stem in _PICKLES for end in (".bin", PICKLE_INDEX_SUFFIX)):
        try:
            label = open_ranges(within(url, name)).label
        except MissingFileError:
            continue
        raise CheckpointError(
            f"{label}: a PyTorch pickle, and at URLs only safetensors are read; download the model "
            "and give its folder"
        )
    return None


def _open_pipeline(url: str, parts: list[str]) -> TensorSource:
    opened: dict[str, TensorSource] = {}
    try:
        for part in parts:
            source = _open_folder(within(url, part))
            if source is not None:
                opened[part] = source
        # Weights beside model_index.json are the whole pipeline once more, in one file.
        copied = opened and _content(within(url, DIFFUSERS_FILE)) is not None
        return join_parts(url, None if copied else _open_folder(url), opened)
    except BaseException:
        for source in opened.values():
            source.close()
        raise


def open_files(
    label: str, weight_map: Mapping[str, str], open_file: Callable[[str], RangeReader]
) -> TensorSource:
    """A sharded remote checkpoint: `weight_map` from an index, files opened by name."""
    chunks = ChunkCache()
    return open_shards(label, weight_map, lambda name: RemoteSafetensors(open_file(name), chunks))


def read_small(file: RangeReader) -> bytes:
    """A whole index, config or tokenizer file.

    Raises:
        CheckpointError: it is larger than such files are.
    """
    if file.size > MAX_SMALL_FILE_BYTES:
        raise CheckpointError(
            f"{file.label}: {file.size} bytes, expected at most {MAX_SMALL_FILE_BYTES}"
        )
    return file.read(0, file.size)


def fetch_companions(url: str, into: Path) -> Path:
    """Copy config, tokenizer and template files from beside the weights at `url` into a folder.

    Those of a pipeline's parts go to sub-folders.
    """
    is_file = urlsplit(url).path.endswith((".safetensors", INDEX_SUFFIX))
    place = partial(beside if is_file else within, url)
    with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="fusekit-fetch") as workers:

        def fetch(names: list[str]) -> None:
            for name, content in zip(names, workers.map(_content, map(place, names)), strict=True):
                if content is not None:
                    (into / name).write_bytes(content)

        into.mkdir(parents=True, exist_ok=True)
        fetch(list(COMPANION_NAMES))
        parts = [] if is_file else listed_parts(lambda name: read_file(into / name), url)
        for part in parts:
            (into / part).mkdir(exist_ok=True)
        fetch([f"{part}/{name}" for part in parts for name in COMPANION_NAMES])
    return into


def _content(url: str) -> bytes | None:
    """A small file's content, or None where there is no such file."""
    try:
        return read_small(open_ranges(url))
    except MissingFileError:
        return None


def beside(url: str, name: str) -> str:
    """The URL of a file in the folder that the file `url` is in, with the query kept."""
    scheme, host, path, query, _ = urlsplit(url)
    return urlunsplit((scheme, host, f"{path.rpartition('/')[0].rstrip('/')}/{name}", query, ""))


def within(url: str, name: str) -> str:
    """The URL of a file in the folder `url`, with the query kept."""
    scheme, host, path, query, _ = urlsplit(url)
    return urlunsplit((scheme, host, f"{path.rstrip('/')}/{name}", query, ""))


def _open_index(url: str, file: RangeReader) -> TensorSource:
    weight_map = read_index(read_small(file), file.label)
    return open_files(
        file.label.rpartition("/")[0], weight_map, lambda name: open_ranges(beside(url, name))
    )
