"""Scoring causal language models by their perplexity on windows of tokens, domain by domain.

The windows lie in a safetensors file as `<split>.<task>`, integers `[windows, length]`, tokenized
once when the suite is built: any checkpoint of the same vocabulary can be scored on them. The split
`train` is of the text that experts were trained on, to measure them on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
"""Windows in one forward pass."""

CALIBRATION_BATCH = 8
"""Windows in one forward pass that keeps what its gradient needs."""


class PerplexityEvaluator:
    """An `Evaluator`: 1 / perplexity of every window, exp(mean log p(token | tokens before it)).

    All windows are equally long: the geometric mean over windows is 1 / perplexity of the domain.

    Args:
        path: the file of windows.

    Raises:
        FusekitError: there is no such file, or it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.identity = f"lm {file_digest(path)}"
        self._path = path
        source = SafetensorsFile(path)
        try:
            self._windows = {name: read_tensor(source, name) for name in source.tensors}
        finally:
            source.close()
        for name, windows in self._windows.items():
            if windows.ndim != 2 or windows.dtype.kind not in "iu" or min(windows.shape) < 1:
                raise FusekitError(
                    f"{path}: {name!r} is {windows.dtype} {list(windows.shape)}, expected token "
                    "numbers [windows, length]"
                )

    def __call__(
        self, checkpoint: Path, split: str, tasks: Sequence[str]
    ) -> Mapping[str, NDArray[np.float64]]:
        wanted = {task: self._of(split, task) for task in tasks}
        model = self._model(checkpoint, max(int(windows.max()) for windows in wanted.values()))
        return {task: _finite(scores(model, own), checkpoint) for task, own in wanted.items()}

    def calibration(self, checkpoint: Path, task: str) -> Calibration:
        """A language model, and windows it was trained on; an evaluator that `Calibrates`."""
        import torch

        if f"train.{task}" not in self._windows:
            raise no_training_examples(self._path, task)
        windows = self._of("train", task)
        model = self._model(checkpoint, int(windows.max()))
        batches = [
            {"input_ids": torch.from_numpy(windows[start : start + CALIBRATION_BATCH])}
            for start in range(0, len(windows), CALIBRATION_BATCH)
        ]
        return Calibration(model, batches, "model.layers")

    def _model(self, checkpoint: Path, largest: int) -> Any:
        """The language model, which must know all tokens up to the largest."""
        model = load_pretrained("AutoModelForCausalLM", checkpoint)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        if largest >= vocabulary:
            raise CheckpointError(
                f"{checkpoint}: a vocabulary of {vocabulary} tokens, but {self._path} holds token "
                f"{largest}; score models on windows of their own tokenizer"
            )
        return model

    def _of(self, split: str, task: str) -> NDArray[np.int64]:
        name = f"{split}.{task}"
        if name not in self._windows:
            raise FusekitError(
                f"{self._path}: no windows {name!r}{did_you_mean(name, self._windows)}"
            )
        return self._windows[name].astype(np.int64)


def evaluator(settings: Settings, folder: Path) -> PerplexityEvaluator:
    """An `EvaluatorFactory` with one setting: `windows`, the file, relative to the suite's folder.

    Raises:
        FusekitError: another setting, or a file that cannot be used.
    """
    return PerplexityEvaluator(only_file(settings, "windows", folder))


def scores(model: Any, windows: NDArray[np.int64]) -> NDArray[np.float64]:
    """exp of the mean log-likelihood, in nats per token, of every window `[windows, length]`."""
    import torch

    found = []
    with one_thread(), torch.inference_mode():
        for start in range(0, len(windows), BATCH):
            tokens = torch.from_numpy(windows[start : start + BATCH])
            losses = torch.nn.functional.cross_entropy(
                model(input_ids=tokens).logits[:, :-1].flatten(0, 1),
                tokens[:, 1:].flatten(),
                reduction="none",
            )
            found.append(torch.exp(-losses.view(len(tokens), -1).double().mean(dim=1)).numpy())
    return np.concatenate(found)


def _finite(values: NDArray[np.float64], checkpoint: Path) -> NDArray[np.float64]:
    if not np.isfinite(values).all():
        raise CheckpointError(f"{checkpoint}: its predictions hold NaN, expected probabilities")
    return values
