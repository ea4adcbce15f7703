from __future__ import annotations

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from fusekit.adapters import ExtractOptions, extract_adapter  # noqa: E402
from fusekit.checkpoint.memory import MemorySource  # noqa: E402

pytestmark = pytest.mark.torch
torch.set_num_threads(1)


def tiny_gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=24, n_positions=12, n_embd=16, n_layer=2, n_head=2)
    )


def tiny_llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=24,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


def tuned_copy(build, rank, everything):
    """A base, and the base plus low-rank updates (plus noise on all other tensors)."""
    torch.manual_seed(0)
    base = build().eval()
    tuned = build().eval()
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            inner = parameter.dim() == 2 and (".h." in name or ".layers." in name)
            if inner:
                left, right = torch.randn(len(parameter), rank), torch.randn(rank, len(parameter.T))
                parameter += 0.05 * left @ right
            elif everything:
                parameter += 0.05 * torch.randn(parameter.shape)
    return base, tuned


def logits(model):
    with torch.no_grad():
        return model(torch.arange(12)[None, :]).logits.numpy()


@pytest.mark.parametrize(
    ("build", "everything"), [(tiny_gpt2, False), (tiny_llama, False), (tiny_llama, True)]
)
def test_an_extracted_adapter_rebuilds_the_model_in_peft(build, everything, tmp_path):
    base, tuned = tuned_copy(build, 3, everything)
    options = ExtractOptions(rank=4, sv_epsilon=1e-4, conv1d=build is tiny_gpt2)
    config = {"task_type": "CAUSAL_LM"}
    sources = [MemorySource(model.state_dict()) for model in (base, tuned)]
    report = extract_adapter(*sources, tmp_path / "a", options, config)
    assert report.lost == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    np.testing.assert_allclose(logits(model), logits(tuned), atol=1e-4)
