"""Llama-shaped checkpoints of a chosen size for the benchmarks: a base and models near it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from fusekit.checkpoint.dtypes import dtype_named
from fusekit.checkpoint.layout import Layout, lay_out
from fusekit.checkpoint.source import TensorInfo

VOCABULARY = 32000


def llama_shapes(parameters: float) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a Llama-style model with roughly this many parameters; 0: next to none."""
    if not parameters:
        return _shapes(1, 64, vocabulary=64)
    layers = 24 if parameters < 2e9 else 32
    hidden = 256
    while _count(_shapes(layers, hidden + 128)) <= parameters:
        hidden += 128
    return _shapes(layers, hidden)


def _shapes(layers: int, hidden: int, vocabulary: int = VOCABULARY) -> dict[str, tuple[int, ...]]:
    inner = max(128, int(hidden * 8 / 3) // 128 * 128)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        prefix = f"model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}self_attn.{name}.weight"] = (hidden, hidden)
        shapes[f"{prefix}mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def _config(shapes: dict[str, tuple[int, ...]]) -> str:
    """A config.json with which other software recognises these shapes."""
    vocabulary, hidden = shapes["model.embed_tokens.weight"]
    return json.dumps(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": shapes["model.layers.0.mlp.up_proj.weight"][0],
            "num_hidden_layers": sum(name.endswith("up_proj.weight") for name in shapes),
            "num_attention_heads": hidden // 64,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
    )


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())


def _layout(shapes: dict[str, tuple[int, ...]], dtype: str) -> Layout:
    kind = dtype_named(dtype)
    infos = [TensorInfo(name, kind, shape) for name, shape in shapes.items()]
    return lay_out(infos, shard_bytes=1 << 62)


def write_family(folder: Path, parameters: float, models: int, dtype: str = "bfloat16") -> None:
    """`folder/base` and `folder/model0..`: base ~ N(0, 0.02), models base + N(0, 0.002)."""
    shapes = llama_shapes(parameters)
    layout = _layout(shapes, dtype)
    names = ["base", *(f"model{i}" for i in range(models))]
    files = []
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(_config(shapes))
        file = (folder / name / "model.safetensors").open("wb")
        file.write(layout.shards[0].header)
        files.append(file)
    numpy_type = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    rng = np.random.default_rng(0)
    # A pool of noise is drawn once and cut at random places: drawing it all would take minutes.
    pool = rng.standard_normal(1 << 24, dtype=np.float32)
    for shape in shapes.values():
        size, done = int(np.prod(shape)), 0
        while done < size:
            count = min(size - done, 1 << 20)
            base = _cut(pool, rng, count) * np.float32(0.02)
            files[0].write(base.astype(numpy_type).tobytes())
            for file in files[1:]:
                moved = base + _cut(pool, rng, count) * np.float32(0.002)
                file.write(moved.astype(numpy_type).tobytes())
            done += count
    for file in files:
        file.close()


def _cut(pool: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    start = int(rng.integers(0, pool.size - count))
    return pool[start : start + count]


def write_sparse_family(folder: Path, parameters: float, models: int) -> None:
    """The same shapes as files of zeros without blocks on disk: size without the space."""
    shapes = llama_shapes(parameters)
    layout = _layout(shapes, "bfloat16")
    for name in ["base", *(f"model{i}" for i in range(models))]:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(_config(shapes))
        with (folder / name / "model.safetensors").open("wb") as file:
            file.write(layout.shards[0].header)
            os.truncate(file.fileno(), layout.nbytes)
