"""The NumPy forward pass against the network that was trained."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fusekit.errors import FusekitError
from fusekit.evaluate import digits

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from fusekit.evaluate import digits_training  # noqa: E402
from fusekit.evaluate.building import build_suite  # noqa: E402
from fusekit.evaluate.runner import run_suite  # noqa: E402
from fusekit.evaluate.suite import load_suite  # noqa: E402

TINY = {"width": 32, "layers": 2, "pretraining_steps": 60, "expert_steps": 40}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_suite("digits", tmp_path_factory.mktemp("digits"), settings=TINY)


def test_features_are_those_of_the_trained_network() -> None:
    images = digits.examples("test").images
    for path in (digits.base(), *digits.experts().values()):
        tensors = load_file(path / "model.safetensors")
        model = digits_training.DigitsEncoder().double()
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


def test_a_built_suite_has_experts_a_multitask_model_and_held_out_tasks(built: Path) -> None:
    suite = load_suite(built)
    assert suite.tasks == digits.TASKS
    assert suite.axes == {"size": 10592, "base_quality": 60, "seed": 0}
    result = run_suite(suite, ["linear"], built.parent / "out", budget=1, resamples=50)
    for task, scores in result.experts.items():
        assert scores[task] == max(each[task] for each in result.experts.values())
    assert result.references["multitask"].normalised > result.references["base"].normalised
    held_out = {"loops", "primes", "modulo_4"}
    assert set(suite.forgetting) == {"digit", *held_out}
    assert all(result.references["base"].scores[task] > 0.5 for task in held_out)


def test_building_goes_on_where_it_stopped_and_gives_the_same(built: Path, tmp_path: Path) -> None:
    made: list[str] = []
    shutil.copytree(built.parent / "base", tmp_path / "base")
    build_suite("digits", tmp_path, settings=TINY, on_progress=made.append)
    assert [line.partition(":")[0] for line in made] == [
        *(f"expert_{task}" for task in digits.TASKS),
        "multitask",
    ]
    for folder in (f"expert_{digits.TASKS[-1]}", "multitask"):
        ours, first = (root / folder / "model.safetensors" for root in (tmp_path, built.parent))
        assert ours.read_bytes() == first.read_bytes()


def test_methods_that_need_data_are_given_statistics(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits, "CALIBRATION_EXAMPLES", 64)
    methods = ["linear", "fisher", "regmean"]
    result = run_suite(load_suite(built), methods, tmp_path, budget=2, resamples=50)
    assert result.failed == {}
    rows = {(row.method, row.variant): row for row in result.rows}
    assert rows["linear", "default"].measuring_seconds == 0
    assert rows["fisher", "default"].measuring_seconds > 0
    regmean = rows["regmean", "default"]
    assert regmean.normalised > rows["linear", "default"].normalised
    assert regmean.total_seconds > regmean.measuring_seconds > 0
    assert len(list((tmp_path / "statistics").glob("*-gram-*.safetensors"))) == len(digits.TASKS)


def test_what_is_prepared_on_data_counts_as_data_and_is_not_kept(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits, "CALIBRATION_EXAMPLES", 64)
    methods = ["linear", "regmean_plus_plus", "localize_and_stitch_learned"]
    result = run_suite(load_suite(built), methods, tmp_path, budget=2, resamples=50)
    assert result.failed == {}
    rows = {(row.method, row.variant): row for row in result.rows}
    assert [name for name, _ in rows] == ["linear", *(m for m in methods[1:] for _ in range(2))]
    for method in methods[1:]:
        default, tuned = rows[method, "default"], rows[method, "tuned"]
        assert default.measuring_seconds > 0
        assert (default.tuning_seconds, tuned.tried) == (0, 2)
        assert tuned.tuning_seconds > 0 and tuned.measuring_seconds > 0
    assert not (tmp_path / "prepared").exists()
    computed: list[str] = []
    again = run_suite(
        load_suite(built), methods, tmp_path, budget=2, resamples=50, on_progress=computed.append
    )
    assert (again, computed) == (result, [])


def test_experts_that_are_all_one_survive_what_is_prepared_on_data(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RegMean++ of equal models is that model; learned masks keep nearly all of its skill."""
    monkeypatch.setattr(digits, "CALIBRATION_EXAMPLES", 64)
    suite = load_suite(built)
    one = dataclasses.replace(suite, experts={"parity": suite.experts["parity"]})
    result = run_suite(
        one,
        ["regmean_plus_plus", "localize_and_stitch_learned"],
        tmp_path,
        budget=1,
        resamples=20,
    )
    assert result.rows[0].normalised == pytest.approx(1.0)
    assert result.rows[1].normalised > 0.9


def test_unusable_settings_are_refused(tmp_path: Path) -> None:
    for settings, message in (
        ({"widht": 3}, "unknown setting 'widht' (did you mean 'width'?)"),
        ({"width": 0}, "width: found 0, expected a whole number of at least 1"),
    ):
        with pytest.raises(FusekitError) as error:
            build_suite("digits", tmp_path, settings=settings)
        assert message in str(error.value)
    with pytest.raises(FusekitError, match="has its data in the package"):
        build_suite("digits", tmp_path, data=tmp_path)
