"""The vision suite: eight tasks on small images, one vision transformer, a head per task.

What is merged is the backbone, a `ViTModel` of transformers; every expert's head is kept beside it
and reads the class token of whatever backbone is scored. `fusekit suite build vision` trains it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusekit.checkpoint.safetensors import SafetensorsFile
from fusekit.errors import CheckpointError, FusekitError, MissingExtraError, did_you_mean
from fusekit.evaluate.checkpoints import load_into, read_finite
from fusekit.evaluate.pretrained import one_thread
from fusekit.evaluate.suite import CALIBRATION_EXAMPLES, Calibration, Settings, only_known
from fusekit.evaluate.vision_data import PHOTO_CLASSES, PHOTO_SIZE, ImageFile, Images

if TYPE_CHECKING:
    import torch

PRETRAINING_TASK = "objects"
"""What the base was trained on: ten numerals and ten kinds of photographs, twenty classes."""

LIMITS = {"train": CALIBRATION_EXAMPLES, "validation": 250, "test": 600}
"""Examples per task that are measured (train) and scored, fewer where there are not so many."""

BATCH = 250

ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
_IS_ANIMAL = np.array([name in ANIMALS for name in PHOTO_CLASSES])


@dataclass(frozen=True)
class Task:
    """How a task's examples are made of stored images, and how many classes it has.

    Images of classes from `mirrored` on are still of their class when left and right are swapped.
    """

    classes: int
    make: Callable[[ImageFile, str], Images]
    mirrored: int | None = None


def examples(file: ImageFile, task: str, split: str) -> Images:
    """All examples of a task: pixels `[n, 32, 32, 3]` and labels `[n]`, in a fixed order.

    Raises:
        FusekitError: there is no such task.
    """
    if task not in TASKS:
        raise FusekitError(f"the vision suite has no task {task!r}{did_you_mean(task, TASKS)}")
    return TASKS[task].make(file, split)


def as_tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Pixels `[n, 32, 32, 3]` as the model wants them: `[n, 3, 32, 32]` in [-1, 1]."""
    import torch

    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def backbone(checkpoint: Path) -> Any:
    """The vision transformer of a checkpoint folder, in float32.

    Raises:
        CheckpointError: no configuration of such a model, or tensors that are not its own.
        MissingExtraError: without transformers.
    """
    try:
        from transformers import ViTConfig, ViTModel
    except ModuleNotFoundError:
        raise MissingExtraError("the vision suite", "torch") from None
    try:
        content = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: config.json cannot be read: {error}") from None
    if content.get("model_type") != "vit":
        raise CheckpointError(
            f"{checkpoint}: config.json has model_type {content.get('model_type')!r}, "
            "expected 'vit'"
        )
    return load_into(ViTModel(ViTConfig.from_dict(content), add_pooling_layer=False), checkpoint)


def features_of(output: Any) -> torch.Tensor:
    """What a backbone's output gives a head: the class token's last hidden state, `[n, width]`."""
    hidden: torch.Tensor = output.last_hidden_state
    return hidden[:, 0]


class VisionEvaluator:
    """Scores a backbone under the suite's heads; an `Evaluator` that `Calibrates`.

    Args:
        images: the file of images.
        heads: task -> file with `weight` (classes, width) and `bias` (classes).
    """

    def __init__(self, images: Path, heads: Mapping[str, Path]) -> None:
        self._images = ImageFile(images)
        self._heads = {task: _read_head(path) for task, path in heads.items()}
        self._known: dict[tuple[str, str], Images] = {}
        digest = hashlib.sha256(images.read_bytes() + repr(LIMITS).encode())
        for task in sorted(heads):
            digest.update(task.encode() + heads[task].read_bytes())
        self.identity = f"vision {digest.hexdigest()}"

    def __call__(
        self, checkpoint: Path, split: str, tasks: Sequence[str]
    ) -> Mapping[str, NDArray[np.bool_]]:
        """Whether each example is classified correctly."""
        for task in tasks:
            self._head(task)
        model = backbone(checkpoint)
        with one_thread():
            return {task: self._hits(model, task, split) for task in tasks}

    def calibration(self, checkpoint: Path, task: str) -> Calibration:
        """A backbone under a task's head, and training examples of it."""
        import torch

        known = self._examples(task, "train")
        weight, bias = map(torch.from_numpy, self._head(task))
        model = backbone(checkpoint)
        # A hook, not a module around it: statistics go by the names of the backbone's own modules.
        model.register_forward_hook(lambda _, __, out: features_of(out) @ weight.T + bias)
        labels = torch.from_numpy(known.labels.astype(np.int64))
        batches = [
            (as_tensor(known.pixels[at : at + 32]), labels[at : at + 32])
            for at in range(0, len(known.pixels), 32)
        ]
        return Calibration(model, batches, "layers")

    def _hits(self, model: Any, task: str, split: str) -> NDArray[np.bool_]:
        import torch

        known = self._examples(task, split)
        weight, bias = map(torch.from_numpy, self._head(task))
        guesses = []
        with torch.inference_mode():
            for at in range(0, len(known.pixels), BATCH):
                output = model(as_tensor(known.pixels[at : at + BATCH]))
                logits = features_of(output) @ weight.T + bias
                guesses.append(logits.argmax(dim=1).numpy())
        return np.asarray(np.concatenate(guesses) == known.labels)

    def _head(self, task: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if task not in self._heads:
            raise FusekitError(
                f"there is no head for task {task!r}{did_you_mean(task, self._heads)}"
            )
        return self._heads[task]

    def _examples(self, task: str, split: str) -> Images:
        if (task, split) not in self._known:
            made, limit = examples(self._images, task, split), LIMITS[split]
            self._known[task, split] = Images(made.pixels[:limit], made.labels[:limit])
        return self._known[task, split]


def evaluator(settings: Settings, folder: Path) -> VisionEvaluator:
    """An `EvaluatorFactory`.

    Args:
        settings: `images`, the file of images, and `heads`, task -> file; relative to the folder.
        folder: of the suite's YAML.

    Raises:
        FusekitError: a setting that is missing or unknown, or a file that is not there.
    """
    only_known(settings, ("images", "heads"))
    if not isinstance(settings.get("images"), str) or not isinstance(settings.get("heads"), dict):
        raise FusekitError("expected images (a file) and heads (task: file)")
    heads = {str(task): folder / str(path) for task, path in settings["heads"].items()}
    return VisionEvaluator(folder / settings["images"], heads)


def _read_head(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    source = SafetensorsFile(path)
    try:
        for name in ("weight", "bias"):
            if name not in source.tensors:
                raise CheckpointError(f"{path}: no tensor {name!r}, expected a head")
        return (
            read_finite(source, "weight", np.float32),
            read_finite(source, "bias", np.float32),
        )
    finally:
        source.close()


def _framed(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey 28 x 28 images in the middle of 32 x 32 ones, in colour."""
    grey = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
    return np.repeat(grey[..., None], 3, axis=3)


def _turned(images: Images) -> Images:
    """Every image turned by one of four right angles, which is its label."""
    angles = np.arange(len(images.pixels), dtype=np.uint8) % 4
    turned = np.stack(
        [np.rot90(image, int(k)) for image, k in zip(images.pixels, angles, strict=True)]
    )
    return Images(turned, angles)


def _numerals(file: ImageFile, split: str) -> Images:
    stored = file.images("numerals", split)
    return Images(_framed(stored.pixels), stored.labels)


def _coloured_numerals(file: ImageFile, split: str) -> Images:
    """Numerals in one colour on another, both drawn at random."""
    stored = _numerals(file, split)
    ink = stored.pixels / 255.0
    draw = np.random.default_rng(len(ink)).integers(0, 256, (2, len(ink), 1, 1, 3))
    return Images((draw[0] * ink + draw[1] * (1 - ink)).astype(np.uint8), stored.labels)


def _pairs(file: ImageFile, split: str) -> Images:
    """Two numerals side by side: is the left one greater?"""
    stored = file.images("numerals", split)
    half = stored.pixels[:, ::2, ::2] // 2 + stored.pixels[:, 1::2, 1::2] // 2
    other, label = np.roll(half, 1, axis=0), np.roll(stored.labels, 1)
    canvas = np.zeros((len(half), PHOTO_SIZE, PHOTO_SIZE), np.uint8)
    canvas[:, 9:23, 1:15] = half
    canvas[:, 9:23, 17:31] = other
    return Images(np.repeat(canvas[..., None], 3, axis=3), (stored.labels > label).astype(np.uint8))


def _small_digits(file: ImageFile, split: str) -> Images:
    stored = file.images("digits", split)
    enlarged = stored.pixels.repeat(4, axis=1).repeat(4, axis=2)
    return Images(np.repeat(enlarged[..., None], 3, axis=3), stored.labels)


def _photos(file: ImageFile, split: str) -> Images:
    return file.images("photos", split)


def _kinds(animals: bool) -> Callable[[ImageFile, str], Images]:
    """Photographs of animals, or of vehicles, numbered from 0."""
    number = np.cumsum(animals == _IS_ANIMAL, dtype=np.uint8) - 1

    def make(file: ImageFile, split: str) -> Images:
        photos = file.images("photos", split)
        chosen = _IS_ANIMAL[photos.labels] == animals
        return Images(photos.pixels[chosen], number[photos.labels[chosen]])

    return make


def _living(file: ImageFile, split: str) -> Images:
    photos = file.images("photos", split)
    return Images(photos.pixels, _IS_ANIMAL[photos.labels].astype(np.uint8))


def _objects(file: ImageFile, split: str) -> Images:
    """Numerals and photographs by turns: ten classes and ten more."""
    numerals, photos = _numerals(file, split), _photos(file, split)
    count = min(len(numerals.labels), len(photos.labels))
    pixels = np.stack([numerals.pixels[:count], photos.pixels[:count]], axis=1)
    labels = np.stack([numerals.labels[:count], photos.labels[:count] + 10], axis=1)
    return Images(pixels.reshape(-1, *pixels.shape[2:]), labels.reshape(-1))


TASKS: Mapping[str, Task] = {
    "coloured_numerals": Task(10, _coloured_numerals),
    "numerals_turned": Task(4, lambda file, split: _turned(_numerals(file, split))),
    "numeral_pairs": Task(2, _pairs),
    "digits": Task(10, _small_digits),
    "animals": Task(6, _kinds(animals=True), mirrored=0),
    "vehicles": Task(4, _kinds(animals=False), mirrored=0),
    "living": Task(2, _living, mirrored=0),
    "photos_turned": Task(4, lambda file, split: _turned(_photos(file, split))),
    PRETRAINING_TASK: Task(20, _objects, mirrored=10),
}
"""The experts' tasks, and last the base's."""
