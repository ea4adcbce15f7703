"""Training the vision suite: a pre-trained vision transformer, an expert for every task, and one
model for all tasks, trained under the experts' heads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusekit.errors import FusekitError, MissingExtraError
from fusekit.evaluate.building import MULTITASK, once, suite_name, write_suite
from fusekit.evaluate.pretrained import one_thread
from fusekit.evaluate.suite import Settings, only_known
from fusekit.evaluate.vision import (
    PRETRAINING_TASK,
    TASKS,
    VisionEvaluator,
    as_tensor,
    backbone,
    examples,
    features_of,
)
from fusekit.evaluate.vision_data import ORIGIN, PHOTO_SIZE, ImageFile, Images, prepare

PATCH_SIZE = 8
HEAD_WIDTH = 16
SHIFT = 1
"""Pixels by which an image is moved at most when it is trained on."""

INITIAL_SPREAD = 0.1
"""Of new weights: about 1 / sqrt(width); the default of large models learns far too slowly here."""


@dataclass(frozen=True)
class Plan:
    """What `--set` can change: the model's size, and how long which model is trained."""

    hidden_size: int = 64
    layers: int = 4
    pretraining_steps: int = 4500
    expert_steps: int = 600
    multitask_steps: int = 2000
    learning_rate: float = 3e-3
    expert_learning_rate: float = 1.5e-3
    batch: int = 64


def build(
    out: Path,
    *,
    data: Path | None,
    seed: int,
    settings: Settings,
    on_progress: Callable[[str], None],
) -> None:
    """Train the suite into a folder; a `Builder`. Settings: the fields of `Plan`.

    Raises:
        FusekitError: an unknown or unusable setting, or data that is absent or unreadable.
    """
    plan = _plan(settings)
    about = {"seed": seed, **asdict(plan)}
    images = out / "images" / "images.safetensors"
    if not (out / "images").exists():
        on_progress("reading images")
        prepared = prepare(data, seed)
        once(
            out / "images",
            {"seed": seed},
            lambda folder: save_arrays(prepared, folder / images.name, {"origin": ORIGIN}),
        )
    file = ImageFile(images)
    folders = {PRETRAINING_TASK: out / "base"}
    folders |= {task: out / "experts" / task for task in TASKS if task != PRETRAINING_TASK}
    heads = {task: folder / "head" / "head.safetensors" for task, folder in folders.items()}
    evaluator_of = partial(VisionEvaluator, images)

    def made(folder: Path, tasks: Sequence[str], train: Callable[[Path], None]) -> None:
        began = time.process_time()
        if once(folder, {"tasks": list(tasks), **about}, train):
            scored = evaluator_of({t: heads[t] for t in tasks})(folder, "validation", tasks)
            reached = np.mean([each.mean() for each in scored.values()])
            seconds = time.process_time() - began
            on_progress(f"{folder.name}: {reached:.1%} on validation, {seconds:.0f} CPU s")

    for task, folder in folders.items():
        start = None if task == PRETRAINING_TASK else out / "base"
        made(folder, [task], partial(_train, file, task, start, plan, seed))
    own = {task: path for task, path in heads.items() if task != PRETRAINING_TASK}
    together = partial(_train_together, file, own, out / "base", plan, seed)
    made(out / MULTITASK, list(own), together)
    write_suite(
        out,
        {
            "name": suite_name("vision", seed, settings),
            "evaluator": "vision",
            "base": "base",
            "experts": {task: f"experts/{task}" for task in folders if task != PRETRAINING_TASK},
            "references": {MULTITASK: MULTITASK},
            "forgetting": [PRETRAINING_TASK],
            "axes": {
                "size": sum(p.numel() for p in backbone(out / "base").parameters()),
                "base_quality": plan.pretraining_steps,
                "seed": seed,
            },
            "settings": {
                "images": str(images.relative_to(out)),
                "heads": {task: str(path.relative_to(out)) for task, path in heads.items()},
            },
        },
    )


def _plan(settings: Settings) -> Plan:
    defaults = asdict(Plan())
    only_known(settings, tuple(defaults))
    for key, value in settings.items():
        whole = isinstance(defaults[key], int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            kind = "a whole number" if whole else "a number"
            raise FusekitError(f"{key}: found {value!r}, expected {kind}")
        if not value > 0:
            raise FusekitError(f"{key}: found {value}, expected more than 0")
    plan = Plan(**settings)
    if plan.hidden_size % HEAD_WIDTH:
        raise FusekitError(
            f"hidden_size: found {plan.hidden_size}, expected a multiple of {HEAD_WIDTH}"
        )
    return plan


def _train(
    file: ImageFile, task: str, start: Path | None, plan: Plan, seed: int, folder: Path
) -> None:
    """Train a backbone with a new head on a task and write both."""
    torch.manual_seed(seed + list(TASKS).index(task))
    with one_thread():
        model = _new_backbone(plan) if start is None else backbone(start)
        head = nn.Linear(plan.hidden_size, TASKS[task].classes)
        steps = plan.pretraining_steps if start is None else plan.expert_steps
        rate = plan.learning_rate if start is None else plan.expert_learning_rate
        known = [_Trained.of(file, task, head)]
        _fit(model, known, [*model.parameters(), *head.parameters()], steps, rate, plan.batch)
    _write(model, folder)
    (folder / "head").mkdir()
    save_file(dict(head.state_dict()), folder / "head" / "head.safetensors")


def _train_together(
    file: ImageFile, heads: Mapping[str, Path], start: Path, plan: Plan, seed: int, folder: Path
) -> None:
    """Train one backbone on all tasks under the experts' heads, which stay as they are."""
    torch.manual_seed(seed)
    with one_thread():
        model = backbone(start)
        known = []
        for task, path in heads.items():
            head = nn.Linear(plan.hidden_size, TASKS[task].classes)
            head.load_state_dict(load_file(path))
            known.append(_Trained.of(file, task, head))
        moving = list(model.parameters())
        _fit(model, known, moving, plan.multitask_steps, plan.expert_learning_rate, plan.batch)
    _write(model, folder)


def _write(model: Any, folder: Path) -> None:
    # Not save_pretrained: it writes other names than the modules have, and statistics go by these.
    model.config.architectures = ["ViTModel"]
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})


def _new_backbone(plan: Plan) -> Any:
    try:
        from transformers import ViTConfig, ViTModel
    except ModuleNotFoundError:
        raise MissingExtraError("building the vision suite", "torch") from None
    config = ViTConfig(
        hidden_size=plan.hidden_size,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.hidden_size // HEAD_WIDTH,
        intermediate_size=2 * plan.hidden_size,
        image_size=PHOTO_SIZE,
        patch_size=PATCH_SIZE,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=INITIAL_SPREAD,
    )
    return ViTModel(config, add_pooling_layer=False)


@dataclass(frozen=True, eq=False)
class _Trained:
    """A task to train on: its head and examples."""

    head: nn.Linear
    known: Images
    mirrored: int | None

    @classmethod
    def of(cls, file: ImageFile, task: str, head: nn.Linear) -> _Trained:
        return cls(head, examples(file, task, "train"), TASKS[task].mirrored)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Random examples, shifted a little, and where that may be mirrored by chance."""
        chosen = torch.randint(len(self.known.labels), (count,)).numpy()
        pixels = _shifted(as_tensor(self.known.pixels[chosen]))
        labels = torch.from_numpy(self.known.labels[chosen].astype(np.int64))
        if self.mirrored is not None:
            swapped = (torch.rand(count) < 0.5) & (labels >= self.mirrored)
            pixels[swapped] = pixels[swapped].flip(3)
        return pixels, labels


def _fit(
    model: Any,
    tasks: Sequence[_Trained],
    moving: Sequence[nn.Parameter],
    steps: int,
    rate: float,
    batch: int,
) -> None:
    """AdamW with a linear warm-up and a cosine decay; batches hold as many images of every task."""
    optimiser = torch.optim.AdamW(moving, lr=rate, weight_decay=0.05)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    count = max(1, batch // len(tasks))
    model.train()
    for _ in range(steps):
        drawn = [task.draw(count) for task in tasks]
        features = features_of(model(torch.cat([pixels for pixels, _ in drawn])))
        losses = [
            nn.functional.cross_entropy(task.head(seen), labels)
            for task, seen, (_, labels) in zip(
                tasks, torch.split(features, count), drawn, strict=True
            )
        ]
        optimiser.zero_grad()
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    model.eval()


def _shifted(pixels: Tensor) -> Tensor:
    """Every image of a batch moved by up to `SHIFT` pixels in both directions."""
    padded = nn.functional.pad(pixels, (SHIFT,) * 4, value=-1.0)
    size = torch.arange(pixels.shape[-1])
    by = torch.randint(2 * SHIFT + 1, (2, len(pixels), 1))
    rows, columns = by[0] + size, by[1] + size
    images = torch.arange(len(pixels))[:, None, None]
    return padded.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )
