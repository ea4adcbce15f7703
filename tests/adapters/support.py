"""Shared by the adapter tests: golden vectors and adapters made of plain arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from fusekit.adapters import Adapter, LoraModule

VECTORS = Path(__file__).parent.parent / "vectors"


def load_vectors(slug: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All tensors of a vector file and its per-case metadata, JSON decoded."""
    with safe_open(VECTORS / f"{slug}.safetensors", "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = sorted(file.metadata().items())  # the library keeps no order
        cases = {k: json.loads(v) for k, v in about if k.startswith("case")}
    return tensors, cases


def under(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The tensors whose name starts with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def make_module(
    name: str, A: np.ndarray, B: np.ndarray, scaling: float = 1.0, **fields: Any
) -> LoraModule:
    """A module with a given scaling."""
    return LoraModule(name, A, B, alpha=scaling * A.shape[0], **fields)


def make_adapter(*modules: LoraModule, label: str = "memory", **config: Any) -> Adapter:
    """An adapter of in-memory modules."""
    return Adapter(label, {module.name: module for module in modules}, {}, config)


def random_adapter(
    seed: int,
    shapes: dict[str, tuple[int, int]],
    rank: int = 4,
    scaling: float = 1.0,
    dtype: Any = np.float32,
) -> Adapter:
    """Gaussian factors for modules of given (out, in) shapes."""
    rng = np.random.default_rng(seed)
    modules = []
    for name, (rows, columns) in shapes.items():
        A = rng.standard_normal((rank, columns)).astype(dtype)
        B = rng.standard_normal((rows, rank)).astype(dtype)
        modules.append(make_module(name, A, B, scaling))
    return make_adapter(*modules, label=f"adapter{seed}")
