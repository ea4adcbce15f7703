"""Training digits suites: a base that knows the ten digits and an expert for every grouping.

Every expert is the whole encoder fine-tuned from the base against a frozen random head of unit rows
times four. One thread and one seed: the same bytes again on the same machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from torch import Tensor, nn

from fusekit.errors import FusekitError
from fusekit.evaluate import digits
from fusekit.evaluate.building import MULTITASK, once, suite_name, write_suite
from fusekit.evaluate.digits import LAYER_NORM_EPS, PRETRAINING_TASK, TASKS
from fusekit.evaluate.pretrained import one_thread
from fusekit.evaluate.suite import Calibration, Settings, only_known

WIDTH = 64
LAYERS = 6
HEAD_SCALE = 4.0

CLASS_OF_DIGIT = {
    PRETRAINING_TASK: list(range(10)),
    "parity": [d % 2 for d in range(10)],
    "modulo_3": [d % 3 for d in range(10)],
    "modulo_5": [d % 5 for d in range(10)],
    "halved": [d // 2 for d in range(10)],
    "thirded": [d // 3 for d in range(10)],
    "mirrored": [min(d, 9 - d) for d in range(10)],
}

HELD_OUT = {
    "loops": [1, 0, 0, 0, 0, 0, 1, 0, 1, 1],
    "primes": [0, 0, 1, 1, 0, 1, 0, 1, 0, 0],
    "modulo_4": [d % 4 for d in range(10)],
}
"""Groupings that no model is trained on, scored by linear probes on the features."""

Splits = Mapping[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]
"""`split -> (pixels [n, 8, 8] from 0 to 16, digits [n])`."""


@dataclass(frozen=True)
class Schedule:
    """Adam on mini-batches drawn with replacement."""

    steps: int
    learning_rate: float
    batch: int = 64

    def draw(self, examples: int, generator: torch.Generator) -> list[Tensor]:
        """The examples of every step's batch."""
        size = (self.batch,)
        return [torch.randint(examples, size, generator=generator) for _ in range(self.steps)]


PRETRAINING = Schedule(steps=1000, learning_rate=1e-3)
FINE_TUNING = Schedule(steps=300, learning_rate=5e-4)


@dataclass(frozen=True)
class Plan:
    """What `--set` can change: the model's size, and how long base and experts are trained."""

    width: int = WIDTH
    layers: int = LAYERS
    pretraining_steps: int = PRETRAINING.steps
    expert_steps: int = FINE_TUNING.steps

    @property
    def parameters(self) -> int:
        """How many the encoder has."""
        return sum(p.numel() for p in DigitsEncoder(self.layers, self.width).parameters())


class MLP(nn.Module):
    """Two linear maps with a ReLU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(torch.relu(self.up_proj(x)))
        return out


class EncoderLayer(nn.Module):
    """A pre-norm residual MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(self.layer_norm(x))
        return out


class DigitsEncoder(nn.Module):
    """Images `[n, 64]` in [0, 1] to features `[n, width]`; the part that is merged."""

    def __init__(self, layers: int = LAYERS, width: int = WIDTH) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({"projection": nn.Linear(64, width)})
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(EncoderLayer(width) for _ in range(layers))}
        )

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.embeddings["projection"](images)
        layers = self.encoder["layers"]
        assert isinstance(layers, nn.ModuleList)
        for layer in layers:
            hidden = layer(hidden)
        return hidden


def random_head(classes: int, generator: torch.Generator, width: int = WIDTH) -> Tensor:
    """A frozen head: random unit rows times `HEAD_SCALE`."""
    rows = torch.randn(classes, width, generator=generator)
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
    batches = schedule.draw(len(images), generator)
    fit_on(model, [(head, labels)], images, batches, schedule.learning_rate)


def fit_on(
    model: DigitsEncoder,
    tasks: Sequence[tuple[Tensor, Tensor]],
    images: Tensor,
    batches: Sequence[Tensor],
    learning_rate: float,
) -> None:
    """Train the encoder on given batches; the loss is the mean over tasks, (head, labels) each."""
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for batch in batches:
        features = model(images[batch])
        losses = [nn.functional.cross_entropy(features @ h.T, labels[batch]) for h, labels in tasks]
        loss = torch.stack(losses).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def build(
    out: Path,
    *,
    data: Path | None,
    seed: int,
    settings: Settings,
    on_progress: Callable[[str], None],
) -> None:
    """Train a suite on the embedded images; a `Builder`. Settings: the fields of `Plan`.

    Raises:
        FusekitError: data, of which this suite needs none; an unknown or unusable setting.
    """
    if data is not None:
        raise FusekitError(f"suite 'digits' has its data in the package, found --data {data}")
    only_known(settings, tuple(asdict(Plan())))
    for key, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise FusekitError(f"{key}: found {value!r}, expected a whole number of at least 1")
    splits = {
        split: (
            np.round(known.images * 16).astype(np.uint8).reshape(-1, 8, 8),
            known.labels[PRETRAINING_TASK],
        )
        for split in ("train", "validation", "test")
        for known in [digits.examples(split)]
    }
    plan = Plan(**settings)
    train(out, splits, plan, seed, CLASS_OF_DIGIT | HELD_OUT, {}, on_progress)
    write_suite(
        out,
        {
            "name": suite_name("digits", seed, settings),
            "evaluator": "digits",
            "base": "base",
            "experts": {task: f"expert_{task}" for task in TASKS},
            "references": {MULTITASK: MULTITASK},
            "forgetting": [PRETRAINING_TASK, *HELD_OUT],
            "shared_examples": True,
            "axes": {
                "size": plan.parameters,
                "base_quality": plan.pretraining_steps,
                "seed": seed,
            },
            "settings": {"examples": "suite.safetensors", "base": "base"},
        },
    )


def train(
    out: Path,
    splits: Splits,
    plan: Plan,
    seed: int,
    class_of_digit: Mapping[str, Sequence[int]],
    origin: Mapping[str, str],
    on_progress: Callable[[str], None],
) -> None:
    """Train a base, the experts and a multitask model, and write them and `suite.safetensors`.

    Args:
        out: folder to write to; models that are there are not trained again.
        splits: the images and their digits.
        plan: the model's size and training.
        seed: of everything random.
        class_of_digit: task -> class of every digit; tasks of `CLASS_OF_DIGIT` get a head.
        origin: where the images are from, for the file's metadata.
        on_progress: called with what every model reached on its own task.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    labels = {
        (split, task): np.array(classes, dtype=np.uint8)[known]
        for split, (_, known) in splits.items()
        for task, classes in class_of_digit.items()
    }
    heads = {
        task: random_head(max(classes) + 1, generator, plan.width)
        for task, classes in CLASS_OF_DIGIT.items()
    }
    arrays = {f"{split}.images": pixels for split, (pixels, _) in splits.items()}
    arrays |= {f"{split}.labels.{task}": values for (split, task), values in labels.items()}
    arrays |= {f"heads.{task}": weight.numpy() for task, weight in heads.items()}
    # One key: the format's writer does not keep the order of several.
    about = {**origin, "seed": seed, "class_of_digit": dict(class_of_digit)}
    metadata = {"about": json.dumps(about)}
    (out / "suite.safetensors").write_bytes(save(arrays, metadata=metadata))

    images = torch.tensor(splits["train"][0].reshape(-1, 64) / 16, dtype=torch.float32)
    first = DigitsEncoder(plan.layers, plan.width)
    pretraining = Schedule(plan.pretraining_steps, PRETRAINING.learning_rate)
    tuning = Schedule(plan.expert_steps, FINE_TUNING.learning_rate)
    trained = [(out / "base", [PRETRAINING_TASK], pretraining)]
    trained += [(out / f"expert_{task}", [task], tuning) for task in TASKS]
    trained += [(out / MULTITASK, list(TASKS), tuning)]
    for folder, tasks, schedule in trained:
        batches = schedule.draw(len(images), generator)  # drawn whether or not they are needed
        known = [(heads[t], torch.tensor(labels["train", t], dtype=torch.long)) for t in tasks]

        def make(
            target: Path,
            tasks: list[str] = tasks,
            known: list[tuple[Tensor, Tensor]] = known,
            batches: list[Tensor] = batches,
            rate: float = schedule.learning_rate,
        ) -> None:
            model = first if tasks == [PRETRAINING_TASK] else _read_encoder(out / "base", plan)
            with one_thread():
                fit_on(model, known, images, batches, rate)
            write_checkpoint(target, model, plan, tasks)

        if once(folder, {"tasks": tasks, "seed": seed, **asdict(plan)}, make):
            suite = digits.DigitsSuite(out / "suite.safetensors", out / "base")
            hits = suite.correct(folder, "validation", tasks)
            reached = np.mean([each.mean() for each in hits.values()])
            on_progress(f"{folder.name}: {reached:.1%} on validation images")


def write_checkpoint(folder: Path, model: DigitsEncoder, plan: Plan, tasks: list[str]) -> None:
    """Save an encoder as a Hugging Face folder: config.json and model.safetensors."""
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    config = {
        "architectures": ["DigitsEncoder"],
        "model_type": "digits_encoder",
        "dtype": "float32",
        "hidden_act": "relu",
        "hidden_size": plan.width,
        "intermediate_size": 2 * plan.width,
        "layer_norm_eps": LAYER_NORM_EPS,
        "num_hidden_layers": plan.layers,
        "image_size": 8,
        "trained_on": ", ".join(tasks),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def calibration(
    tensors: Mapping[str, NDArray[np.float64]],
    head: NDArray[np.float32],
    images: NDArray[np.float64],
    labels: NDArray[np.uint8],
) -> Calibration:
    """An encoder under a head, and images to measure it on."""
    layers = sum(name.endswith("up_proj.weight") for name in tensors)
    width = tensors["embeddings.projection.bias"].size
    model = DigitsEncoder(layers, width)
    state = {name: torch.from_numpy(value).float() for name, value in tensors.items()}
    model.load_state_dict(state)
    weight = torch.from_numpy(head.copy())
    # A hook, not a module around it: statistics go by the names of the encoder's own modules.
    model.register_forward_hook(lambda _, __, features: features @ weight.T)
    inputs = torch.split(torch.tensor(images, dtype=torch.float32), 64)
    classes = torch.split(torch.tensor(labels, dtype=torch.long), 64)
    pairs = list(zip(inputs, classes, strict=True))
    return Calibration(model, pairs, "encoder.layers", estimator="exact")


def _read_encoder(folder: Path, plan: Plan) -> DigitsEncoder:
    model = DigitsEncoder(plan.layers, plan.width)
    state = load_file(folder / "model.safetensors")
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return model
