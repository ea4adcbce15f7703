"""Train the base and the experts of the embedded digits suite and write them as package data.

One base learns the ten digits; every expert is the whole encoder fine-tuned from it on another
grouping of the same images, against a frozen random head of unit rows times four. One thread and
one seed: a run takes about 15 seconds on a CPU and writes the same bytes again on the same machine.

    python scripts/train_digits_experts.py [--out fusekit/evaluate/data/digits]
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor, nn

from fusekit.evaluate.digits import LAYER_NORM_EPS, PRETRAINING_TASK, TASKS

WIDTH = 64
INTERMEDIATE = 128
LAYERS = 6
HEAD_SCALE = 4.0
SPLITS = {"train": 1000, "validation": 297, "test": 500}

CLASS_OF_DIGIT = {
    PRETRAINING_TASK: list(range(10)),
    "parity": [d % 2 for d in range(10)],
    "modulo_3": [d % 3 for d in range(10)],
    "modulo_5": [d % 5 for d in range(10)],
    "halved": [d // 2 for d in range(10)],
    "thirded": [d // 3 for d in range(10)],
    "mirrored": [min(d, 9 - d) for d in range(10)],
}

ORIGIN = {
    "origin": "scikit-learn load_digits: test part of Optical Recognition of Handwritten Digits, "
    "E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, doi:10.24432/C50P49",
    "licence": "CC BY 4.0",
}


@dataclass(frozen=True)
class Schedule:
    """Adam on mini-batches drawn with replacement."""

    steps: int
    learning_rate: float
    batch: int = 64


PRETRAINING = Schedule(steps=1000, learning_rate=1e-3)
FINE_TUNING = Schedule(steps=300, learning_rate=5e-4)


class MLP(nn.Module):
    """Two linear maps with a ReLU between."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, INTERMEDIATE)
        self.down_proj = nn.Linear(INTERMEDIATE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(torch.relu(self.up_proj(x)))
        return out


class EncoderLayer(nn.Module):
    """A pre-norm residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(WIDTH, eps=LAYER_NORM_EPS)
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(self.layer_norm(x))
        return out


class DigitsEncoder(nn.Module):
    """Images `[n, 64]` in [0, 1] to features `[n, 64]`; the part that is merged."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({"projection": nn.Linear(64, WIDTH)})
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(EncoderLayer() for _ in range(LAYERS))}
        )

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.embeddings["projection"](images)
        layers = self.encoder["layers"]
        assert isinstance(layers, nn.ModuleList)
        for layer in layers:
            hidden = layer(hidden)
        return hidden


def random_head(classes: int, generator: torch.Generator) -> Tensor:
    """A frozen head: random unit rows times `HEAD_SCALE`."""
    rows = torch.randn(classes, WIDTH, generator=generator)
    head: Tensor = HEAD_SCALE * rows / rows.norm(dim=1, keepdim=True)
    return head


def fit(
    model: DigitsEncoder,
    head: Tensor,
    images: Tensor,
    labels: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
) -> None:
    """Train the encoder in place with cross-entropy through a frozen head."""
    optimiser = torch.optim.Adam(model.parameters(), lr=schedule.learning_rate)
    for _ in range(schedule.steps):
        batch = torch.randint(len(images), (schedule.batch,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[batch]) @ head.T, labels[batch])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def load_splits(seed: int) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """`split -> (pixels [n, 8, 8] from 0 to 16, digits [n])`, shuffled once."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    edges = np.cumsum(list(SPLITS.values()))
    assert edges[-1] == len(order)
    return {
        split: (bunch.images[part].astype(np.uint8), bunch.target[part].astype(np.uint8))
        for split, part in zip(SPLITS, np.split(order, edges[:-1]), strict=True)
    }


def write_checkpoint(folder: Path, model: DigitsEncoder, task: str) -> None:
    """Save an encoder as a Hugging Face folder: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    config = {
        "architectures": ["DigitsEncoder"],
        "model_type": "digits_encoder",
        "dtype": "float32",
        "hidden_act": "relu",
        "hidden_size": WIDTH,
        "intermediate_size": INTERMEDIATE,
        "layer_norm_eps": LAYER_NORM_EPS,
        "num_hidden_layers": LAYERS,
        "image_size": 8,
        "trained_on": task,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train everything, write it, and print what was reached on the test split."""
    default = Path(__file__).parents[1] / "fusekit" / "evaluate" / "data" / "digits"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=default, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, seed = arguments.out, arguments.seed
    if set(CLASS_OF_DIGIT) != {*TASKS, PRETRAINING_TASK}:
        parser.error("the groupings are not the tasks of fusekit.evaluate.digits")

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    splits = load_splits(seed)
    inputs = {
        split: torch.tensor(pixels.reshape(len(pixels), -1) / 16, dtype=torch.float32)
        for split, (pixels, _) in splits.items()
    }
    labels = {
        (split, task): np.array(classes, dtype=np.uint8)[digits]
        for split, (_, digits) in splits.items()
        for task, classes in CLASS_OF_DIGIT.items()
    }
    heads = {
        task: random_head(max(classes) + 1, generator) for task, classes in CLASS_OF_DIGIT.items()
    }

    def train(model: DigitsEncoder, task: str, schedule: Schedule) -> None:
        targets = torch.tensor(labels["train", task], dtype=torch.long)
        fit(model, heads[task], inputs["train"], targets, schedule, generator)
        with torch.no_grad():
            predicted = (model(inputs["test"]) @ heads[task].T).argmax(dim=1).numpy()
        print(f"{task:10} {(predicted == labels['test', task]).mean():.3f} on its own task (test)")

    base = DigitsEncoder()
    train(base, PRETRAINING_TASK, PRETRAINING)
    write_checkpoint(out / "base", base, PRETRAINING_TASK)
    for task in TASKS:
        expert = copy.deepcopy(base)
        train(expert, task, FINE_TUNING)
        write_checkpoint(out / f"expert_{task}", expert, task)

    suite = {f"{split}.images": pixels for split, (pixels, _) in splits.items()}
    suite |= {f"{split}.labels.{task}": values for (split, task), values in labels.items()}
    suite |= {f"heads.{task}": weight.numpy() for task, weight in heads.items()}
    # One key: the format's writer does not keep the order of several.
    about = ORIGIN | {"seed": seed, "class_of_digit": CLASS_OF_DIGIT}
    metadata = {"about": json.dumps(about)}
    (out / "suite.safetensors").write_bytes(save(suite, metadata=metadata))


if __name__ == "__main__":
    main()
