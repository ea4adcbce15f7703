"""Train LoRA adapters on two tasks, merge them by several methods, and score every result.

    python examples/train_adapters.py

Needs the torch extra. A tiny GPT-2 that knows neither task learns to count up through the lower
half of its vocabulary, or down through the upper half. Takes less than a minute on a CPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import fusekit

VOCABULARY, LENGTH, RANK = 24, 12, 4
HALF = VOCABULARY // 2
TASKS = {"up": 1, "down": -1}
MERGES: dict[str, dict[str, Any]] = {
    "linear": {"lambda": 2.0},
    "cat": {"lambda": 2.0},
    "svd": {"lambda": 2.0, "rank": RANK},
    "ties_svd": {"density": 0.5, "rank": 2 * RANK},
    "dare_ties_svd": {"density": 0.7, "rank": 2 * RANK},
    "lora_lego": {"rank": 2 * RANK, "lambda": 1.4},
    "knots_ties": {"density": 0.5},
}
"""Methods that average divide by the adapters that agree, so that no lambda makes up for it."""


def tiny_gpt() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def loss(model: Any, step: int) -> torch.Tensor:
    tokens = (torch.arange(HALF)[:, None] + step * torch.arange(LENGTH)) % HALF
    tokens = tokens + (HALF if step < 0 else 0)
    found: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
    return found


def train(folder: Path, step: int) -> None:
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=["c_attn", "mlp.c_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(tiny_gpt(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    model.save_pretrained(folder)


def scores(adapter: Path | None) -> dict[str, float]:
    """The loss on every task, with an adapter as PEFT loads it."""
    model = tiny_gpt()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return {task: loss(model, step).item() for task, step in TASKS.items()}


def run(folder: Path) -> dict[str, dict[str, float]]:
    """Losses by task of the base, of each adapter and of every merge."""
    table = {"base": scores(None)}
    for task, step in TASKS.items():
        train(folder / task, step)
        table[f"adapter {task}"] = scores(folder / task)
    for method, parameters in MERGES.items():
        recipe = {
            "merge_method": method,
            "models": [{"model": str(folder / task)} for task in TASKS],
            "parameters": parameters,
        }
        fusekit.merge(recipe, folder / method)
        table[method] = scores(folder / method)
    return table


def main() -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        table = run(Path(name))
    print(f"{'loss on the task':18}" + "".join(f"{task:>8}" for task in TASKS))
    for label, losses in table.items():
        print(f"{label:18}" + "".join(f"{value:8.2f}" for value in losses.values()))


if __name__ == "__main__":
    main()
