"""Tiny vocabularies, model folders and counting sources for the tokenizer tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fusekit.checkpoint.memory import MemorySource
from fusekit.checkpoint.source import TensorInfo, TensorSource
from fusekit.tokenizers.embedding import align_sources, vocabulary_tensors
from fusekit.tokenizers.union import (
    MergedVocabulary,
    TokenizerSpec,
    VocabularyInput,
    merge_vocabularies,
)
from fusekit.tokenizers.vocabulary import AddedToken, Vocabulary

VECTORS = Path(__file__).parent.parent / "vectors"
EMBED = "model.embed_tokens.weight"


class CountingSource(TensorSource):
    """Counts the reads and elements asked of another source."""

    def __init__(self, source: TensorSource) -> None:
        self.label = source.label
        self._source = source
        self.reads: list[tuple[str, int, int]] = []

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._source.tensors

    def read_into(self, name: str, start: int, stop: int, out: memoryview) -> None:
        self.reads.append((name, start, stop))
        self._source.read_into(name, start, stop, out)


def vocabulary(tokens: Sequence[str] | Mapping[str, int], added: Sequence[str] = ()) -> Vocabulary:
    ids = dict(tokens) if isinstance(tokens, Mapping) else {t: i for i, t in enumerate(tokens)}
    entries = {token: AddedToken(token, ids[token], special=True) for token in added}
    return Vocabulary("memory", ids, entries)


def inputs_of(
    vocabularies: Mapping[str, Vocabulary], matrices: Mapping[str, np.ndarray]
) -> list[VocabularyInput]:
    return [VocabularyInput(name, vocabularies[name], len(matrices[name])) for name in vocabularies]


def aligned_matrices(
    vocabularies: Mapping[str, Vocabulary],
    matrices: Mapping[str, np.ndarray],
    spec: TokenizerSpec | None = None,
    base: str | None = None,
) -> tuple[MergedVocabulary, dict[str, np.ndarray]]:
    """Every model's whole embedding in the merged vocabulary."""
    merged = merge_vocabularies(inputs_of(vocabularies, matrices), spec or TokenizerSpec(), base)
    sources: dict[str, TensorSource] = {
        name: MemorySource({EMBED: matrix}) for name, matrix in matrices.items()
    }
    tensors = {
        name: vocabulary_tensors(source.tensors, tokens=1, vocab_size=len(matrices[name]))
        for name, source in sources.items()
    }
    aligned = align_sources(sources, tensors, merged.alignment)
    return merged, {name: read_tensor(source, EMBED) for name, source in aligned.items()}


def read_tensor(source: TensorSource, name: str) -> np.ndarray:
    info = source.tensors[name]
    values = np.empty(info.shape, info.dtype.numpy)
    source.read_into(name, 0, info.size, memoryview(values.reshape(-1).view(np.uint8)))
    return values


def bpe_document(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]] = (), special: Sequence[str] = ()
) -> dict[str, Any]:
    """A Metaspace BPE tokenizer.json."""
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    ids = {token: index for index, token in enumerate(tokens)}
    return {
        "version": "1.0",
        "added_tokens": [AddedToken(t, ids[t], special=True).to_json() for t in special],
        "normalizer": None,
        "pre_tokenizer": space,
        "post_processor": None,
        "decoder": space,
        "model": {
            "type": "BPE",
            "unk_token": None,
            "vocab": ids,
            "merges": [list(merge) for merge in merges],
        },
    }


def write_model(
    folder: Path,
    document: Mapping[str, Any] | None,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """A model folder; `document` is its tokenizer.json."""
    folder.mkdir(parents=True)
    if document is not None:
        (folder / "tokenizer.json").write_text(json.dumps(document))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(dict(config or {})))
    save_file(
        {name: np.ascontiguousarray(v) for name, v in tensors.items()}, folder / "model.safetensors"
    )
    return folder
