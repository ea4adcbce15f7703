"""Small networks of the golden cases, and a tiny language model with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Normed(nn.Module):
    """fc1 -> LayerNorm -> tanh -> fc2."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.norm(self.fc1(x))))


class Classifier(nn.Module):
    """fc2(tanh(fc1(x)))."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


class Block(nn.Module):
    """x + down(tanh(up(norm(x))))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Residual(nn.Module):
    """An embedding without bias, then residual blocks."""

    def __init__(self, inputs: int, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width, bias=False)
        self.layers = nn.ModuleList(Block(width, hidden) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


def load(model: nn.Module, arrays: dict[str, np.ndarray]) -> nn.Module:
    """The model with these weights."""
    model.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
    return model


def tiny_llama(folder: Path, **changes: Any) -> Any:
    """A two-layer Llama with a word tokenizer, saved to a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [
        "<pad>",
        "<eos>",
        "the",
        "cat",
        "dog",
        "sat",
        "ran",
        "on",
        "mat",
        "and",
        "fast",
        "slow",
    ]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": len(words),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            **changes,
        }
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model
