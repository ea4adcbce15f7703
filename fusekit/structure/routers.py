"""Rows of a mixture's routers, made from what prompts look like inside the base model.

A prompt's tokens are padded on the left; `mask` is 1 on its own tokens and 0 on padding.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Position = Literal["last", "average"]

_TINY = 1e-8


def embedding_direction(embedding: Array, ids: Array, mask: Array) -> Array:
    """Sum of the embedding rows of all prompts' tokens, of length 1.

    Args:
        embedding: (tokens, H).
        ids: (prompts, positions) token ids.
        mask: (prompts, positions).
    """
    rows = embedding[ids].astype(np.float64) * mask[..., None]
    total: Array = rows.sum(axis=(0, 1))
    return total / max(float(np.linalg.norm(total)), _TINY)


def hidden_directions(states: Array, mask: Array, position: Position) -> Array:
    """Mean over prompts of every layer's input at the last position, or over a prompt's tokens.

    Args:
        states: (layers + 1, prompts, positions, H), the embeddings first; the last entry, which is
            no layer's input, is not used.
        mask: (prompts, positions).

    Returns:
        (layers, H).
    """
    inputs = states[:-1].astype(np.float64)
    if position == "last":
        last: Array = inputs[:, :, -1].mean(axis=1)
        return last
    weights = mask / mask.sum(axis=1, keepdims=True)
    average: Array = np.einsum("lpth,pt->lph", inputs, weights).mean(axis=1)
    return average


def router_rows(positive: Array, negative: Array | None = None) -> Array:
    """`v / max(||v||, 1e-8)` with `v = positive - negative`, over the last axis."""
    difference = positive if negative is None else positive - negative
    norms = np.linalg.norm(difference, axis=-1, keepdims=True)
    rows: Array = difference / np.maximum(norms, _TINY)
    return rows


def degenerate_layers(routers: Array, limit: float = 5.0) -> list[int]:
    """Layers whose router has a condition number above `limit`: experts it can hardly tell apart.

    Args:
        routers: (layers, experts, H).
    """
    return [
        layer
        for layer, router in enumerate(routers)
        if np.linalg.cond(router.astype(np.float64)) > limit
    ]
