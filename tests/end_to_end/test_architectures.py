"""Tiny models of many families: saved by the library, merged, loaded back by the library."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fusekit

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
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
ENCODER = {key: SMALL[key] for key in SMALL if key not in {"num_key_value_heads", "head_dim"}}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
T5 = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 2,
}
WHISPER = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
DEEPSEEK = {
    **SMALL,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}

DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SMALL),
    "llama tied": ("LlamaConfig", "LlamaForCausalLM", {**SMALL, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SMALL),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", SMALL),
    "qwen3 moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**SMALL, **MOE}),
    "mistral": ("MistralConfig", "MistralForCausalLM", SMALL),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**SMALL, "num_local_experts": 4}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", SMALL),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", SMALL),
    "phi": ("PhiConfig", "PhiForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", SMALL),
    "deepseek": ("DeepseekV2Config", "DeepseekV2ForCausalLM", DEEPSEEK),
    "deepseek v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {**DEEPSEEK, "q_lora_rank": 8, "first_k_dense_replace": 0, "head_dim": 4},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", ENCODER),
}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForMaskedLM", ENCODER),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", ENCODER),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", WHISPER),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {"text_config": ENCODER, "vision_config": VISION, "projection_dim": 8},
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", VISION),
    "llava": (
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {
            "text_config": {**SMALL, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 8},
            "image_token_index": 63,
        },
    ),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    ),
}


def saved(folder: Path, family: str, seed: int) -> Any:
    """A tiny model with random weights, saved as the library saves it."""
    config_name, model_name, options = {**DECODERS, **OTHERS}[family]
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    return model


def load(folder: Path, model: Any) -> Any:
    """Loaded back, refusing weights that are missing, left over or of another shape."""
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    problems = {key: value for key, value in info.items() if value}
    assert not problems, problems
    return loaded


@pytest.mark.parametrize("family", [*DECODERS, *OTHERS])
def test_the_merged_model_is_the_mean_of_the_models(family: str, tmp_path: Path) -> None:
    models = [saved(tmp_path / name, family, seed) for seed, name in enumerate("ab")]
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / name)} for name in "ab"],
        "parameters": {"weight": 1.0},
    }
    fusekit.merge(recipe, tmp_path / "out", threads=2)
    merged = dict(load(tmp_path / "out", models[0]).named_parameters())
    for (name, first), second in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        torch.testing.assert_close(merged[name], (first + second) / 2, msg=name)


@pytest.mark.parametrize("family", [*DECODERS, "bert", "roberta", "vit", "mamba"])
def test_stacked_layers_load_with_the_new_depth(family: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "a", family, 0)
    ranges = [[0, 2], [1, 2]]
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(tmp_path / "a"), "layer_range": layers}]}
            for layers in ranges
        ],
    }
    fusekit.merge(recipe, tmp_path / "out", threads=2)
    deeper = load(tmp_path / "out", model)
    assert deeper.config.num_hidden_layers == 3
    state, deep_state = model.state_dict(), deeper.state_dict()
    for name in deep_state:
        source = name.replace(".2.", ".1.", 1) if ".2." in name else name
        assert torch.equal(deep_state[name], state[source]), name
    given = {"input_ids": torch.tensor([[1, 5, 6]])}
    if family == "vit":
        given = {"pixel_values": torch.zeros(1, 3, 8, 8)}
    assert torch.isfinite(deeper(**given).logits).all()


TOWERS = [
    ("t5", "encoder", "num_layers"),
    ("t5", "decoder", "num_decoder_layers"),
    ("whisper", "encoder", "encoder_layers"),
    ("whisper", "decoder", "decoder_layers"),
    ("clip", "text_model", "text_config.num_hidden_layers"),
    ("clip", "vision_model", "vision_config.num_hidden_layers"),
    ("llava", "vision_tower", "vision_config.num_hidden_layers"),
]


@pytest.mark.parametrize(("family", "tower", "key"), TOWERS)
def test_one_tower_is_stacked_and_only_its_count_changes(
    family: str, tower: str, key: str, tmp_path: Path
) -> None:
    model = saved(tmp_path / "a", family, 0)
    a = {"model": str(tmp_path / "a")}
    ranges = ([0, 2], [1, 2], [1, 2])
    slices = [{"sources": [{**a, "layer_range": layers}]} for layers in ranges]
    modules = {tower: {"slices": slices}, "default": {"models": [a]}}
    fusekit.merge({"merge_method": "passthrough", "modules": modules}, tmp_path / "out", threads=2)
    merged = load(tmp_path / "out", model)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("a", "out")]
    before, after = map(flat, configs)
    assert after == {**before, key: 4}
    state, own = merged.state_dict(), model.state_dict()
    for name, values in state.items():
        source = re.sub(rf"({tower}\.(?:\D*\.)?)[23]\.", r"\g<1>1.", name, count=1)
        assert torch.equal(values, own[source]), name


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def test_per_layer_settings_follow_their_layers(tmp_path: Path) -> None:
    config = transformers.Qwen3Config(
        **{**SMALL, "num_hidden_layers": 3},
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=4,
    )
    model = transformers.Qwen3ForCausalLM(config)
    model.save_pretrained(tmp_path / "a")
    slices = [
        {"sources": [{"model": str(tmp_path / "a"), "layer_range": layers}]}
        for layers in ([0, 2], [1, 3])
    ]
    recipe = {"merge_method": "passthrough", "slices": slices}
    fusekit.merge(recipe, tmp_path / "out", threads=2)
    found = load(tmp_path / "out", model).config
    assert found.num_hidden_layers == 4
    assert found.layer_types == [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
    ]


def test_one_tower_of_a_vision_language_model_is_stacked(tmp_path: Path) -> None:
    model = saved(tmp_path / "a", "llava", 0)
    other = saved(tmp_path / "b", "llava", 1)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    recipe = {
        "merge_method": "passthrough",
        "modules": {
            "text_decoder": {
                "slices": [
                    {"sources": [{"model": a, "layer_range": [0, 2]}]},
                    {"sources": [{"model": b, "layer_range": [1, 2]}]},
                ]
            },
            "default": {"models": [{"model": a}]},
        },
    }
    fusekit.merge(recipe, tmp_path / "out", threads=2)
    merged = load(tmp_path / "out", model)
    assert merged.config.text_config.num_hidden_layers == 3
    assert merged.config.vision_config.num_hidden_layers == 2
    state, first, second = merged.state_dict(), model.state_dict(), other.state_dict()
    deepest = [name for name in state if "language_model.layers.2." in name]
    assert deepest
    after = {"model.language_model.norm.weight", "lm_head.weight"}
    for name in state:
        source = second if name in {*deepest, *after} else first
        expected = source[name.replace("layers.2.", "layers.1.") if name in deepest else name]
        assert torch.equal(state[name], expected), name


# -- files without a folder -----------------------------------------------------------------------


def arrays(seed: int, *names: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((4, 6)).astype(np.float32) for name in names}


def mean_recipe(*models: Path) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": str(model)} for model in models],
        "parameters": {"weight": 1.0},
    }


def test_bare_files_merge_into_a_folder(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        save_file(arrays(seed, "w"), tmp_path / f"{name}.safetensors")
    recipe = mean_recipe(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    fusekit.merge(recipe, tmp_path / "out", threads=2)
    expected = (arrays(0, "w")["w"] + arrays(1, "w")["w"]) / 2
    np.testing.assert_allclose(
        load_file(tmp_path / "out/model.safetensors")["w"], expected, atol=1e-6
    )
