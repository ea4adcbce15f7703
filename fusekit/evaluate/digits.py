"""The embedded suite: six ways of grouping handwritten digits, one base, one expert per grouping.

Every expert is the whole encoder fine-tuned from the base for one grouping (task) of the same
images, with a frozen random head that belongs to the suite and not to the checkpoints: what is
merged is the encoder, and any encoder can be scored on every task. Evaluation needs only NumPy;
`scripts/train_digits_experts.py` trains the models and writes the suite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from fusekit.checkpoint.folder import open_checkpoint
from fusekit.checkpoint.memory import MemorySource
from fusekit.checkpoint.safetensors import SafetensorsFile
from fusekit.checkpoint.source import TensorSource
from fusekit.errors import CheckpointError, FusekitError, did_you_mean
from fusekit.evaluate.suite import Settings, only_known

TASKS = ("parity", "modulo_3", "modulo_5", "halved", "thirded", "mirrored")
"""What the experts can tell of a digit d: d % 2, d % 3, d % 5, d // 2, d // 3, min(d, 9 - d)."""

PRETRAINING_TASK = "digit"
"""What the base was trained on: the ten digits. Its score tells what an expert or merge forgot."""

Split = Literal["train", "validation", "test"]
"""`train` is what base and experts saw, `validation` is for tuning, `test` is for reporting."""

Checkpoint: TypeAlias = str | Path | Mapping[str, Any]
"""A checkpoint folder or file, or its tensors by name (NumPy incl. ml_dtypes, or torch)."""

LAYER_NORM_EPS = 1e-5

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


class DigitsEvaluator:
    """Scores an encoder on this suite's tasks; an `Evaluator`."""

    identity = "digits"

    def __call__(
        self, checkpoint: Path, split: Split, tasks: Sequence[str]
    ) -> Mapping[str, NDArray[np.bool_]]:
        return correct(checkpoint, split, tasks)


def evaluator(settings: Settings, folder: Path) -> DigitsEvaluator:
    """The evaluator of the embedded suite; an `EvaluatorFactory` without settings."""
    only_known(settings, ())
    return DigitsEvaluator()


@cache
def examples(split: Split = "test") -> Examples:
    """The images and labels of a split.

    Raises:
        FusekitError: there is no such split.
    """
    if split not in get_args(Split):
        raise FusekitError(
            f"the digits suite has no split {split!r}{did_you_mean(split, get_args(Split))}"
        )
    suite = _suite()
    pixels = suite[f"{split}.images"]
    images = pixels.reshape(len(pixels), -1) / 16.0
    images.setflags(write=False)
    return Examples(
        images=images,
        labels={task: suite[f"{split}.labels.{task}"] for task in (*TASKS, PRETRAINING_TASK)},
    )


@cache
def head(task: str) -> NDArray[np.float32]:
    """The frozen head of a task, `[classes, 64]`: its logits are `features @ head.T`.

    Raises:
        FusekitError: there is no such task.
    """
    known = (*TASKS, PRETRAINING_TASK)
    if task not in known:
        raise FusekitError(f"the digits suite has no task {task!r}{did_you_mean(task, known)}")
    return _suite()[f"heads.{task}"]


def features(checkpoint: Checkpoint, images: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """The encoder's output for images `[n, 64]` in [0, 1]: `[n, 64]`.

    A residual MLP, `h = W x + b`, then in every layer `h += down(relu(up(layer_norm(h))))`. It is
    computed in float64, so that scores do not depend on the machine's BLAS.

    Raises:
        CheckpointError: the tensors are not those of the suite's base by name and shape, are not
            floating point, or hold NaN or Inf.
    """
    return _encode(_encoder(checkpoint), images)


def correct(
    checkpoint: Checkpoint, split: Split = "test", tasks: Sequence[str] = TASKS
) -> dict[str, NDArray[np.bool_]]:
    """For every task whether each example of the split, in a fixed order, is classified correctly.

    The same order for every checkpoint: two results can be compared pair by pair.

    Raises:
        CheckpointError: as `features`.
        FusekitError: there is no such split or task.
    """
    known = examples(split)
    heads = {task: head(task) for task in tasks}
    encoded = features(checkpoint, known.images)
    return {
        task: np.argmax(encoded @ weight.T, axis=1) == known.labels[task]
        for task, weight in heads.items()
    }


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


def _encoder(checkpoint: Checkpoint) -> dict[str, NDArray[np.float64]]:
    if isinstance(checkpoint, Mapping):
        source: TensorSource = MemorySource(checkpoint)
    else:
        source = open_checkpoint(str(checkpoint)).source
    try:
        _check_layout(source)
        return {name: _finite(source, name) for name in source.tensors}
    finally:
        source.close()


def _check_layout(source: TensorSource) -> None:
    expected = _base_shapes()
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


def _finite(source: TensorSource, name: str) -> NDArray[np.float64]:
    values = _read(source, name).astype(np.float64)
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise CheckpointError(
            f"{source.where(name)}: tensor {name!r} holds {bad} NaN or Inf, expected finite values"
        )
    return values


def _read(source: TensorSource, name: str) -> NDArray[Any]:
    info = source.tensors[name]
    values = np.empty(info.shape, dtype=info.dtype.numpy)
    source.read_into(name, 0, info.size, values.reshape(-1).view(np.uint8).data)
    return values


@cache
def _base_shapes() -> dict[str, tuple[int, ...]]:
    source = open_checkpoint(str(base())).source
    try:
        return {name: info.shape for name, info in source.tensors.items()}
    finally:
        source.close()


@cache
def _suite() -> dict[str, NDArray[Any]]:
    source = SafetensorsFile(_DATA / "suite.safetensors")
    try:
        suite = {name: _read(source, name) for name in source.tensors}
    finally:
        source.close()
    for values in suite.values():
        values.setflags(write=False)  # shared by every caller
    return suite
