"""Capturing Gram matrices of layers' inputs against the plain forward pass, in one run.

    python -m benchmarks.capture --hidden 1024 --intermediate 2816

A Llama with random weights; CPU seconds of one thread, the better of two runs, which take turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import transformers

from fusekit.calibrate import capture


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=options.vocabulary,
        max_position_embeddings=options.length,
    )
    model = transformers.LlamaForCausalLM(config)
    model.train(False)
    ids = torch.randint(options.vocabulary, (options.batches, 1, options.length))
    batches = [{"input_ids": batch} for batch in ids]

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch, use_cache=False)

    forward()
    runs = [(seconds(forward), seconds(lambda: capture(model, batches))) for _ in range(2)]
    plain, captured = (min(times) for times in zip(*runs, strict=True))
    print(
        f"hidden {options.hidden}, intermediate {options.intermediate}: forward {plain:.2f} s, "
        f"with capture {captured:.2f} s, ratio {captured / plain:.2f}"
    )


def seconds(function: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    begun = time.process_time()
    function()
    return time.process_time() - begun


if __name__ == "__main__":
    main()
