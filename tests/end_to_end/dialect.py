"""The recipe dialect once more, as plainly as it can be said: float64, whole tensors, no planning.

For Llama checkpoints with three layers and a head of their own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Array = np.ndarray[Any, np.dtype[Any]]
PER_MODEL = {"weight", "density", "scale"}
DEFAULTS = {"density": 1.0, "scale": 1.0, "normalize": None, "lambda": 1.0, "t": 0.5}
LAYERS = 3


def setting(value: Any, name: str, position: float) -> Any:
    """A scalar, gradient or filter list, for one tensor; None where no filter fits."""
    if isinstance(value, list) and isinstance(value[0], dict):
        for entry in value:
            pattern = entry.get("filter", "*")
            if pattern == "*" or pattern in name:
                return setting(entry["value"], name, position)
        return None
    if isinstance(value, list):
        place = position * (len(value) - 1)
        low = int(place)
        high = min(low + 1, len(value) - 1)
        return value[low] + (place - low) * (value[high] - value[low])
    return value


def lookup(key: str, levels: list[Any], name: str, position: float) -> Any:
    for level in levels:
        if key in (level or {}):
            found = setting(level[key], name, position)
            if found is not None:
                return found
    return DEFAULTS.get(key)


def slerp(a: Array, b: Array, t: float) -> Array:
    def unit(v: Array) -> Array:
        return v / np.linalg.norm(v)

    dot = float(np.sum(unit(a) * unit(b)))
    if abs(dot) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(dot)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def pruned(delta: Array, density: float) -> Array:
    """The entries of largest magnitude."""
    if density >= 1:
        return delta
    kept = np.zeros(delta.size, bool)
    kept[np.argsort(-np.abs(delta.ravel()), kind="stable")[: int(density * delta.size)]] = True
    return np.where(kept.reshape(delta.shape), delta, 0.0)


def merged(method: str, base: Array | None, models: list[Array], own: list[Any], top: Any) -> Array:
    """One tensor; `own` gives every model's parameters, `top` the global ones."""
    if method == "passthrough":
        return models[0] * own[0]["scale"]
    weights = np.array([each["weight"] for each in own if each], dtype=object)
    if method == "linear":
        total = sum(w * m for w, m in zip(weights, models, strict=True))
        return total / weights.sum() if top["normalize"] in {None, True} else total
    if method == "slerp":
        assert base is not None
        return slerp(base, models[0], top["t"])
    assert base is not None
    deltas = [m - base for m in models]
    if method == "task_arithmetic":
        total = sum(w * d for w, d in zip(weights, deltas, strict=True))
        divisor = weights.sum() if top["normalize"] else 1.0
    else:
        densities = [each["density"] for each in own]
        deltas = [
            w * pruned(d, density) for w, d, density in zip(weights, deltas, densities, strict=True)
        ]
        sign = np.where(sum(deltas) >= 0, 1.0, -1.0)
        agree = [np.sign(d) == sign for d in deltas]
        total = sum(np.where(a, d, 0.0) for a, d in zip(agree, deltas, strict=True))
        divisor = 1.0
        if top["normalize"] in {None, True}:
            divisor = sum(np.where(a, w, 0.0) for a, w in zip(agree, weights, strict=True))
            divisor = np.where(divisor == 0, 1.0, divisor)
    return base + top["lambda"] * total / divisor


def plain_merge(recipe: dict[str, Any], folder: Path) -> dict[str, Array]:
    """What a recipe without modules and tokenizer gives."""
    loaded: dict[str, dict[str, Array]] = {}

    def tensor(model: str, name: str) -> Array:
        if model not in loaded:
            loaded[model] = load_file(folder / model / "model.safetensors")
        return loaded[model][name].astype(np.float64)

    slices = recipe.get("slices")
    if slices is None:
        sources = [{**entry, "layer_range": [0, LAYERS]} for entry in recipe["models"]]
        slices = [{"sources": sources}]
    first = slices[0]["sources"][0]["model"]
    base = recipe.get("base_model")
    names = list(load_file(folder / (base or first) / "model.safetensors"))
    inside = [m[1] for name in names if (m := re.match(r"model\.layers\.0\.(.+)", name))]
    work: list[tuple[str, dict[str, Any], int | None, float]] = []
    outside = [name for name in names if not name.startswith("model.layers.")]
    work += [(name, slices[0 if "embed" in name else -1], None, 0.0) for name in outside]
    number = 0
    for each in slices:
        start, end = each["sources"][0]["layer_range"]
        for rank in range(end - start):
            position = rank / (end - start - 1) if end - start > 1 else 1.0
            work += [(f"model.layers.{number}.{n}", each, rank, position) for n in inside]
            number += 1
    made = {}
    for name, part, rank, position in work:
        own_base = part.get("base_model") or base
        sources = list(part["sources"])
        if own_base is not None and all(s["model"] != own_base for s in sources):
            sources.append({"model": own_base, "layer_range": sources[0]["layer_range"]})
        values, own, base_value = [], [], None
        levels = [part.get("parameters"), recipe.get("parameters")]
        for source in sources:
            inner = name
            if rank is not None:
                layer = source["layer_range"][0] + rank
                inner = re.sub(r"layers\.\d+", f"layers.{layer}", name)
            value = tensor(source["model"], inner)
            if source["model"] == own_base and recipe["merge_method"] != "linear":
                base_value = value
                continue
            mine = [source.get("parameters"), *levels]
            own.append({key: lookup(key, mine, inner, position) for key in PER_MODEL})
            values.append(value)
        top = {key: lookup(key, levels, name, position) for key in ("t", "lambda", "normalize")}
        made[name] = merged(recipe["merge_method"], base_value, values, own, top)
    return made
