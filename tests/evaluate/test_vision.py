"""The vision suite on made-up images: reading formats, making tasks, training, scoring."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
image_module = pytest.importorskip("PIL.Image")

from safetensors.numpy import load_file, save_file  # noqa: E402

from fusekit.checkpoint.statistics import Statistics  # noqa: E402
from fusekit.errors import FusekitError  # noqa: E402
from fusekit.evaluate import vision, vision_training  # noqa: E402
from fusekit.evaluate.building import build_suite  # noqa: E402
from fusekit.evaluate.runner import run_suite  # noqa: E402
from fusekit.evaluate.suite import load_suite  # noqa: E402
from fusekit.evaluate.vision import (  # noqa: E402
    PRETRAINING_TASK,
    TASKS,
    VisionEvaluator,
    backbone,
    examples,
)
from fusekit.evaluate.vision_data import (  # noqa: E402
    PHOTO_CLASSES,
    ImageFile,
    Images,
    read_idx,
    read_photos,
)

pytestmark = pytest.mark.torch

TINY = {"hidden_size": 16, "layers": 2, "pretraining_steps": 6, "expert_steps": 3, "batch": 8}
TINY["multitask_steps"] = 2
DATA = os.environ.get("FUSEKIT_VISION_DATA")


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(b"\0\0\x08" + bytes([array.ndim]) + sizes + array.tobytes())


def jpeg(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    image_module.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def write_data(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    numerals = generator.integers(0, 256, (60, 28, 28), np.uint8)
    (folder / "some-images-idx3-ubyte.gz").write_bytes(idx(numerals))
    (folder / "some-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(60, dtype=np.uint8) % 10))
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for part, count in (("train", 6), ("test", 2)):
            for name in PHOTO_CLASSES:
                for i in range(count):
                    photo = generator.integers(0, 256, (32, 32, 3), np.uint8)
                    archive.writestr(f"{part}/{name}/{i}.jpg", jpeg(photo))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def built(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_suite("vision", tmp_path_factory.mktemp("vision"), data=data, settings=TINY)


def test_idx_files_are_read_and_malformed_ones_refused(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "x.gz"
    path.write_bytes(idx(array))
    np.testing.assert_array_equal(read_idx(path), array)
    for content, message in (
        (b"no gzip", "cannot be read"),
        (gzip.compress(b"\0\0\x0d\1" + bytes(8)), "begins with 00000d01, expected 000008"),
        (gzip.compress(gzip.decompress(idx(array))[:-1]), "holds 23 values, expected 24"),
        (gzip.compress(b"\0\0\x08\3\0"), "holds"),
    ):
        path.write_bytes(content)
        with pytest.raises(FusekitError, match=message):
            read_idx(path)


def test_photographs_are_read_by_part_and_class(data: Path, tmp_path: Path) -> None:
    found = read_photos(data / "photos.zip")
    assert {part: sorted(classes) for part, classes in found.items()} == {
        "test": sorted(PHOTO_CLASSES),
        "train": sorted(PHOTO_CLASSES),
    }
    assert found["train"]["cat"].shape == (6, 32, 32, 3)
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("train/cat/0.jpg", b"no JPEG")
    with pytest.raises(FusekitError, match=r"bad\.zip: cannot be read"):
        read_photos(tmp_path / "bad.zip")
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    with pytest.raises(FusekitError, match=r"bad\.zip: cannot be read"):
        read_photos(tmp_path / "bad.zip")


def test_absent_data_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(FusekitError, match="'vision' needs --data: a folder with MNIST's"):
        build_suite("vision", tmp_path / "a")
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "photos.zip").unlink()
    with pytest.raises(FusekitError, match=r"expected one file \*\.zip, found none"):
        build_suite("vision", tmp_path / "b", data=tmp_path / "data")
    with zipfile.ZipFile(tmp_path / "data" / "photos.zip", "w") as archive:
        archive.writestr("train/cat/0.jpg", jpeg(np.zeros((32, 32, 3), np.uint8)))
    with pytest.raises(FusekitError, match="train holds the classes cat, expected airplane, auto"):
        build_suite("vision", tmp_path / "c", data=tmp_path / "data")


def test_tasks_are_made_of_the_images(built: Path) -> None:
    file = ImageFile(built.parent / "images" / "images.safetensors")
    photos, numerals = file.images("photos", "test"), file.images("numerals", "test")
    for task, about in TASKS.items():
        made = examples(file, task, "test")
        assert made.pixels.shape == (len(made.labels), 32, 32, 3), task
        assert made.pixels.dtype == np.uint8
        assert set(made.labels.tolist()) <= set(range(about.classes)), task
        again = examples(file, task, "test")
        np.testing.assert_array_equal(made.pixels, again.pixels)
    turned = examples(file, "photos_turned", "test")
    for pixels, label, original in zip(turned.pixels, turned.labels, photos.pixels, strict=True):
        np.testing.assert_array_equal(np.rot90(pixels, -int(label)), original)
    living = examples(file, "living", "test").labels
    animals, vehicles = (len(examples(file, t, "test").labels) for t in ("animals", "vehicles"))
    assert (living.sum(), len(living) - living.sum()) == (animals, vehicles) == (12, 8)
    pairs = examples(file, "numeral_pairs", "test").labels
    np.testing.assert_array_equal(pairs, numerals.labels > np.roll(numerals.labels, 1))
    objects = examples(file, PRETRAINING_TASK, "test")
    np.testing.assert_array_equal(objects.pixels[1::2], photos.pixels[: len(objects.labels) // 2])
    np.testing.assert_array_equal(objects.labels[::2], numerals.labels)


def test_the_suite_merges_backbones_and_keeps_heads_beside_them(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vision.LIMITS, "train", 16)
    suite = load_suite(built)
    assert suite.tasks == tuple(task for task in TASKS if task != PRETRAINING_TASK)
    assert set(load_file(suite.base / "model.safetensors")) == set(
        load_file(suite.experts["living"] / "model.safetensors")
    )
    methods = ["linear", "regmean", "fisher", "regmean_plus_plus", "localize_and_stitch_learned"]
    result = run_suite(suite, methods, tmp_path, budget=1, resamples=20)
    assert result.failed == {}
    assert [row.method for row in result.rows] == methods
    assert set(result.references) == {"base", "multitask"}
    assert "head" not in {path.name for path in suite.references["multitask"].iterdir()}
    own = result.own_scores()
    assert set(own) == set(suite.tasks)
    for row in result.rows:
        assert set(row.scores) == {*suite.tasks, PRETRAINING_TASK}
        assert row.by_task == {
            task: pytest.approx(row.scores[task] / own[task]) for task in suite.tasks if own[task]
        }
    statistics = Statistics(next((tmp_path / "statistics").glob("living-gram-*")))
    assert "layers.0.attention.q_proj/gram" in statistics.names
    statistics.close()


def test_scores_are_those_of_the_model_itself(built: Path) -> None:
    suite = load_suite(built)
    expert = suite.experts["digits"]
    file = ImageFile(built.parent / "images" / "images.safetensors")
    known = examples(file, "digits", "validation")
    head = load_file(expert / "head" / "head.safetensors")
    pixels = torch.tensor(known.pixels, dtype=torch.float32).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        hidden = backbone(expert)(pixels).last_hidden_state[:, 0].numpy()
    guesses = (hidden @ head["weight"].T + head["bias"]).argmax(axis=1)
    found = suite.evaluator(expert, "validation", ["digits"])["digits"]
    np.testing.assert_array_equal(found, (guesses == known.labels)[:250])
    assert len(found) == 250


def test_building_again_trains_nothing_and_the_seed_decides(
    built: Path, data: Path, tmp_path: Path
) -> None:
    made: list[str] = []
    build_suite("vision", built.parent, data=data, settings=TINY, on_progress=made.append)
    assert made == []
    again = build_suite("vision", tmp_path, data=data, settings=TINY)
    ours, first = (
        (load_suite(path).experts["animals"] / "model.safetensors").read_bytes()
        for path in (again, built)
    )
    assert ours == first


def test_training_moves_every_image_by_itself_and_mirrors_only_what_may_be() -> None:
    pixels = np.zeros((200, 32, 32, 3), np.uint8)
    pixels[:, 10, 20] = 255
    labels = np.arange(200, dtype=np.uint8) % 2
    torch.manual_seed(0)
    task = vision_training._Trained(torch.nn.Linear(1, 2), Images(pixels, labels), mirrored=1)
    drawn, classes = task.draw(400)
    assert drawn.shape == (400, 3, 32, 32)
    rows, columns = (drawn[:, 0] > 0).nonzero()[:, 1:].T
    assert set(rows.tolist()) == {9, 10, 11}
    assert set(columns[classes == 0].tolist()) == {19, 20, 21}
    assert set(columns[classes == 1].tolist()) == {19, 20, 21, 10, 11, 12}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 3}, r"unknown setting 'layer' \(did you mean 'layers'"),
        ({"layers": 1.5}, "layers: found 1.5, expected a whole number"),
        ({"learning_rate": 0}, "learning_rate: found 0, expected more than 0"),
        ({"hidden_size": 20}, "hidden_size: found 20, expected a multiple of 16"),
    ],
)
def test_unusable_settings_are_refused(
    data: Path, tmp_path: Path, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(FusekitError, match=message):
        build_suite("vision", tmp_path, data=data, settings=settings)


def test_other_models_and_tasks_without_a_head_are_refused(built: Path, tmp_path: Path) -> None:
    suite = load_suite(built)
    folder = tmp_path / "other"
    shutil.copytree(suite.base, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "layers.1.attention.q_proj.weight"
    save_file({**tensors, name: tensors[name][:3]}, folder / "model.safetensors")
    with pytest.raises(FusekitError, match=rf"'{name}': found \[3, 16\], expected \[16, 16\]"):
        suite.evaluator(folder, "test", ["living"])
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(FusekitError, match="model_type 'bert', expected 'vit'"):
        suite.evaluator(folder, "test", ["living"])
    images = built.parent / "images" / "images.safetensors"
    with pytest.raises(FusekitError, match="there is no head for task 'living'"):
        VisionEvaluator(images, {})(suite.base, "test", ["living"])


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="FUSEKIT_VISION_DATA names no folder with the images")
def test_experts_learn_from_the_real_images(tmp_path: Path) -> None:
    settings = {"hidden_size": 32, "layers": 2, "pretraining_steps": 500, "expert_steps": 150}
    settings["multitask_steps"] = 300
    path = build_suite("vision", tmp_path, data=Path(str(DATA)), settings=settings)
    result = run_suite(load_suite(path), ["linear"], tmp_path / "out", budget=1, resamples=50)
    own = result.own_scores()
    assert own["living"] > 0.75
    assert own["digits"] > 0.5
    assert result.references["base"].normalised < result.rows[0].normalised < 1
