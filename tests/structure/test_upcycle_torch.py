"""Mixtures load in transformers, generate, and with equal experts equal the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusekit.structure.upcycle import upcycle
from tests.vectors import FOLDER

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.torch

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYOUTS = {
    "mixtral": ("LlamaConfig", "LlamaForCausalLM"),
    "mixtral from mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2_moe": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen2_moe from llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen3_moe": ("Qwen3Config", "Qwen3ForCausalLM"),
}


def dense(folder: Path, family: str, seed: int) -> Any:
    config_name, model_name = LAYOUTS[family]
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**SMALL))
    model.save_pretrained(folder)
    return model.eval()


def load(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not {key: value for key, value in info.items() if value}
    return model.eval()


@pytest.mark.parametrize("family", LAYOUTS)
def test_mixtures_load_and_generate(family: str, tmp_path: Path) -> None:
    layout = family.split()[0]
    for seed, name in enumerate(("base", "a", "b")):
        dense(tmp_path / name, family, seed)
    experts = [{"source_model": str(tmp_path / name)} for name in ("a", "b")]
    recipe: dict[str, Any] = {
        "base_model": str(tmp_path / "base"),
        "experts": experts,
        "gate_mode": "uniform_random",
        "architecture": layout,
    }
    if layout == "qwen2_moe":
        recipe["shared_experts"] = [{"source_model": str(tmp_path / "base")}]
    upcycle(recipe, tmp_path / "out", threads=2)
    made = load(tmp_path / "out")
    tokens = made.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > 3


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_equal_experts_is_the_dense_model(family: str, tmp_path: Path) -> None:
    model = dense(tmp_path / "base", family, 0)
    recipe = {
        "base_model": str(tmp_path / "base"),
        "experts": [{"source_model": str(tmp_path / "base")}] * 2,
        "gate_mode": "random",
        "experts_per_token": 2,
    }
    upcycle(recipe, tmp_path / "out", threads=2)
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        torch.testing.assert_close(
            load(tmp_path / "out")(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "gate_input"])
def test_prompts_route_their_own_tokens(mode: str, tmp_path: Path) -> None:
    inputs = FOLDER / "mergekit_e2e/inputs"
    recipe = {
        "base_model": str(inputs / "tok_a"),
        "experts": [
            {"source_model": str(inputs / "tok_a"), "positive_prompts": ["the cat sat"]},
            {"source_model": str(inputs / "tok_a") + "/", "positive_prompts": ["quiz zebra"]},
        ],
        "gate_mode": mode,
        "experts_per_token": 1,
    }
    upcycle(recipe, tmp_path / "out", threads=2)
    made = load(tmp_path / "out")
    routers = [layer.mlp.gate.weight for layer in made.model.layers]
    assert all(torch.isfinite(router).all() for router in routers)
    assert not torch.equal(routers[0], routers[1])
