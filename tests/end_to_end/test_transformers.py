"""Merged folders load in transformers and compute what a float64 merge computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusekit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

StateDict = dict[str, np.ndarray[Any, np.dtype[Any]]]


def tiny_llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config)


def tiny_bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    return transformers.BertForMaskedLM(config)


def tiny_vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        num_labels=7,
    )
    return transformers.ViTForImageClassification(config)


def text() -> dict[str, Any]:
    return {"input_ids": torch.arange(24).reshape(2, 12) % 60}


def image() -> dict[str, Any]:
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)}


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "llama": (tiny_llama, text),
    "bert": (tiny_bert, text),
    "vit": (tiny_vit, image),
}


def float64_state(model: Any) -> StateDict:
    return {k: v.detach().double().numpy().copy() for k, v in model.state_dict().items()}


def linear_reference(base: StateDict, models: list[StateDict]) -> StateDict:
    return {k: 0.25 * models[0][k] + 0.75 * models[1][k] for k in base}


def slerp_reference(base: StateDict, models: list[StateDict]) -> StateDict:
    def slerp(a: Any, b: Any, t: float) -> Any:
        cosine = (a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30)
        if abs(cosine) > 0.9995 or not a.any() or not b.any():
            return (1 - t) * a + t * b
        angle = np.arccos(cosine)
        return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)

    return {k: slerp(models[0][k], models[1][k], 0.4) for k in base}


def ties_reference(base: StateDict, models: list[StateDict]) -> StateDict:
    merged = {}
    for name, origin in base.items():
        kept = []
        for model in models:
            # Task vectors are differences of float32 weights, rounded to float32.
            delta = (model[name] - origin).astype(np.float32).astype(np.float64)
            count = max(1, int(0.5 * delta.size))
            order = np.argsort(-np.abs(delta), axis=None, kind="stable")
            mask = np.zeros(delta.size)
            mask[order[:count]] = 1
            kept.append(delta * mask.reshape(delta.shape))
        sign = np.where(sum(kept) >= 0, 1.0, -1.0)
        agree = [k * sign > 0 for k in kept]
        total = sum(np.where(a, k, 0) for a, k in zip(agree, kept, strict=True))
        merged[name] = origin + total / np.maximum(sum(a.astype(float) for a in agree), 1)
    return merged


RECIPES: dict[str, tuple[dict[str, Any], Callable[[StateDict, list[StateDict]], StateDict]]] = {
    "linear": ({"merge_method": "linear"}, linear_reference),
    "slerp": ({"merge_method": "slerp", "parameters": {"t": 0.4}}, slerp_reference),
    "ties": (
        {"merge_method": "ties", "base_model": "base", "parameters": {"density": 0.5}},
        ties_reference,
    ),
}
LINEAR_WEIGHTS = (0.25, 0.75)


@pytest.fixture(scope="module", params=FAMILIES, ids=FAMILIES.keys())
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, StateDict, list[StateDict]]:
    """A base and two perturbed copies, saved; their weights in float64."""
    torch.set_num_threads(1)
    build, _ = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = build()
    states = []
    for i, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.02 * noise * (name != "base")
        model.save_pretrained(folder / name)
        states.append(float64_state(model))
    return request.param, folder, states[0], states[1:]


def logits_of(model: Any, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("method", RECIPES)
def test_a_merged_folder_loads_and_gives_the_logits_of_a_float64_merge(
    family: tuple[str, Path, StateDict, list[StateDict]], method: str, tmp_path: Path
) -> None:
    name, folder, base, models = family
    recipe, reference = RECIPES[method]
    entries: list[dict[str, Any]] = [{"model": str(folder / which)} for which in "ab"]
    if method == "linear":
        for entry, weight in zip(entries, LINEAR_WEIGHTS, strict=True):
            entry["parameters"] = {"weight": weight}
    recipe = {**recipe, "models": entries}
    if "base_model" in recipe:
        recipe["base_model"] = str(folder / "base")
    fusekit.merge(recipe, tmp_path / "merged", threads=2)

    build, inputs = FAMILIES[name]
    merged, info = type(build()).from_pretrained(
        tmp_path / "merged", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = build()
    state = {k: torch.from_numpy(v) for k, v in reference(base, models).items()}
    expected = expected.double()
    expected.load_state_dict(state)

    double = {k: v.double() if v.is_floating_point() else v for k, v in inputs().items()}
    wanted = logits_of(expected, double)
    found = logits_of(merged, inputs())
    assert wanted.std() > 1e-3
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    exact = logits_of(merged.double(), double)
    torch.testing.assert_close(exact, wanted, rtol=1e-5, atol=1e-6)
