"""Tokenizers that come with adapters: of models whose vocabulary grew before they were adapted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fusekit.checkpoint.folder import Checkpoint, refuse_links_out
from fusekit.checkpoint.source import TensorInfo
from fusekit.checkpoint.views import LoraSource
from fusekit.engine.chat_template import template_in
from fusekit.engine.matching import is_head
from fusekit.tokenizers.config import config_vocab_size
from fusekit.tokenizers.embedding import EMBEDDING_NAMES
from fusekit.tokenizers.vocabulary import (
    TEMPLATE_FILES,
    Vocabulary,
    has_tokenizer,
    is_tokenizer_file,
    read_vocabulary,
)


def tokenizer_folder(checkpoint: Checkpoint) -> Path | None:
    """Where a model's tokenizer is: with the adapter, if that changes the embedding and knows more
    tokens than the model it is folded into.

    Raises:
        CheckpointError: a tokenizer that cannot be read, or that is a link out of its folder.
    """
    own, adapter = checkpoint.folder, checkpoint.adapter
    if adapter is None or not has_tokenizer(adapter) or not _changes_embedding(checkpoint):
        return own
    refuse_links_out(adapter)
    if own is None or not has_tokenizer(own):
        return own if resized_rows(checkpoint) is None else adapter
    knows_more = read_vocabulary(adapter).ids.keys() - read_vocabulary(own).ids.keys()
    return adapter if knows_more else own


def vocabulary_size(checkpoint: Checkpoint) -> int | None:
    """`vocab_size` of a model's config, or the rows that an adapter gives its embedding instead."""
    return resized_rows(checkpoint) or config_vocab_size(checkpoint.config())


def resized_rows(checkpoint: Checkpoint) -> int | None:
    """How many rows an adapter gives the embedding, where that is another number than before."""
    source = checkpoint.source
    if not isinstance(source, LoraSource):
        return None
    before = source.base.tensors
    resized = (
        info.shape[0]
        for name, info in source.tensors.items()
        if EMBEDDING_NAMES.search(name) and name in before and info.shape != before[name].shape
    )
    return next(resized, None)


def carried_tokenizer(
    checkpoints: Sequence[Checkpoint], reference: Checkpoint, written: Sequence[TensorInfo]
) -> tuple[dict[str, bytes | None], tuple[str, ...]]:
    """An adapter's tokenizer as files of the output (None: to leave out), and what to say of it.

    It is taken if all its tokens have rows in the output and it keeps the ids of the reference's
    tokenizer, or is the reference's own; of several the one that knows most tokens.

    Args:
        checkpoints: all models.
        reference: the one whose config and tokenizer the output has otherwise.
        written: the output's tensors.
    """
    if all(each.adapter is None for each in checkpoints):
        return {}, ()
    notes = [*_without_tokenizer(checkpoints), *_without_head(checkpoints, written)]
    brought = {
        each.reference: read_vocabulary(each.adapter)
        for each in checkpoints
        if each.adapter is not None and tokenizer_folder(each) == each.adapter
    }
    known = _ids(reference.folder) if brought else {}
    rows = min((i.shape[0] for i in written if _is_embedding(i) or is_head(i)), default=0)
    fitting = {
        name: vocabulary
        for name, vocabulary in brought.items()
        if vocabulary.size <= rows
        and (name == reference.reference or known.items() < vocabulary.ids.items())
    }
    if not fitting:
        return {}, tuple(notes)
    chosen = max(fitting, key=lambda name: len(fitting[name].ids))
    notes += _conflicts(chosen, brought, rows)
    ids, folder = fitting[chosen].ids, fitting[chosen].folder
    assert folder is not None
    new = sorted(ids.keys() - known.keys(), key=lambda token: ids[token])
    notes.append(
        f"the tokenizer is that of the adapter {folder}, which knows {len(new)} more token(s) than "
        f"that of {reference.folder}, such as {new[0]!r}"
    )
    return _files(reference, folder), tuple(notes)


def _without_tokenizer(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """That an adapter has resized the embedding and the tokenizer for it is not there."""
    return [
        f"{each.reference}: the adapter gives the embedding {rows} rows and comes without a "
        f"tokenizer; put it into {each.adapter} to have it in the output"
        for each in checkpoints
        if (rows := resized_rows(each)) is not None
        and each.folder is not None
        and each.adapter is not None
        and has_tokenizer(each.folder)
        and not has_tokenizer(each.adapter)
    ]


def _without_head(checkpoints: Sequence[Checkpoint], written: Sequence[TensorInfo]) -> list[str]:
    """That an adapter has resized the embedding and not the head, which PEFT leaves out if the
    embedding is adapted itself."""
    embeddings = {info.shape[0] for info in written if _is_embedding(info)}
    heads = {info.shape[0] for info in written if is_head(info)}
    return [
        f"{each.reference}: the adapter gives the embedding {rows} rows, and the head has "
        f"{min(heads - {rows})}: few libraries load that"
        for each in checkpoints
        if (rows := resized_rows(each)) in embeddings and heads - {rows}
    ]


def _is_embedding(info: TensorInfo) -> bool:
    return len(info.shape) > 0 and bool(EMBEDDING_NAMES.search(info.name))


def _changes_embedding(checkpoint: Checkpoint) -> bool:
    source = checkpoint.source
    return isinstance(source, LoraSource) and any(
        EMBEDDING_NAMES.search(name) and source.changes(name) for name in source.tensors
    )


def _ids(folder: Path | None) -> Mapping[str, int]:
    """The tokens of a folder's tokenizer, none where it has none that can be read."""
    return {} if folder is None or not has_tokenizer(folder) else read_vocabulary(folder).ids


def _conflicts(chosen: str, brought: Mapping[str, Vocabulary], rows: int) -> list[str]:
    """Where rows of the output are different tokens to the adapters that are merged."""
    mine = {number: token for token, number in brought[chosen].ids.items() if number < rows}
    notes = []
    for name, vocabulary in brought.items():
        differing = sorted(
            (number, token)
            for token, number in vocabulary.ids.items()
            if mine.get(number, token) != token
        )
        if differing:
            number, token = differing[0]
            notes.append(
                f"the adapters of {chosen} and {name} give {len(differing)} row(s) to different "
                f"tokens, such as row {number} to {mine[number]!r} and {token!r}; set "
                "tokenizer_source: union to align them"
            )
    return notes


def _files(reference: Checkpoint, adapter: Path) -> dict[str, bytes | None]:
    """An adapter's tokenizer in the place of the reference's; a template that only the reference
    has stays."""
    kept = () if template_in(adapter) is not None else TEMPLATE_FILES
    files: dict[str, bytes | None] = {
        path.name: None
        for path in reference.companions()
        if path.parent == reference.folder
        and is_tokenizer_file(path.name)
        and path.name not in kept
    }
    return files | {
        path.name: path.read_bytes()
        for path in sorted(adapter.iterdir())
        if path.is_file() and is_tokenizer_file(path.name)
    }
