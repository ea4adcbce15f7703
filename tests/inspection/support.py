"""Synthetic checkpoints in which the truth is planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Array = np.ndarray[Any, np.dtype[Any]]
StateDict = dict[str, Array]

LAYERS, HIDDEN, INNER, VOCABULARY = 3, 96, 160, 300


def base_model(seed: int = 0, vocabulary: int = VOCABULARY) -> StateDict:
    """A small Llama-shaped model, float32."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return (0.05 * rng.standard_normal(shape)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": normal(vocabulary, HIDDEN)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        tensors[f"{at}.self_attn.q_proj.weight"] = normal(HIDDEN, HIDDEN)
        tensors[f"{at}.mlp.up_proj.weight"] = normal(INNER, HIDDEN)
        tensors[f"{at}.input_layernorm.weight"] = np.ones(HIDDEN, np.float32)
    tensors["lm_head.weight"] = normal(vocabulary, HIDDEN)
    return tensors


def moved(base: StateDict, deltas: StateDict) -> StateDict:
    """The base plus a task vector (tensors without one stay)."""
    return {k: (v + deltas[k]).astype(v.dtype) if k in deltas else v for k, v in base.items()}


def noise(base: StateDict, seed: int, scale: float = 0.005) -> StateDict:
    """A dense random task vector for every tensor."""
    rng = np.random.default_rng(seed)
    return {k: (scale * rng.standard_normal(v.shape)).astype(np.float32) for k, v in base.items()}


def low_rank(base: StateDict, rank: int, seed: int, scale: float = 0.01) -> StateDict:
    """A task vector of a given rank with equal singular values, on projections only."""
    rng = np.random.default_rng(seed)
    deltas = {}
    for name, values in base.items():
        if "_proj" in name:
            left = np.linalg.qr(rng.standard_normal((values.shape[0], rank)))[0]
            right = np.linalg.qr(rng.standard_normal((values.shape[1], rank)))[0]
            deltas[name] = (scale * left @ right.T).astype(np.float32)
    return deltas


def mixed(first: StateDict, second: StateDict, cosine: float) -> StateDict:
    """A task vector with (in expectation) this cosine to `first`."""
    sine = np.sqrt(1 - cosine**2)
    return {k: (cosine * first[k] + sine * second[k]).astype(np.float32) for k in first}


def save(folder: Path, tensors: StateDict, config: dict[str, Any] | None = None) -> Path:
    """A checkpoint folder."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}), encoding="utf-8")
    return folder
