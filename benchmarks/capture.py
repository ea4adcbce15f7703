"""Capturing Gram matrices of layers' inputs against the plain forward pass, in one run.

    python -m benchmarks.capture --hidden 1024 --intermediate 2816
    python -m benchmarks.capture --architecture bert --hidden 384 --intermediate 1536

A Llama or a BERT with random weights; CPU seconds of one thread, the better of some runs, which
take turns. `arithmetic` is the ratio that multiplications allow if all cost the same: those of the
forward pass (linear layers and attention) and, for a Gram matrix, half of inputs^2 per token.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from fusekit.calibrate import capture

SHARED = ("k_proj", "v_proj", "up_proj", "key", "value")
"""Layers that are fed what another one is: their Gram matrix is that one's."""


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", choices=("llama", "bert"), default="llama")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(options)
    model.train(False)
    ids = torch.randint(options.vocabulary, (options.batches, 1, options.length))
    batches = [{"input_ids": batch} for batch in ids]

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    forward()
    runs = [
        (seconds(forward), seconds(lambda: capture(model, batches))) for _ in range(options.runs)
    ]
    plain, captured = (min(times) for times in zip(*runs, strict=True))
    print(
        f"{options.architecture}, hidden {options.hidden}, intermediate {options.intermediate}: "
        f"forward {plain:.2f} s, with capture {captured:.2f} s, ratio {captured / plain:.2f}, "
        f"arithmetic {1 + gram_products(model) / forward_products(model, options):.2f}"
    )


def build(options: argparse.Namespace) -> Any:
    """The model: of BERT the encoder, as sentence encoders are."""
    sizes = {
        "hidden_size": options.hidden,
        "intermediate_size": options.intermediate,
        "num_hidden_layers": options.layers,
        "num_attention_heads": 8,
        "vocab_size": options.vocabulary,
        "max_position_embeddings": options.length,
    }
    if options.architecture == "bert":
        return transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    config = transformers.LlamaConfig(num_key_value_heads=2, use_cache=False, **sizes)
    return transformers.LlamaForCausalLM(config)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """By name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def forward_products(model: nn.Module, options: argparse.Namespace) -> float:
    """Multiplications of the forward pass per token; attention sees every position."""
    linear = sum(m.in_features * m.out_features for m in linear_layers(model).values())
    return linear + 2 * options.layers * options.length * options.hidden


def gram_products(model: nn.Module) -> float:
    """Multiplications of all Gram matrices per token."""
    fed = [m for name, m in linear_layers(model).items() if not name.endswith(SHARED)]
    return sum(m.in_features**2 / 2 for m in fed)


def seconds(function: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    begun = time.process_time()
    function()
    return time.process_time() - begun


if __name__ == "__main__":
    main()
