"""Mixtures load in transformers, generate, and with equal experts equal the dense model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusekit.structure.layouts import LAYOUTS as LAYOUTS_BY_NAME
from fusekit.structure.upcycle import upcycle

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

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
    "deepseek": ("LlamaConfig", "LlamaForCausalLM"),
    "deepseek from mistral": ("MistralConfig", "MistralForCausalLM"),
    "deepseek from qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "deepseek from qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
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


def recipe_of(folder: Path, layout: str, *experts: str, **settings: Any) -> dict[str, Any]:
    return {
        "base_model": str(folder / "base"),
        "experts": [{"source_model": str(folder / name)} for name in experts],
        "gate_mode": "uniform_random",
        "architecture": layout,
        **settings,
    }


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("family", LAYOUTS)
def test_mixtures_load_and_generate(family: str, shared: int, tmp_path: Path) -> None:
    layout = family.split()[0]
    if shared not in LAYOUTS_BY_NAME[layout].shared_counts:
        pytest.skip("the layout does not have as many")
    for seed, name in enumerate(("base", "a", "b")):
        dense(tmp_path / name, family, seed)
    recipe = recipe_of(tmp_path, layout, "a", "b")
    if shared:
        recipe["shared_experts"] = [{"source_model": str(tmp_path / "base")}]
    upcycle(recipe, tmp_path / "out", threads=2)
    made = load(tmp_path / "out")
    tokens = made.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > 3


@pytest.mark.parametrize("family", [name for name in LAYOUTS if not name.startswith("qwen2_moe")])
@pytest.mark.parametrize("terse", [False, True])
def test_a_mixture_of_equal_experts_is_the_dense_model(
    family: str, terse: bool, tmp_path: Path
) -> None:
    """With `terse`, of a model whose config leaves out what its family takes for granted."""
    model = dense(tmp_path / "base", family, 0)
    if terse:
        path = tmp_path / "base/config.json"
        config = json.loads(path.read_text())
        for key in ("rope_parameters", "rms_norm_eps", "tie_word_embeddings"):
            del config[key]
        path.write_text(json.dumps(config))
        assert load(tmp_path / "base").config.rope_parameters == model.config.rope_parameters
    recipe = recipe_of(tmp_path, family.split()[0], "base", "base")
    upcycle({**recipe, "gate_mode": "random"}, tmp_path / "out", threads=2)
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        torch.testing.assert_close(
            load(tmp_path / "out")(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("family", [name for name in LAYOUTS if "v1" not in name])
def test_fused_experts_load_as_the_same_mixture(family: str, tmp_path: Path) -> None:
    layout = family.split()[0]
    for seed, name in enumerate(("base", "a", "b")):
        dense(tmp_path / name, family, seed)
    recipe = recipe_of(tmp_path, layout, "a", "b")
    if 0 not in LAYOUTS_BY_NAME[layout].shared_counts:
        recipe["shared_experts"] = [{"source_model": str(tmp_path / "base")}]
    upcycle(recipe, tmp_path / "apart", threads=2)
    upcycle({**recipe, "fused_experts": True}, tmp_path / "fused", threads=2)
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        expected = load(tmp_path / "apart")(ids).logits
        assert torch.equal(load(tmp_path / "fused")(ids).logits, expected)


def test_an_ungated_shared_expert_is_added_to_the_others(tmp_path: Path) -> None:
    """With a shared expert of weight -1 every MLP cancels: attention alone is left."""
    model = dense(tmp_path / "base", "deepseek", 0)
    recipe = recipe_of(tmp_path, "deepseek", "base", "base")
    shared = {"source_model": str(tmp_path / "base"), "residual_scale": -1.0}
    upcycle({**recipe, "shared_experts": [shared]}, tmp_path / "out", threads=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
        ids = torch.tensor([[1, 5, 9, 30]])
        torch.testing.assert_close(
            load(tmp_path / "out")(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4
        )


# -- routers made from prompts --------------------------------------------------------------------

DOMAINS, WORDS, TRAINED = 4, 12, 6


def planted_base(folder: Path) -> Any:
    """A model of random weights whose words lie around one direction per domain."""
    config = transformers.LlamaConfig(
        **{**SMALL, "vocab_size": 3 + DOMAINS * WORDS, "hidden_size": 32, "num_hidden_layers": 3}
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        directions = torch.linalg.qr(torch.randn(32, DOMAINS))[0].T
        words = directions.repeat_interleave(WORDS, 0) + 0.12 * torch.randn(DOMAINS * WORDS, 32)
        model.model.embed_tokens.weight[3:] = words
    model.save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"w{i}": 3 + i for i in range(DOMAINS * WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return model.eval()


def prompts_of(domain: int, seed: int, held_out: bool) -> list[list[int]]:
    """Eight prompts of five words; those that are held out have words that no other prompt has."""
    first = domain * WORDS + (TRAINED if held_out else 0)
    chosen = torch.randint(0, WORDS - TRAINED, (8, 5), generator=torch.manual_seed(seed))
    return (first + chosen).tolist()


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "gate_input", "cheap_embed"])
@pytest.mark.parametrize("layout", ["mixtral", "deepseek"])
def test_prompts_lead_unseen_words_of_their_domain_to_their_expert(
    layout: str, mode: str, tmp_path: Path
) -> None:
    base = planted_base(tmp_path / "base")
    names = [f"expert{domain}" for domain in range(DOMAINS)]
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(base.config).save_pretrained(tmp_path / name)
    recipe = recipe_of(tmp_path, layout, *names, gate_mode=mode, experts_per_token=1)
    for domain, expert in enumerate(recipe["experts"]):
        words = prompts_of(domain, domain, held_out=False)
        expert["positive_prompts"] = [" ".join(f"w{word}" for word in row) for row in words]
    upcycle(recipe, tmp_path / "out", threads=2)
    made = load(tmp_path / "out")
    chosen: list[Any] = []
    for layer in made.model.layers:
        layer.mlp.gate.register_forward_hook(lambda *call: chosen.append(call[2][0].argmax(-1)))
    hits = []
    for domain in range(DOMAINS):
        ids = 3 + torch.tensor(prompts_of(domain, 100 + domain, held_out=True))
        chosen.clear()
        with torch.no_grad():
            made(torch.cat([torch.ones_like(ids[:, :1]), ids], dim=1))
        routed = torch.stack([each.reshape(len(ids), -1)[:, 1:] for each in chosen])
        hits.append((routed == domain).float().mean(dim=(1, 2)))
    per_layer = torch.stack(hits).mean(dim=0)
    assert per_layer.shape == (3,)
    assert (per_layer > 0.75).all(), per_layer  # by chance 0.25
