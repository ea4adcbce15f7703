"""Prompts as token ids, and what the base model makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fusekit.checkpoint.folder import Checkpoint
from fusekit.errors import CheckpointError, MissingExtraError, RecipeError
from fusekit.structure.routers import (
    Array,
    embedding_direction,
    hidden_directions,
    router_rows,
)

GateMode = Literal["hidden", "hidden_avg", "gate_input", "cheap_embed", "random", "uniform_random"]
Rows = Callable[[Sequence[str], Sequence[str]], Array]
"""(positive prompts, negative prompts) -> one row per layer, (layers, H)."""


def encode(folder: Path, prompts: Sequence[str]) -> tuple[Array, Array]:
    """Token ids of the prompts, after the bos token, padded on the left, and their mask.

    Returns:
        Both (prompts, positions).

    Raises:
        CheckpointError: no tokenizer.json, or neither a bos nor an eos token to pad with.
    """
    from tokenizers import Tokenizer

    from fusekit.tokenizers.vocabulary import read_vocabulary

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no tokenizer.json, which reading prompts needs")
    vocabulary = read_vocabulary(folder)
    bos, eos = (vocabulary.roles.get(role) for role in ("bos_token", "eos_token"))
    filler = bos or eos
    if filler is None:
        raise CheckpointError(f"{folder}: the tokenizer has neither a bos nor an eos token")
    tokenizer = Tokenizer.from_file(str(path))
    start = [vocabulary.ids[bos]] if bos is not None else []
    rows = [start + tokenizer.encode(text, add_special_tokens=False).ids for text in prompts]
    width = max(map(len, rows))
    ids = np.full((len(rows), width), vocabulary.ids[filler], np.int64)
    mask = np.zeros((len(rows), width), np.float64)
    for i, row in enumerate(rows):
        if row:
            ids[i, -len(row) :] = row
            mask[i, -len(row) :] = 1.0
    if not mask.any(axis=1).all():
        empty = prompts[int(np.argmin(mask.any(axis=1)))]
        raise RecipeError(f"prompt {empty!r}: has no tokens")
    return ids, mask


def prompt_rows(base: Checkpoint, mode: GateMode, layers: int, device: str = "cpu") -> Rows:
    """How rows are made from prompts: by embeddings alone, or by running the base model.

    Raises:
        MissingExtraError: the base must be run and torch is missing.
        CheckpointError: no folder with a tokenizer.
    """
    folder = base.folder
    if folder is None:
        raise CheckpointError(f"{base.reference}: a single file has no tokenizer to read prompts")
    if mode == "cheap_embed":
        return _embedding_rows(base, folder, layers)
    return _hidden_rows(folder, mode, device)


def _embedding_rows(base: Checkpoint, folder: Path, layers: int) -> Rows:
    from fusekit.tokenizers.embedding import EMBEDDING_NAMES

    name = next((n for n in base.source.tensors if EMBEDDING_NAMES.search(n)), None)
    if name is None:
        raise CheckpointError(f"{base.source.label}: no token embedding found among its tensors")
    info = base.source.tensors[name]
    embedding = np.empty(info.shape, info.dtype.numpy)
    base.source.read_into(name, 0, info.size, embedding.reshape(-1).view(np.uint8).data)

    def direction(prompts: Sequence[str]) -> Array:
        return embedding_direction(embedding, *encode(folder, prompts))

    def rows(positive: Sequence[str], negative: Sequence[str]) -> Array:
        row = router_rows(direction(positive), direction(negative) if negative else None)
        return np.repeat(row[None], layers, axis=0)

    return rows


def _hidden_rows(folder: Path, mode: GateMode, device: str) -> Rows:
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ModuleNotFoundError:
        raise MissingExtraError(f"gate_mode {mode}", "torch") from None
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.to(device).eval()
    captured: list[Any] = []
    if mode == "gate_input":
        for name, module in model.named_modules():
            if name.endswith(".mlp"):
                module.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))

    def directions(prompts: Sequence[str]) -> Array:
        ids, mask = encode(folder, prompts)
        captured.clear()
        with torch.no_grad():
            output = model(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask).long().to(device),
                output_hidden_states=True,
                use_cache=False,
            )
        # Router inputs have no entry after the last layer, hidden states do.
        states = [*captured, captured[-1]] if mode == "gate_input" else output.hidden_states
        stacked = torch.stack(list(states)).float().cpu().numpy()
        return hidden_directions(stacked, mask, "average" if mode == "hidden_avg" else "last")

    def rows(positive: Sequence[str], negative: Sequence[str]) -> Array:
        return router_rows(directions(positive), directions(negative) if negative else None)

    return rows
