"""Tokenizer transplantation on folders: a complete model with another model's tokenizer."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusekit.checkpoint.folder import Checkpoint, open_checkpoint
from fusekit.checkpoint.layout import DEFAULT_SHARD_BYTES, lay_out
from fusekit.checkpoint.memory import MemorySource
from fusekit.checkpoint.source import TensorInfo, TensorSource
from fusekit.checkpoint.writer import CheckpointWriter, PartialFolder, check_target
from fusekit.errors import CheckpointError
from fusekit.tokenizers import matching
from fusekit.tokenizers.approximate import Array, poorly_trained
from fusekit.tokenizers.config import config_vocab_size, remapped_config, with_vocab_size
from fusekit.tokenizers.embedding import VocabularyTensor, vocabulary_tensors
from fusekit.tokenizers.files import tokenizer_files
from fusekit.tokenizers.matching import Matching
from fusekit.tokenizers.transplant import TransplantOptions, transplant, unused_ids
from fusekit.tokenizers.vocabulary import (
    Vocabulary,
    is_tokenizer_file,
    read_json,
    read_vocabulary,
)

_COPY_BYTES = 8 * 1024 * 1024
_DONOR_IDS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"})


@dataclass(frozen=True)
class TransplantReport:
    """What became of the donor's tokens.

    `shared` were copied; `rows` is the new vocab_size. `digits` tokens are digits only and
    `digits_shared` of them the model has: where few, numbers are cut differently and arithmetic
    suffers. `zeroed` tokens were poorly trained in both models.
    """

    tokens: int
    shared: int
    rows: int
    digits: int
    digits_shared: int
    zeroed: int
    notes: tuple[str, ...]


def transplant_tokens(
    model_dir: Path,
    donor_dir: Path,
    out_dir: Path,
    options: TransplantOptions | None = None,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> TransplantReport:
    """Write a copy of a model that uses the donor's tokenizer.

    All tensors but embeddings and heads are streamed over unchanged. The folder is written as
    `<out_dir>.partial` and renamed when every byte is on disk.

    Args:
        model_dir: the model whose weights are kept.
        donor_dir: the model whose tokenizer (and embedding) is used.
        out_dir: the folder to write; it must not exist.
        options: the method and its settings.
        shard_bytes: largest size of an output file (a larger tensor gets one of its own).

    Raises:
        CheckpointError: a missing tokenizer, embedding or config.
        FusekitError: `out_dir` holds something already or cannot be created, or the vocabularies
            share no token and the method needs some.
    """
    options = options or TransplantOptions()
    check_target(out_dir, overwrite=False)
    with _opened(model_dir) as model, _opened(donor_dir) as donor:
        replaced, report = _replaced_tensors(model, donor, options)
        source = _ReplacedSource(model.source, MemorySource(replaced))
        _write(source, _companions(model, donor, report.rows), out_dir, shard_bytes)
    return report


@dataclass(frozen=True)
class _Side:
    """One of the two models."""

    folder: Path
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    vocabulary: Vocabulary
    tensors: Mapping[str, VocabularyTensor]

    @property
    def source(self) -> TensorSource:
        return self.checkpoint.source

    @property
    def rows(self) -> int:
        return min(tensor.rows for tensor in self.tensors.values())

    def like(self, tensor: VocabularyTensor) -> VocabularyTensor:
        """The tensor that plays the part of another model's: by name, by role, else the embedding
        (which is the head too where weights are tied)."""
        same_role = [entry for entry in self.tensors.values() if entry.role == tensor.role]
        embeddings = [entry for entry in self.tensors.values() if entry.role == "embedding"]
        named = self.tensors.get(tensor.info.name)
        return named or next(iter([*same_role, *embeddings]))

    def matrix(self, tensor: VocabularyTensor) -> Array:
        """A vocabulary tensor as (rows, width) in its stored type."""
        values = np.empty(tensor.info.shape, tensor.info.dtype.numpy)
        flat = values.reshape(-1).view(np.uint8).data
        self.source.read_into(tensor.info.name, 0, tensor.info.size, flat)
        return values if values.ndim == 2 else values[:, None]


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[_Side]:
    vocabulary = read_vocabulary(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json found")
    config = read_json(folder / "config.json")
    checkpoint = open_checkpoint(str(folder))
    try:
        found = vocabulary_tensors(
            checkpoint.source.tensors,
            tokens=vocabulary.size,
            vocab_size=config_vocab_size(config),
        )
        if not any(tensor.role == "embedding" for tensor in found.values()):
            raise CheckpointError(f"{folder}: no token embedding found among its tensors")
        for name, tensor in found.items():
            if tensor.axis != 0 or len(tensor.info.shape) > 2:
                raise CheckpointError(
                    f"{folder}: tensor {name!r} has shape {list(tensor.info.shape)}, expected one "
                    "row per token"
                )
        yield _Side(folder, checkpoint, config, vocabulary, found)
    finally:
        checkpoint.source.close()


def _replaced_tensors(
    model: _Side, donor: _Side, options: TransplantOptions
) -> tuple[dict[str, Array], TransplantReport]:
    matched = matching.match_tokens(model.vocabulary, donor.vocabulary, model.rows, donor.rows)
    untrained = None
    if options.zero_untrained:
        poor = _poor(donor)[matched.shared_donor] & _poor(model)[matched.shared_model]
        untrained = matched.shared_donor[poor]
    replaced: dict[str, Array] = {}
    for name, tensor in model.tensors.items():
        rows = model.matrix(tensor)[: model.rows]
        is_head = tensor.role == "head"
        if len(tensor.info.shape) == 1:  # a bias says nothing a donor's bias could describe
            plain = TransplantOptions(method="mean")
            donor_rows = np.zeros((donor.rows, 1), np.float32)
            new = transplant(
                rows, donor_rows, model.vocabulary, donor.vocabulary, plain, head=is_head
            )
        else:
            donor_rows = donor.matrix(donor.like(tensor))[: donor.rows]
            new = transplant(
                rows,
                donor_rows,
                model.vocabulary,
                donor.vocabulary,
                options,
                head=is_head,
                untrained=untrained,
            )
        replaced[name] = new.reshape(len(new), *tensor.info.shape[1:])
    return replaced, _report(model, donor, matched, options, untrained)


def _poor(side: _Side) -> NDArray[np.bool_]:
    """Per id, whether the token looks poorly trained in the embedding or the head."""
    unused = unused_ids(side.vocabulary, side.rows)
    matrices = [entry for entry in side.tensors.values() if len(entry.info.shape) == 2]
    poor = np.zeros(side.rows, np.bool_)
    for entry in matrices:
        poor |= poorly_trained(side.matrix(entry)[: side.rows], unused)
    return poor


def _report(
    model: _Side,
    donor: _Side,
    matched: Matching,
    options: TransplantOptions,
    untrained: NDArray[np.int64] | None,
) -> TransplantReport:
    shared = len(matched.shared_donor)
    zeroed = 0 if untrained is None else len(untrained)
    digits, digits_shared = matching.digit_tokens(matched, donor.vocabulary)
    notes = []
    if options.method in ("omp", "common_interpolation") and options.k > shared - zeroed:
        notes.append(f"k reduced from {options.k} to {shared - zeroed}, the shared tokens")
    for side in (model, donor):
        beyond = sum(number >= side.rows for number in side.vocabulary.ids.values())
        if beyond:
            notes.append(f"{side.folder}: {beyond} tokens have no embedding row and are ignored")
    if digits_shared < digits:
        notes.append(
            f"only {digits_shared} of {digits} digit tokens are shared: numbers are cut differently"
        )
    rows = max(donor.rows, donor.vocabulary.size)
    return TransplantReport(
        len(donor.vocabulary.ids), shared, rows, digits, digits_shared, zeroed, tuple(notes)
    )


def _companions(model: _Side, donor: _Side, rows: int) -> dict[str, bytes]:
    """The files beside the weights: the donor's tokenizer, everything else from the model."""
    matched = matching.match_tokens(model.vocabulary, donor.vocabulary, model.rows, donor.rows)
    new_ids = np.full(model.rows, -1, np.int64)
    new_ids[matched.shared_model[::-1]] = matched.shared_donor[::-1]
    files = {
        path.name: path.read_bytes()
        for path in model.checkpoint.companions()
        if not is_tokenizer_file(path.name)
    }
    files |= tokenizer_files(donor.vocabulary)
    token_ids = _special_ids(donor, donor.config)
    config = _with_token_ids(remapped_config(model.config, new_ids, _DONOR_IDS), token_ids)
    files["config.json"] = _json_bytes(with_vocab_size(config, rows))
    if "generation_config.json" in files:
        own = read_json(model.folder / "generation_config.json")
        theirs = donor.folder / "generation_config.json"
        if theirs.is_file():
            token_ids = token_ids | _special_ids(donor, read_json(theirs))
        generation = _with_token_ids(remapped_config(own, new_ids, _DONOR_IDS), token_ids)
        files["generation_config.json"] = _json_bytes(generation)
    return files


def _special_ids(donor: _Side, config: Mapping[str, Any]) -> dict[str, Any]:
    """The donor's bos, eos, pad and unk ids, from a config (or its text tower) or the tokenizer."""
    tower = config.get("text_config")
    found: dict[str, Any] = {}
    for key in sorted(_DONOR_IDS):
        value = config.get(key)
        if value is None and isinstance(tower, Mapping):
            value = tower.get(key)
        if value is None:
            value = donor.vocabulary.ids.get(
                donor.vocabulary.roles.get(key.removesuffix("_id"), "")
            )
        if value is not None:
            found[key] = value
    return found


def _with_token_ids(config: Mapping[str, Any], ids: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the special ids wherever it has them, else at its top."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            known = {name: ids.get(name) for name in _DONOR_IDS if name in value}
            changed[key] = {**value, **known}
        else:
            changed[key] = ids.get(key) if key in _DONOR_IDS else value
    nested = {name for value in changed.values() if isinstance(value, Mapping) for name in value}
    absent = ids.keys() - nested - {"unk_token_id"}
    return changed | {key: ids[key] for key in sorted(absent)}


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()


class _ReplacedSource(TensorSource):
    """A source with some tensors taken from another."""

    def __init__(self, source: TensorSource, replaced: TensorSource) -> None:
        self.label = source.label
        self._owner = {
            name: replaced if name in replaced.tensors else source for name in source.tensors
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: owner.tensors[name] for name, owner in self._owner.items()}

    def read_into(self, name: str, start: int, stop: int, out: memoryview) -> None:
        self._owner[name].read_into(name, start, stop, out)


def _write(
    source: TensorSource, files: Mapping[str, bytes], target: Path, shard_bytes: int
) -> None:
    """All tensors and files as a new folder that appears when it is complete."""
    layout = lay_out(source.tensors.values(), shard_bytes)
    writer = CheckpointWriter(PartialFolder(target), layout)
    try:
        buffer = memoryview(bytearray(_COPY_BYTES))
        for info in source.tensors.values():
            width = info.dtype.itemsize
            step = _COPY_BYTES // width
            for start in range(0, info.size, step):
                stop = min(info.size, start + step)
                view = buffer[: (stop - start) * width]
                source.read_into(info.name, start, stop, view)
                writer.write(info.name, start * width, view)
        for name, index in layout.indexes().items():
            writer.add_file(name, index.encode())
        for name, content in files.items():
            writer.add_file(name, content)
        writer.publish()
    except BaseException:
        writer.close()
        shutil.rmtree(writer.folder, ignore_errors=True)
        raise
