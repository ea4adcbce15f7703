"""Which files belong to a model beside its weights."""

from __future__ import annotations

import pytest

from fusekit.checkpoint.companions import describes_model, is_companion
from fusekit.checkpoint.remote import COMPANION_NAMES
from fusekit.tokenizers.vocabulary import TOKENIZER_FILES

COMPANIONS = (
    "config.json",
    "unet/config.json",
    "additional_chat_templates/rag.jinja",
    "modeling_own.py",
    "qwen.tiktoken",
    "LICENSE",
    "licence.md",
    "NOTICE.txt",
    "USE_POLICY.md",
    *COMPANION_NAMES,
    *TOKENIZER_FILES,
)
MADE = ("manifest.json", "model.safetensors.index.json", "unet/pytorch_model.bin.index.json")
OTHERS = (
    "model.safetensors",
    "pytorch_model.bin",
    "README.md",
    "licensed.safetensors",
    "optimizer.pt",
    "picture.png",
)


@pytest.mark.parametrize("name", COMPANIONS)
def test_companions_are_carried_over(name: str) -> None:
    assert is_companion(name)
    assert describes_model(name)


@pytest.mark.parametrize("name", MADE)
def test_indexes_and_manifests_describe_a_model_and_are_made_anew(name: str) -> None:
    assert describes_model(name)
    assert not is_companion(name)


@pytest.mark.parametrize("name", OTHERS)
def test_weights_and_other_files_are_neither(name: str) -> None:
    assert not describes_model(name)
    assert not is_companion(name)
