"""Synthetic corpora and models of a few thousand parameters for the suites of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

WORDS = [f"{start}{end}" for start in ("ba", "de", "ki", "lo", "mu") for end in "nrstx"]


def sentence(rng: np.random.Generator, words: int, vocabulary: list[str] = WORDS) -> str:
    """Random words."""
    return " ".join(rng.choice(vocabulary, size=words))


def write_lm_data(folder: Path, seed: int = 0) -> Path:
    """The files of the lm suite, a few kilobytes each."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    plays = "\n\n".join(sentence(rng, 120) for _ in range(60))
    (folder / "tinyshakespeare.txt").write_text(plays, encoding="utf-8")
    names = "\n".join(sentence(rng, 1) + sentence(rng, 1) for _ in range(1500))
    (folder / "names.txt").write_text(names, encoding="utf-8")
    for name, keys in (
        ("gsm8k_train.jsonl", ("question", "answer")),
        ("mbpp.jsonl", ("text", "code")),
    ):
        records = [{key: sentence(rng, 60) for key in keys} for _ in range(30)]
        lines = "\n".join(json.dumps(record) for record in records)
        (folder / name).write_text(lines, encoding="utf-8")
    return folder


def write_sentences(folder: Path, seed: int = 0) -> Path:
    """The files of the text suite: in every task the classes prefer other words."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    classes = {"TREC.train.all": 3, "TREC.test.all": 3}
    for name in (
        "TREC.train.all",
        "TREC.test.all",
        "custrev.all",
        "mpqa.all",
        "subj.all",
        "stsa.binary.train",
        "stsa.binary.test",
        "rt-polarity.all",
    ):
        lines = []
        for i in range(80):
            label = i % classes.get(name, 2)
            lines.append(f"{label} {sentence(rng, 14, WORDS[5 * label : 5 * label + 10])}")
        (folder / name).write_text("\n".join(lines) + "\n0 .\n", encoding="latin-1")
    return folder


def write_tokenizer(folder: Path) -> None:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[PAD]"
    ).save_pretrained(folder)


def tiny_llama(seed: int = 0) -> Any:
    """A causal language model over the words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def tiny_encoder(folder: Path, seed: int = 0) -> Path:
    """A sentence encoder over the words, as a folder."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    BertModel(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder
