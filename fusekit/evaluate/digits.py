"""The digits suite: six ways of grouping handwritten digits, one base, one expert per grouping.

Every expert is the whole encoder fine-tuned from the base for one grouping (task) of the same
images, with a frozen random head that belongs to the suite and not to the checkpoints: what is
merged is the encoder, and any encoder can be scored on every task. One suite is embedded in the
package; `fusekit suite build digits` trains others, of other sizes. Evaluation needs only NumPy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from fusekit.checkpoint.folder import open_checkpoint
from fusekit.checkpoint.memory import MemorySource
from fusekit.checkpoint.safetensors import SafetensorsFile
from fusekit.checkpoint.source import TensorSource
from fusekit.errors import CheckpointError, FusekitError, did_you_mean
from fusekit.evaluate.checkpoints import read_finite, read_tensor
from fusekit.evaluate.suite import CALIBRATION_EXAMPLES, Calibration, Settings, only_known

TASKS = ("parity", "modulo_3", "modulo_5", "halved", "thirded", "mirrored")
"""What the experts can tell of a digit d: d % 2, d % 3, d % 5, d // 2, d // 3, min(d, 9 - d)."""

PRETRAINING_TASK = "digit"
"""What the base was trained on: the ten digits. Its score tells what an expert or merge forgot."""

Split = Literal["train", "validation", "test"]
"""`train` is what base and experts saw, `validation` is for tuning, `test` is for reporting."""

Checkpoint: TypeAlias = str | Path | Mapping[str, Any]
"""A checkpoint folder or file, or its tensors by name (NumPy incl. ml_dtypes, or torch)."""

LAYER_NORM_EPS = 1e-5

PROBE_PENALTY = 1e-3
"""Ridge penalty of linear probes, relative to the features' mean square."""

_DATA = Path(__file__).parent / "data" / "digits"


@dataclass(frozen=True)
class Examples:
    """Images of a split, `[n, 64]` in [0, 1], and for every task the classes, `[n]`."""

    images: NDArray[np.float64]
    labels: Mapping[str, NDArray[np.uint8]]


def base() -> Path:
    """The folder of the base, pre-trained on the ten digits (`PRETRAINING_TASK`)."""
    return _DATA / "base"


def experts() -> dict[str, Path]:
    """`task -> folder` of the experts, each fine-tuned from the base on its task."""
    return {task: _DATA / f"expert_{task}" for task in TASKS}


class DigitsSuite:
    """Images, labels and heads of a digits suite, and an `Evaluator` of encoders on them.

    A task with a head is scored by it; one that has only labels (held-out) by a linear probe,
    fitted to the training images' features by ridge regression.

    Args:
        file: images, labels and heads.
        base: the suite's base, whose tensors every checkpoint must have by name and shape.

    Raises:
        CheckpointError: an unreadable file, or one that holds something else.
    """

    def __init__(self, file: Path, base: Path) -> None:
        source = SafetensorsFile(file)
        try:
            if "test.images" not in source.tensors:
                raise CheckpointError(f"{file}: no tensor 'test.images', expected a digits suite")
            self._arrays = {name: read_tensor(source, name) for name in source.tensors}
        finally:
            source.close()
        for values in self._arrays.values():
            values.setflags(write=False)  # shared by every caller
        self.identity = f"digits {hashlib.sha256(file.read_bytes()).hexdigest()}"
        self._shapes = _shapes(base)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Everything there are labels for."""
        prefix = "test.labels."
        return tuple(n.removeprefix(prefix) for n in self._arrays if n.startswith(prefix))

    def __call__(
        self, checkpoint: Path, split: Split, tasks: Sequence[str]
    ) -> Mapping[str, NDArray[np.bool_]]:
        return self.correct(checkpoint, split, tasks)

    def examples(self, split: Split) -> Examples:
        """The images and labels of a split."""
        if split not in get_args(Split):
            raise FusekitError(
                f"the digits suite has no split {split!r}{did_you_mean(split, get_args(Split))}"
            )
        pixels = self._arrays[f"{split}.images"]
        images = pixels.reshape(len(pixels), -1) / 16.0
        images.setflags(write=False)
        return Examples(images, {t: self._arrays[f"{split}.labels.{t}"] for t in self.tasks})

    def head(self, task: str) -> NDArray[np.float32]:
        """The frozen head of a task, `[classes, width]`."""
        if f"heads.{task}" not in self._arrays:
            known = [n.removeprefix("heads.") for n in self._arrays if n.startswith("heads.")]
            raise FusekitError(f"the digits suite has no task {task!r}{did_you_mean(task, known)}")
        return self._arrays[f"heads.{task}"]

    def features(
        self, checkpoint: Checkpoint, images: NDArray[np.floating[Any]]
    ) -> NDArray[np.float64]:
        """The encoder's output for images `[n, 64]` in [0, 1]: `[n, width]`."""
        return _encode(_encoder(checkpoint, self._shapes), images)

    def correct(
        self, checkpoint: Checkpoint, split: Split, tasks: Sequence[str]
    ) -> dict[str, NDArray[np.bool_]]:
        """For every task whether each example of the split is classified correctly."""
        known = self.examples(split)
        for task in tasks:
            if task not in known.labels:
                self.head(task)  # says which tasks there are
        with threadpool_limits(1, user_api="blas"):  # more threads only wait for one another
            encoder = _encoder(checkpoint, self._shapes)
            encoded = _encode(encoder, known.images)
            return {
                task: np.argmax(encoded @ self._readout(encoder, task).T, axis=1)
                == known.labels[task]
                for task in tasks
            }

    def calibration(self, checkpoint: Path, task: str) -> Calibration:
        """An encoder under a task's head, and training images; an evaluator that `Calibrates`."""
        from fusekit.evaluate.digits_training import calibration

        known, wanted = self.examples("train"), slice(CALIBRATION_EXAMPLES)
        head = self.head(task)
        tensors = _encoder(checkpoint, self._shapes)
        return calibration(tensors, head, known.images[wanted], known.labels[task][wanted])

    def _readout(self, encoder: Mapping[str, NDArray[np.float64]], task: str) -> NDArray[Any]:
        """What turns features into scores of classes: the task's head, or a fitted probe."""
        if f"heads.{task}" in self._arrays:
            return self._arrays[f"heads.{task}"]
        known = self.examples("train")
        seen = _encode(encoder, known.images)
        wanted = np.eye(int(known.labels[task].max()) + 1)[known.labels[task]]
        penalty = PROBE_PENALTY * np.trace(seen.T @ seen) / seen.shape[1] * np.eye(seen.shape[1])
        return np.asarray(np.linalg.solve(seen.T @ seen + penalty, seen.T @ wanted).T)


def evaluator(settings: Settings, folder: Path) -> DigitsSuite:
    """An `EvaluatorFactory`: the embedded suite, or one that was built.

    Args:
        settings: none, or `examples`, the suite's file, and `base`; relative to the folder.
        folder: of the suite's YAML.

    Raises:
        FusekitError: a setting that is unknown or missing, or a file that is not there.
    """
    only_known(settings, ("examples", "base"))
    if not settings:
        return embedded()
    if not all(isinstance(settings.get(key), str) for key in ("examples", "base")):
        raise FusekitError("expected examples (a file) and base (a folder)")
    return DigitsSuite(folder / settings["examples"], folder / settings["base"])


@cache
def embedded() -> DigitsSuite:
    """The suite that comes with fusekit."""
    return DigitsSuite(_DATA / "suite.safetensors", base())


@cache
def examples(split: Split = "test") -> Examples:
    """The images and labels of a split.

    Raises:
        FusekitError: there is no such split.
    """
    return embedded().examples(split)


def head(task: str) -> NDArray[np.float32]:
    """The frozen head of a task, `[classes, 64]`: its logits are `features @ head.T`.

    Raises:
        FusekitError: there is no such task.
    """
    return embedded().head(task)


def features(checkpoint: Checkpoint, images: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """The encoder's output for images `[n, 64]` in [0, 1]: `[n, 64]`.

    A residual MLP, `h = W x + b`, then in every layer `h += down(relu(up(layer_norm(h))))`. It is
    computed in float64, so that scores do not depend on the machine's BLAS.

    Raises:
        CheckpointError: the tensors are not those of the suite's base by name and shape, are not
            floating point, or hold NaN or Inf.
    """
    return embedded().features(checkpoint, images)


def correct(
    checkpoint: Checkpoint, split: Split = "test", tasks: Sequence[str] = TASKS
) -> dict[str, NDArray[np.bool_]]:
    """For every task whether each example of the split, in a fixed order, is classified correctly.

    The same order for every checkpoint: two results can be compared pair by pair.

    Raises:
        CheckpointError: as `features`.
        FusekitError: there is no such split or task.
    """
    return embedded().correct(checkpoint, split, tasks)


def evaluate(
    checkpoint: Checkpoint, split: Split = "test", tasks: Sequence[str] = TASKS
) -> dict[str, float]:
    """The accuracy, between 0 and 1, of a checkpoint on every task.

    >>> scores = evaluate(base(), tasks=[PRETRAINING_TASK])
    >>> scores["digit"] > 0.95
    True

    Raises:
        CheckpointError: as `features`.
        FusekitError: there is no such split or task.
    """
    return {task: float(hits.mean()) for task, hits in correct(checkpoint, split, tasks).items()}


def expert_scores(split: Split = "test") -> dict[str, float]:
    """The accuracy of every expert on its own task: the reference of `normalised`."""
    return {task: evaluate(path, split, [task])[task] for task, path in experts().items()}


def normalised(scores: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    """`scores[task] / reference[task]` for every task of `scores`.

    With the experts' own scores as the reference this is the share of their performance that a
    merge keeps.

    Raises:
        FusekitError: the reference lacks a task, or is not positive there.

    References:
        What Matters for Model Merging at Scale?, arXiv 2410.03617.
    """
    for task in scores:
        if task not in reference:
            raise FusekitError(
                f"the reference has no score for task {task!r}{did_you_mean(task, reference)}"
            )
        if not reference[task] > 0:
            raise FusekitError(
                f"the reference score of task {task!r} is {reference[task]}, expected more than 0"
            )
    return {task: score / reference[task] for task, score in scores.items()}


def _encode(
    tensors: Mapping[str, NDArray[np.float64]], images: NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    def linear(name: str, x: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        return np.asarray(x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"])

    hidden = linear("embeddings.projection", images)
    layer = 0
    while f"encoder.layers.{layer}.mlp.up_proj.weight" in tensors:
        at = f"encoder.layers.{layer}"
        centred = hidden - hidden.mean(axis=1, keepdims=True)
        scale = 1 / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + LAYER_NORM_EPS)
        normed = centred * scale * tensors[f"{at}.layer_norm.weight"]
        normed += tensors[f"{at}.layer_norm.bias"]
        hidden = hidden + linear(
            f"{at}.mlp.down_proj", np.maximum(linear(f"{at}.mlp.up_proj", normed), 0)
        )
        layer += 1
    return hidden


def _encoder(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[np.float64]]:
    if isinstance(checkpoint, Mapping):
        source: TensorSource = MemorySource(checkpoint)
    else:
        source = open_checkpoint(str(checkpoint)).source
    try:
        _check_layout(source, shapes)
        return {name: read_finite(source, name) for name in source.tensors}
    finally:
        source.close()


def _check_layout(source: TensorSource, expected: Mapping[str, tuple[int, ...]]) -> None:
    for name in [*expected, *source.tensors]:
        if name not in source.tensors:
            problem = f"tensor {name!r} is missing"
        elif name not in expected:
            problem = f"tensor {name!r} is not one of its tensors{did_you_mean(name, expected)}"
        elif source.tensors[name].shape != expected[name]:
            problem = (
                f"tensor {name!r} has shape {list(source.tensors[name].shape)}, "
                f"expected {list(expected[name])}"
            )
        elif not source.tensors[name].dtype.is_float:
            problem = (
                f"tensor {name!r} is {source.tensors[name].dtype.name}, expected floating point"
            )
        else:
            continue
        raise CheckpointError(f"{source.label}: not an encoder of the digits suite: {problem}")


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    source = open_checkpoint(str(folder)).source
    try:
        return {name: info.shape for name, info in source.tensors.items()}
    finally:
        source.close()
