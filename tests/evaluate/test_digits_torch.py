"""The NumPy forward pass against the network that was trained."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file

from fusekit.evaluate import digits

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("train_digits_experts")


def test_features_are_those_of_the_trained_network(training: ModuleType) -> None:
    images = digits.examples("test").images
    for path in (digits.base(), *digits.experts().values()):
        tensors = load_file(path / "model.safetensors")
        model = training.DigitsEncoder().double()
        model.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
        with torch.no_grad():
            reference = model(torch.tensor(images)).numpy()
        np.testing.assert_allclose(digits.features(path, images), reference, rtol=0, atol=1e-10)


def test_torch_tensors_are_scored_like_the_folder() -> None:
    path = digits.experts()["mirrored"]
    tensors = load_file(path / "model.safetensors")
    state = {name: torch.tensor(value) for name, value in tensors.items()}
    assert digits.evaluate(state) == digits.evaluate(path)


def test_images_and_labels_are_scikit_learns_digits() -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    bunch = sklearn_datasets.load_digits()
    splits = [digits.examples(split) for split in ("train", "validation", "test")]
    ours = {
        (image.tobytes(), int(digit))
        for part in splits
        for image, digit in zip(part.images, part.labels["digit"], strict=True)
    }
    theirs = {
        (image.tobytes(), int(digit))
        for image, digit in zip(bunch.data / 16.0, bunch.target, strict=True)
    }
    assert ours == theirs
    assert sum(len(part.images) for part in splits) == len(bunch.target)
