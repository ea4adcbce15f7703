"""The `tokenizer` section of a recipe: models re-indexed to one vocabulary before a merge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fusekit.checkpoint.folder import Checkpoint
from fusekit.engine.adapter_tokenizer import tokenizer_folder, vocabulary_size
from fusekit.engine.operands import Operands
from fusekit.recipe.schema import Recipe


@dataclass(frozen=True)
class Vocabulary:
    """What a common vocabulary changes: the models, files beside the weights, the config."""

    checkpoints: tuple[Checkpoint, ...]
    files: Mapping[str, bytes | None] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def common_vocabulary(
    recipe: Recipe, operands: Operands, checkpoints: Sequence[Checkpoint]
) -> Vocabulary:
    """All models in the recipe's output vocabulary; as they are where it asks for none.

    Raises:
        RecipeError, CheckpointError: settings that name no model or token, models without
            tokenizers, embeddings of different width.
    """
    reference = next(c for c in checkpoints if c.reference == operands.reference)
    settings = recipe.tokenizer_source if recipe.tokenizer is None else recipe.tokenizer
    if settings is None:
        notes = _different_ends(operands, checkpoints)
        return Vocabulary(tuple(checkpoints), config=reference.config(), notes=notes)

    from fusekit.tokenizers.config import remapped_config, with_vocab_size
    from fusekit.tokenizers.embedding import align_sources
    from fusekit.tokenizers.union import merge_vocabularies, tokenizer_spec
    from fusekit.tokenizers.vocabulary import TOKENIZER_FILES, read_json

    spec = tokenizer_spec(settings)
    inputs, tensors = [], {}
    for checkpoint in checkpoints:
        entry, tensors[checkpoint.reference] = _vocabulary_input(checkpoint)
        inputs.append(entry)
    merged = merge_vocabularies(inputs, spec, recipe.base_model)
    sources = {checkpoint.reference: checkpoint.source for checkpoint in checkpoints}
    aligned = align_sources(sources, tensors, merged.alignment)

    new_ids = merged.alignment.new_ids(
        reference.reference, next(e.rows for e in inputs if e.reference == reference.reference)
    )
    files: dict[str, bytes | None] = dict.fromkeys(TOKENIZER_FILES)
    files |= merged.files
    config = reference.config()
    if config is not None:
        config = with_vocab_size(remapped_config(config, new_ids), merged.alignment.rows)
    if reference.folder is not None and (reference.folder / "generation_config.json").is_file():
        generation = remapped_config(
            read_json(reference.folder / "generation_config.json"), new_ids
        )
        files["generation_config.json"] = json.dumps(generation, indent=2).encode() + b"\n"
    return Vocabulary(
        tuple(replace(c, source=aligned[c.reference]) for c in checkpoints),
        files,
        config,
        merged.notes,
    )


def _different_ends(operands: Operands, checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """A note where the embedding and the head come from models with different tokenizers."""
    folders = {checkpoint.reference: tokenizer_folder(checkpoint) for checkpoint in checkpoints}
    for section in operands.sections:
        ends = [part.operands[0].model for part in (section.slices[0], section.slices[-1])]
        paths = [folder / "tokenizer.json" for end in ends if (folder := folders[end]) is not None]
        if len(paths) == 2 and all(path.is_file() for path in paths):
            first, last = (path.read_bytes() for path in paths)
            if first != last:
                return (
                    f"embeddings come from {ends[0]} and the head from {ends[1]}, whose tokenizers "
                    "differ; set tokenizer_source to align them",
                )
    return ()


def _vocabulary_input(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """A model's tokenizer and usable rows, and its embedding and head tensors."""
    from fusekit.tokenizers.embedding import embedding_rows, vocabulary_tensors
    from fusekit.tokenizers.union import VocabularyInput
    from fusekit.tokenizers.vocabulary import has_tokenizer, read_vocabulary

    folder = tokenizer_folder(checkpoint)
    known = read_vocabulary(folder) if folder is not None and has_tokenizer(folder) else None
    size = vocabulary_size(checkpoint)
    tokens = known.size if known is not None else size or 1
    tensors = vocabulary_tensors(checkpoint.source.tensors, tokens=tokens, vocab_size=size)
    rows = embedding_rows(tensors, checkpoint.reference)
    return VocabularyInput(checkpoint.reference, known, rows, size), tensors
