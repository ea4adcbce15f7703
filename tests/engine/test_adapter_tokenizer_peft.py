"""A LoRA that PEFT trained on a model with new tokens, folded in: tokenizer, rows and logits."""

from __future__ import annotations

from pathlib import Path

import pytest

import fusekit

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.torch

TEXT = "one two <x> three <y>"


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = ["<unk>", "one", "two", "three"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def base_model(folder: Path, tied: bool) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def trained_adapter(base: Path, folder: Path, saved: list[str] | None) -> torch.Tensor:
    """A LoRA trained after two tokens were added, and the logits of the model with it."""
    known = transformers.AutoTokenizer.from_pretrained(base)
    known.add_tokens(["<x>", "<y>"])
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(known))
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, values in adapted.named_parameters():
            if values.requires_grad:
                generator = torch.Generator().manual_seed(len(name))
                values += 0.3 * torch.randn(values.shape, generator=generator)
    adapted.save_pretrained(folder)
    known.save_pretrained(folder)
    with torch.no_grad():
        return adapted.eval()(known(TEXT, return_tensors="pt").input_ids).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [None, ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_the_folded_model_knows_the_new_tokens(
    tmp_path: Path, tied: bool, saved: list[str] | None
) -> None:
    base_model(tmp_path / "base", tied)
    expected = trained_adapter(tmp_path / "base", tmp_path / "adapter", saved)
    reference = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"
    recipe = {"merge_method": "passthrough", "models": [{"model": reference}]}
    report = fusekit.merge(recipe, tmp_path / "out")
    assert any("which knows 2 more token(s)" in warning for warning in report.warnings)
    known = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = known(TEXT, return_tensors="pt").input_ids
    assert ids.tolist() == [[1, 2, 4, 3, 5]]
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
