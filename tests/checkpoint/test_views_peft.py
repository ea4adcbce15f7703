"""A LoRA folded in on the fly against PEFT's own dense merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusekit.adapters import load_adapter
from fusekit.checkpoint.memory import MemorySource
from fusekit.checkpoint.views import LoraSource
from tests.checkpoint.zip_files import read

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


CASES = {
    "plain": (llama, {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 5}),
    "rslora": (llama, {"target_modules": ["q_proj"], "use_rslora": True}),
    "dora": (llama, {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "patterns": (
        llama,
        {
            "target_modules": "all-linear",
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {r"layers\.1\.mlp\..*": 1},
        },
    ),
    "embedding": (llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "embedding_dora": (llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "saved": (llama, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d_dora": (
        gpt2,
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "bias": (gpt2, {"target_modules": ["c_fc"], "fan_in_fan_out": True, "lora_bias": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_merge_and_unload(tmp_path: Path, case: str) -> None:
    make, options = CASES[case]
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = make()
    base = {name: array.numpy().copy() for name, array in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    wrapped.save_pretrained(tmp_path)

    source = LoraSource(MemorySource(base, "base"), load_adapter(tmp_path, base))
    merged = wrapped.merge_and_unload().state_dict()
    changed = 0
    for name, expected in merged.items():
        np.testing.assert_allclose(read(source, name), expected.numpy(), rtol=1e-5, atol=2e-6)
        changed += not np.array_equal(expected.numpy(), base[name])
    assert changed
