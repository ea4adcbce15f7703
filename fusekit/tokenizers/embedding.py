"""Embedding and head matrices in an output vocabulary, re-indexed while they are read."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fusekit.checkpoint.source import TensorInfo, TensorSource
from fusekit.errors import CheckpointError
from fusekit.tokenizers.alignment import Alignment, Ids

EMBEDDING_NAMES = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|token_embedding|embed_in"
    r"|embed_tokens_per_layer)\.weight$"
    r"|^(backbone\.|transformer\.|model\.)?(embeddings?|shared)\.weight$"
)
"""Names under which checkpoints keep input embeddings."""

HEAD_NAMES = re.compile(
    r"(^|\.)(lm_head|embed_out)\.(weight|bias)$"
    r"|(^|\.)predictions\.(bias|decoder\.(weight|bias))$"
    r"|(^|\.)lm_head\.decoder\.(weight|bias)$"
    r"|^(model\.)?output\.weight$"
    r"|^final_logits_bias$"
)
"""Names under which checkpoints keep output heads and their biases."""

_GAP_BYTES = 16 * 1024
"""Rows nearer to each other than this are read in one go: about what a further read costs."""

_CHUNK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class VocabularyTensor:
    """A tensor with one index over tokens: its role, and the axis of that index."""

    info: TensorInfo
    role: Literal["embedding", "head"]
    axis: int

    @property
    def rows(self) -> int:
        return self.info.shape[self.axis]

    @property
    def lines(self) -> int:
        """Times the vocabulary is run through in row-major order."""
        return math.prod(self.info.shape[: self.axis])

    @property
    def width(self) -> int:
        """Elements per token and line."""
        return math.prod(self.info.shape[self.axis + 1 :])


def vocabulary_tensors(
    tensors: Mapping[str, TensorInfo], *, tokens: int, vocab_size: int | None = None
) -> dict[str, VocabularyTensor]:
    """The embedding and head tensors of a checkpoint: known by name, with a side as long as its
    vocabulary (`vocab_size` of the config, or at least that or `tokens`, the tokenizer's largest
    id + 1).

    Raises:
        CheckpointError: a 2-d tensor is named like an embedding or a head but has no such side.
    """
    found: dict[str, VocabularyTensor] = {}
    least = tokens if vocab_size is None else min(tokens, vocab_size)
    for name, info in tensors.items():
        role: Literal["embedding", "head"]
        if EMBEDDING_NAMES.search(name):
            role = "embedding"
        elif HEAD_NAMES.search(name):
            role = "head"
        else:
            continue
        exact = [axis for axis, side in enumerate(info.shape) if side == vocab_size]
        ample = [axis for axis, side in enumerate(info.shape) if side >= least]
        if not exact and not ample:
            raise CheckpointError(
                f"tensor {name!r}: shape {list(info.shape)} has no side for the vocabulary: "
                f"expected at least {least}"
            )
        found[name] = VocabularyTensor(info, role, (exact or ample)[0])
    return found


def align_sources(
    sources: Mapping[str, TensorSource],
    tensors: Mapping[str, Mapping[str, VocabularyTensor]],
    alignment: Alignment,
) -> dict[str, TensorSource]:
    """Every model's source in the output vocabulary; those that are in it already are unchanged.

    Args:
        sources: model reference -> source, for all models of the alignment.
        tensors: model reference -> its `vocabulary_tensors`.
        alignment: the row maps.

    Raises:
        CheckpointError: a tensor's hidden size differs between models, or a model that has to
            lend rows has no such tensor.
    """
    return {
        model: source
        if all(alignment.is_identity(model, tensor.rows) for tensor in tensors[model].values())
        else AlignedSource(model, sources, tensors, alignment)
        for model, source in sources.items()
    }


class AlignedSource(TensorSource):
    """A model whose embedding and head tensors have the rows of the output vocabulary.

    A range reads the rows it needs and no others: runs of neighbouring rows in one read each. Rows
    the model lacks are the mean (float32, rounded once to the tensor's type) of rows of other
    models; padding rows are the mean of all rows before them, computed on first use. Where a
    lending model has no head of its own, its input embedding stands in (tied weights).
    """

    def __init__(
        self,
        model: str,
        sources: Mapping[str, TensorSource],
        tensors: Mapping[str, Mapping[str, VocabularyTensor]],
        alignment: Alignment,
    ) -> None:
        self._source = sources[model]
        self.label = self._source.label
        self._alignment = alignment
        self._own = alignment.own[alignment.index[model]]
        self._run_end = _run_ends(self._own)
        self._lenders = [sources[reference] for reference in alignment.models]
        self._aligned = dict(tensors[model])
        self._lent = {
            name: [self._counterpart(tensor, tensors[other], other) for other in alignment.models]
            for name, tensor in self._aligned.items()
        }
        self._tensors = dict(self._source.tensors)
        for name, tensor in self._aligned.items():
            shape = list(tensor.info.shape)
            shape[tensor.axis] = alignment.rows
            self._tensors[name] = TensorInfo(name, tensor.info.dtype, tuple(shape))
        self._padding: dict[str, NDArray[Any]] = {}
        self._padding_lock = threading.Lock()

    def _counterpart(
        self, tensor: VocabularyTensor, others: Mapping[str, VocabularyTensor], other: str
    ) -> VocabularyTensor | None:
        """The tensor of model `other` whose rows fill in for those of `tensor`."""
        name = tensor.info.name
        found = others.get(name)
        if found is None and tensor.role == "head":
            embeddings = [entry for entry in others.values() if entry.role == "embedding"]
            if len(embeddings) == 1 and len(tensor.info.shape) == 2:
                found = embeddings[0]
        lends = self._alignment.index[other] in self._alignment.fallback_model
        if found is None:
            if lends:
                raise CheckpointError(
                    f"{other}: tensor {name!r} of {self.label} needs rows for tokens it lacks, "
                    "and there is no such tensor to take them from"
                )
            return None
        if (found.lines, found.width) != (tensor.lines, tensor.width):
            raise CheckpointError(
                f"{other}: tensor {found.info.name!r} has shape {list(found.info.shape)}, that of "
                f"{self.label} {list(tensor.info.shape)}: vocabularies are merged only between "
                "models of one hidden size"
            )
        return found

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read_into(self, name: str, start: int, stop: int, out: memoryview) -> None:
        tensor = self._aligned.get(name)
        if tensor is None:
            self._source.read_into(name, start, stop, out)
            return
        target = np.frombuffer(out, tensor.info.dtype.numpy)
        rows, width = self._alignment.rows, tensor.width
        chunk = max(1, _CHUNK_BYTES // max(1, width * tensor.info.dtype.itemsize))
        done = start
        while done < stop:
            line, within = divmod(done, rows * width)
            first, skip = divmod(within, width)
            last = min(rows, first + chunk, -(-(within + stop - done) // width))
            part = target[done - start : min(stop - start, done - start + last * width - within)]
            if first < self._alignment.size and self._run_end[first] >= last:
                begin = (line * tensor.rows + int(self._own[first])) * width + skip
                self._source.read_into(name, begin, begin + len(part), _bytes_of(part))
            else:
                values = self._rows(tensor, line, first, last)
                part[:] = values.reshape(-1)[skip : skip + len(part)]
            done += len(part)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        if name not in self._aligned:
            self._source.prefetch(name, start, stop)

    def where(self, name: str) -> str:
        return self._source.where(name)

    def identity(self) -> dict[str, Any]:
        alignment = self._alignment
        digest = hashlib.sha256(self._own.tobytes())
        for part in (
            alignment.fallback_start,
            alignment.fallback_model,
            alignment.fallback_row,
        ):
            digest.update(part.tobytes())
        return {
            "label": self.label,
            "source": self._source.identity(),
            "vocabulary_rows": alignment.rows,
            "vocabulary_sha256": digest.hexdigest(),
        }

    def close(self) -> None:
        self._source.close()

    def _rows(self, tensor: VocabularyTensor, line: int, first: int, last: int) -> NDArray[Any]:
        """Output rows `[first, last)` of one line, shape `(last - first, width)`."""
        values = np.empty((last - first, tensor.width), tensor.info.dtype.numpy)
        defined = max(first, min(last, self._alignment.size))
        self._fill_defined(tensor, line, first, values[: defined - first])
        if last > defined:
            values[defined - first :] = self._padding_rows(tensor)[line]
        return values

    def _fill_defined(
        self, tensor: VocabularyTensor, line: int, first: int, values: NDArray[Any]
    ) -> None:
        own = self._own[first : first + len(values)]
        missing = np.flatnonzero(own < 0)
        if len(missing) == 0:
            gather_rows(self._source, tensor, line, own, values)
            return
        if len(missing) < len(own):
            held = np.flatnonzero(own >= 0)
            block = np.empty((len(held), tensor.width), values.dtype)
            gather_rows(self._source, tensor, line, own[held], block)
            values[held] = block
        values[missing] = self._fallback_rows(tensor, line, first + missing).astype(values.dtype)

    def _fallback_rows(self, tensor: VocabularyTensor, line: int, ids: Ids) -> NDArray[Any]:
        """Mean of each id's fallback rows, float32 (float64 for float64 tensors)."""
        alignment = self._alignment
        starts = alignment.fallback_start[ids]
        counts = alignment.fallback_start[ids + 1] - starts
        target = np.repeat(np.arange(len(ids)), counts)
        offset = np.arange(len(target)) - np.repeat(np.cumsum(counts) - counts, counts)
        terms = np.repeat(starts, counts) + offset
        models, rows = alignment.fallback_model[terms], alignment.fallback_row[terms]

        wide = np.float64 if tensor.info.dtype.name == "F64" else np.float32
        total = np.zeros((len(ids), tensor.width), wide)
        for model in np.unique(models):
            lent = self._lent[tensor.info.name][model]
            assert lent is not None
            of_model = np.flatnonzero(models == model)
            block = np.empty((len(of_model), tensor.width), lent.info.dtype.numpy)
            gather_rows(self._lenders[model], lent, line, rows[of_model], block)
            total[target[of_model]] += block.astype(wide)
        return np.asarray(total / np.maximum(counts, 1).astype(wide)[:, None])

    def _padding_rows(self, tensor: VocabularyTensor) -> NDArray[Any]:
        """The mean row of every line, shape `(lines, width)`."""
        with self._padding_lock:
            rows = self._padding.get(tensor.info.name)
            if rows is None:
                rows = np.stack([self._mean_row(tensor, line) for line in range(tensor.lines)])
                self._padding[tensor.info.name] = rows
            return rows

    def _mean_row(self, tensor: VocabularyTensor, line: int) -> NDArray[Any]:
        size = self._alignment.size
        total = np.zeros(tensor.width)
        chunk = max(1, _CHUNK_BYTES // max(1, tensor.width * 8))
        for first in range(0, size, chunk):
            block = self._rows(tensor, line, first, min(size, first + chunk))
            total += block.astype(np.float64).sum(axis=0)
        return (total / size).astype(tensor.info.dtype.numpy)


def gather_rows(
    source: TensorSource, tensor: VocabularyTensor, line: int, rows: Ids, out: NDArray[Any]
) -> None:
    """Read rows of one line of a tensor, in any order, into `out` of shape `(len(rows), width)`.

    Neighbouring rows are read together, straight into `out` when they are all of it.
    """
    name, width = tensor.info.name, tensor.width
    origin = line * tensor.rows * width
    if len(rows) == 0:
        return
    if (np.diff(rows) == 1).all():
        start = origin + int(rows[0]) * width
        source.read_into(name, start, start + len(rows) * width, _bytes_of(out))
        return
    wanted, inverse = np.unique(rows, return_inverse=True)
    gathered = np.empty((len(wanted), width), out.dtype)
    gap = 1 + _GAP_BYTES // max(1, width * out.dtype.itemsize)
    for first, last in _runs(wanted, gap):
        low, high = int(wanted[first]), int(wanted[last - 1]) + 1
        block = np.empty((high - low, width), out.dtype)
        source.read_into(name, origin + low * width, origin + high * width, _bytes_of(block))
        gathered[first:last] = block[wanted[first:last] - low]
    np.take(gathered, inverse, axis=0, out=out)


def _run_ends(own: Ids) -> Ids:
    """For each id the end of the stretch from it on whose own rows follow one another; at most
    the id itself where there is no own row."""
    ids = np.arange(len(own))
    last = np.ones(len(own), bool)
    last[:-1] = np.diff(own) != 1
    ends = np.flatnonzero(last) + 1
    return np.where(own < 0, ids, ends[np.searchsorted(ends, ids, side="right")])


def _runs(wanted: Ids, gap: int) -> Iterator[tuple[int, int]]:
    """Index ranges of ascending rows in which no step is larger than `gap`."""
    breaks = (np.flatnonzero(np.diff(wanted) > gap) + 1).tolist()
    return itertools.pairwise([0, *breaks, len(wanted)])


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def embedding_rows(tensors: Mapping[str, VocabularyTensor], label: str) -> int:
    """Rows that all of a model's vocabulary tensors have.

    Raises:
        CheckpointError: the model has no input embedding.
    """
    if not any(tensor.role == "embedding" for tensor in tensors.values()):
        raise CheckpointError(f"{label}: no token embedding found among its tensors")
    return min(tensor.rows for tensor in tensors.values())
