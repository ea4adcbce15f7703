"""Measure what data says about the digit experts: Fisher information and inputs' Gram matrices.

    python examples/measure_statistics.py [FOLDER]

Writes one file per expert, for the recipes of `fisher` and `regmean`. Needs the [torch] extra.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fusekit.checkpoint.statistics import save_statistics
from fusekit.evaluate import digits

IMAGES = 200
LAYERS = 6

Tensors = dict[str, torch.Tensor]


def encode(weights: Tensors, images: torch.Tensor, seen: Tensors | None = None) -> torch.Tensor:
    """The suite's encoder; `seen` collects the inputs of every linear layer."""

    def linear(module: str, x: torch.Tensor) -> torch.Tensor:
        if seen is not None:
            seen[module] = x
        return x @ weights[f"{module}.weight"].T + weights[f"{module}.bias"]

    hidden = linear("embeddings.projection", images)
    for i in range(LAYERS):
        at = f"encoder.layers.{i}"
        norm = weights[f"{at}.layer_norm.weight"], weights[f"{at}.layer_norm.bias"]
        normed = torch.nn.functional.layer_norm(
            hidden, hidden.shape[-1:], *norm, digits.LAYER_NORM_EPS
        )
        hidden = hidden + linear(
            f"{at}.mlp.down_proj", torch.relu(linear(f"{at}.mlp.up_proj", normed))
        )
    return hidden


def gram_matrices(weights: Tensors, images: torch.Tensor) -> Tensors:
    """`X^T X / n` of every linear layer's inputs."""
    seen: Tensors = {}
    encode(weights, images, seen)
    return {f"{module}/gram": x.T @ x / len(x) for module, x in seen.items()}


def fisher_information(weights: Tensors, images: torch.Tensor, head: torch.Tensor) -> Tensors:
    """Mean squared gradient of log p(y | x), y drawn from the model's own prediction."""
    drawn = torch.distributions.Categorical(logits=encode(weights, images) @ head.T).sample()

    def log_likelihood(weights: Tensors, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits = encode(weights, image[None]) @ head.T
        return -torch.nn.functional.cross_entropy(logits, label[None])

    each = torch.func.vmap(torch.func.grad(log_likelihood), (None, 0, 0))
    gradients = each(weights, images, drawn)
    return {f"{name}/fisher": g.square().mean(dim=0) for name, g in gradients.items()}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "statistics")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    images = torch.tensor(digits.examples("train").images[:IMAGES], dtype=torch.float32)
    for task, path in digits.experts().items():
        weights = load_file(path / "model.safetensors")
        head = torch.tensor(digits.head(task))
        entries = {
            **gram_matrices(weights, images),
            **fisher_information(weights, images, head),
        }
        about: dict[str, Any] = {"model": path.name, "data": f"{IMAGES} training images"}
        target = folder / f"{task}.safetensors"
        save_statistics(target, {name: x.numpy() for name, x in entries.items()}, about)
        print(f"{target}: {len(entries)} entries")


if __name__ == "__main__":
    main()
