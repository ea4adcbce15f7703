"""Training the vision suite: one pre-trained vision transformer and an expert for every task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import Tensor, nn

from fusekit.errors import FusekitError, MissingExtraError
from fusekit.evaluate.building import once, write_suite
from fusekit.evaluate.suite import Settings, only_known
from fusekit.evaluate.vision import (
    PRETRAINING_TASK,
    TASKS,
    VisionEvaluator,
    as_tensor,
    backbone,
    examples,
    features_of,
    one_thread,
)
from fusekit.evaluate.vision_data import ORIGIN, PHOTO_SIZE, ImageFile, Images, prepare

PATCH_SIZE = 8
HEAD_WIDTH = 16
SHIFT = 3
INITIAL_SPREAD = 0.1
"""Of new weights: about 1 / sqrt(width); the default of large models learns far too slowly here."""


@dataclass(frozen=True)
class Plan:
    """What `--set` can change: the model's size, and how long base and experts are trained."""

    hidden_size: int = 64
    layers: int = 4
    pretraining_steps: int = 3000
    expert_steps: int = 500
    learning_rate: float = 2e-3
    expert_learning_rate: float = 7e-4
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
    for task, folder in folders.items():
        began = time.process_time()
        start = None if task == PRETRAINING_TASK else out / "base"
        made = once(
            folder,
            {"task": task, **about},
            lambda target, task=task, start=start: _train(  # type: ignore[misc]
                target, file, task, start, plan, seed
            ),
        )
        if made:
            scored = VisionEvaluator(images, {task: heads[task]})(folder, "validation", [task])
            seconds = time.process_time() - began
            on_progress(f"{task}: {scored[task].mean():.1%} on validation, {seconds:.0f} CPU s")
    write_suite(
        out,
        {
            "name": "-".join(["vision", *(f"{k}_{v}" for k, v in sorted(settings.items()))]),
            "evaluator": "vision",
            "base": "base",
            "experts": {task: f"experts/{task}" for task in folders if task != PRETRAINING_TASK},
            "forgetting": [PRETRAINING_TASK],
            "axes": {
                "size": sum(p.numel() for p in backbone(out / "base").parameters()),
                "base_quality": plan.pretraining_steps,
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
    folder: Path, file: ImageFile, task: str, start: Path | None, plan: Plan, seed: int
) -> None:
    """Train a backbone with a new head on a task and write both."""
    torch.manual_seed(seed + list(TASKS).index(task))
    with one_thread():
        model = _new_backbone(plan) if start is None else backbone(start)
        head = nn.Linear(plan.hidden_size, TASKS[task].classes)
        known = examples(file, task, "train")
        steps = plan.pretraining_steps if start is None else plan.expert_steps
        rate = plan.learning_rate if start is None else plan.expert_learning_rate
        _fit(model, head, known, steps, rate, plan.batch)
    # Not save_pretrained: it writes other names than the modules have, and statistics go by these.
    model.config.architectures = ["ViTModel"]
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "head").mkdir()
    save_file(dict(head.state_dict()), folder / "head" / "head.safetensors")


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


def _fit(model: Any, head: nn.Linear, known: Images, steps: int, rate: float, batch: int) -> None:
    """AdamW with a linear warm-up and a cosine decay, on images shifted by a few pixels."""
    parameters = [*model.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    labels = torch.from_numpy(known.labels.astype(np.int64))
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(labels), (batch,))
        pixels = _shifted(as_tensor(known.pixels[chosen.numpy()]))
        loss = nn.functional.cross_entropy(head(features_of(model(pixels))), labels[chosen])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    model.eval()


def _shifted(pixels: Tensor) -> Tensor:
    """A batch of images moved together by up to `SHIFT` pixels in both directions."""
    x, y = torch.randint(2 * SHIFT + 1, (2,)).tolist()
    padded = nn.functional.pad(pixels, (SHIFT,) * 4, value=-1.0)
    size = pixels.shape[-1]
    return padded[..., y : y + size, x : x + size]
