"""Scoring sentence encoders: classification through fixed heads, and matching halves of sentences.

What is merged is the encoder; heads belong to the suite. A file of the suite holds, as integers,
`<split>.<task>.tokens` `[examples, length]` (-1: padding) and `<split>.<task>.labels` `[examples]`,
and `heads.<task>.weight` `[classes, width]`, `heads.<task>.bias` `[classes]`. A task without labels
is one of matching: its tokens are first halves, then as many second halves of the same sentences.
The split `train` holds some of the examples that experts were trained on, to measure them on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusekit.checkpoint.safetensors import SafetensorsFile
from fusekit.errors import CheckpointError, FusekitError, did_you_mean
from fusekit.evaluate.checkpoints import read_tensor
from fusekit.evaluate.pretrained import file_digest, load_pretrained, one_thread
from fusekit.evaluate.settings import only_file
from fusekit.evaluate.suite import Calibration, Settings, no_training_examples

BATCH = 32
"""Sentences in one forward pass."""

CANDIDATES = 10
"""Second halves among which a first half has to find its own: chance is a tenth."""

PADDING = -1
"""What fills the rows of shorter sentences."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokenized sentences `[examples, length]` and their classes, None for a matching task."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64] | None


@dataclass(frozen=True, eq=False)
class Head:
    """Logits are `features @ weight.T + bias`."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


class SentenceEvaluator:
    """An `Evaluator`: whether each sentence is classified, or each half matched, correctly.

    Args:
        path: the suite's file of examples and heads.

    Raises:
        FusekitError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.identity = f"text {file_digest(path)}"
        self._path = path
        source = SafetensorsFile(path)
        try:
            self._held = {name: read_tensor(source, name) for name in source.tensors}
        finally:
            source.close()

    def __call__(
        self, checkpoint: Path, split: str, tasks: Sequence[str]
    ) -> Mapping[str, NDArray[np.bool_]]:
        wanted = {task: self.examples(split, task) for task in tasks}
        model = load_pretrained("AutoModel", checkpoint)
        found = {}
        for task, own in wanted.items():
            encoded = features(model, own.tokens)
            if not np.isfinite(encoded).all():
                raise CheckpointError(f"{checkpoint}: its features hold NaN, expected numbers")
            if own.labels is None:
                found[task] = matched(encoded)
            else:
                found[task] = classify(encoded, self.head(task)) == own.labels
        return found

    def calibration(self, checkpoint: Path, task: str) -> Calibration:
        """An encoder under a task's head, and training examples; an evaluator that `Calibrates`."""
        import torch

        if f"train.{task}.labels" not in self._held:
            raise no_training_examples(self._path, task)
        known, head = self.examples("train", task), self.head(task)
        model = load_pretrained("AutoModel", checkpoint)
        # A hook, not a module around it: statistics go by the names of the encoder's own modules.
        model.register_forward_hook(
            lambda _, __, given, output: logits(output, given["attention_mask"], head),
            with_kwargs=True,
        )
        labels = torch.from_numpy(np.asarray(known.labels))
        order = np.argsort((known.tokens != PADDING).sum(axis=1), kind="stable")
        batches = [
            {**encoder_inputs(known.tokens[chosen]), "labels": labels[chosen]}
            for chosen in np.split(order, range(BATCH, len(order), BATCH))
        ]
        return Calibration(model, batches, "encoder.layer")

    def examples(self, split: str, task: str) -> Examples:
        """The examples of a task.

        Raises:
            FusekitError: the file has none.
        """
        tokens, labels = (self._held.get(f"{split}.{task}.{part}") for part in ("tokens", "labels"))
        if tokens is None:
            known = {name.rpartition(".")[0] for name in self._held if name.endswith(".tokens")}
            near = did_you_mean(f"{split}.{task}", known)
            raise FusekitError(f"{self._path}: no examples '{split}.{task}'{near}")
        return Examples(
            tokens.astype(np.int64), None if labels is None else labels.astype(np.int64)
        )

    def head(self, task: str) -> Head:
        """The head of a task that has labels."""
        return Head(self._held[f"heads.{task}.weight"], self._held[f"heads.{task}.bias"])


def evaluator(settings: Settings, folder: Path) -> SentenceEvaluator:
    """An `EvaluatorFactory` with one setting: `data`, the file, relative to the suite's folder.

    Raises:
        FusekitError: another setting, or a file that cannot be used.
    """
    return SentenceEvaluator(only_file(settings, "data", folder))


def features(model: Any, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Unit-length features of sentences `[examples, length]`, in their order: `[examples, width]`.

    Sentences of like length share a forward pass.
    """
    import torch

    order = np.argsort((tokens != PADDING).sum(axis=1), kind="stable")
    encoded: NDArray[np.float32] | None = None
    with one_thread(), torch.inference_mode():
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            part = encode(model, tokens[chosen]).numpy()
            if encoded is None:
                encoded = np.empty((len(tokens), part.shape[1]), np.float32)
            encoded[chosen] = part
    assert encoded is not None
    return encoded


def encode(model: Any, tokens: NDArray[np.int64]) -> Any:
    """Mean of the last hidden states over a sentence's tokens, scaled to unit length."""
    given = encoder_inputs(tokens)
    return pooled(model(**given).last_hidden_state, given["attention_mask"])


def encoder_inputs(tokens: NDArray[np.int64]) -> dict[str, Any]:
    """`input_ids` and `attention_mask` of sentences, cut to the longest of them."""
    import torch

    longest = int((tokens != PADDING).sum(axis=1).max())
    given = torch.from_numpy(tokens[:, :longest])
    return {"input_ids": given.clamp(min=0), "attention_mask": (given != PADDING).long()}


def pooled(hidden: Any, mask: Any) -> Any:
    """Mean of hidden states `[n, tokens, width]` where the mask is 1, scaled to unit length."""
    import torch

    weights = mask.unsqueeze(-1).to(hidden.dtype)
    means = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
    return torch.nn.functional.normalize(means, dim=1)


def logits(output: Any, mask: Any, head: Head) -> Any:
    """What a head makes of an encoder's output."""
    import torch

    weight, bias = torch.from_numpy(head.weight), torch.from_numpy(head.bias)
    return pooled(output.last_hidden_state, mask) @ weight.T + bias


def classify(encoded: NDArray[np.float32], head: Head) -> NDArray[np.int64]:
    """The most likely class of every sentence."""
    return np.asarray(np.argmax(encoded @ head.weight.T + head.bias, axis=1))


def matched(encoded: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether each first half is most similar to its own second half, of `CANDIDATES` neighbours.

    Args:
        encoded: unit-length features of n first halves, then of their n second halves. Halves are
            compared in runs of `CANDIDATES`, the last of which may be shorter.
    """
    first, second = np.split(encoded, 2)
    found = []
    for start in range(0, len(first), CANDIDATES):
        own = first[start : start + CANDIDATES] @ second[start : start + CANDIDATES].T
        found.append(np.argmax(own, axis=1) == np.arange(len(own)))
    return np.concatenate(found)
