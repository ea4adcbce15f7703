"""Files of statistics: found beside the recipe, checked while planning, one per model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import fusekit
from fusekit.checkpoint.statistics import save_statistics
from fusekit.errors import CheckpointError, FusekitError

SHAPE = (4, 6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models and their statistics, with a recipe that names them by file name."""
    rng = np.random.default_rng(0)
    for i in range(2):
        tensors = {
            "fc.weight": rng.normal(size=SHAPE).astype("f4"),
            "fc.bias": rng.normal(size=SHAPE[0]).astype("f4"),
        }
        save_file(tensors, tmp_path / f"m{i}.safetensors")
        inputs = rng.normal(size=(20, SHAPE[1])).astype("f4")
        save_statistics(tmp_path / f"gram{i}", {"fc/gram": inputs.T @ inputs / 20}, {})
        fishers = {f"{name}/fisher": value**2 for name, value in tensors.items()}
        save_statistics(tmp_path / f"fisher{i}", fishers, {})
    return tmp_path


def recipe(folder: Path, method: str, *names: str, **parameters: Any) -> Path:
    content = {
        "merge_method": method,
        "models": [
            {"model": f"m{i}.safetensors", "parameters": {"statistics": name}}
            for i, name in enumerate(names)
        ],
        "parameters": parameters,
    }
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_statistics_beside_the_recipe_are_found_from_anywhere(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    fusekit.merge(recipe(folder, "regmean", "gram0", "gram1"), folder / "out")
    grams = [
        load_file(folder / f"gram{i}")["fc/gram"].astype(float) for i in range(2)
    ]  # inputs' second moments
    shrunk = [0.9 * gram + 0.1 * np.diag(np.diag(gram)) for gram in grams]
    weights = [load_file(folder / f"m{i}.safetensors")["fc.weight"].astype(float) for i in range(2)]
    right = sum(G @ W.T for G, W in zip(shrunk, weights, strict=True))
    expected = np.linalg.solve(sum(shrunk), right).T
    merged = load_file(folder / "out" / "model.safetensors")["fc.weight"]
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "names", "message"),
    [
        ("regmean", ("gram0", "nowhere"), r"nowhere"),
        ("regmean", ("gram0", "fisher1"), r"fisher1: no gram of 'fc'.*m1\.safetensors needs"),
        ("fisher", ("fisher0", "gram1"), r"gram1: no fisher of 'fc\.\w+'.*m1\.safetensors needs"),
        ("regmean", ("gram0", "m1.safetensors"), "m1.safetensors: not a file of statistics"),
        (
            "regmean",
            ("gram0", "other"),
            r"other: 'fc/gram' has shape \[5, 5\], expected \[6, 6\] or \[4, 4\] for tensor "
            r"'fc.weight' of m1\.safetensors, of shape \[4, 6\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_while_planning(
    folder: Path, method: str, names: tuple[str, ...], message: str
) -> None:
    save_statistics(folder / "other", {"fc/gram": np.eye(5, dtype="f4")}, {})
    with pytest.raises(CheckpointError, match=message):
        fusekit.plan(recipe(folder, method, *names))


def test_a_fisher_of_the_wrong_shape_is_refused(folder: Path) -> None:
    rows = {"fc.weight/fisher": np.ones((6, 4), "f4"), "fc.bias/fisher": np.ones(4, "f4")}
    save_statistics(folder / "turned", rows, {})
    with pytest.raises(CheckpointError, match=r"has shape \[6, 4\], expected \[4, 6\] for tensor"):
        fusekit.plan(recipe(folder, "fisher", "fisher0", "turned"))


def test_negative_fisher_information_is_refused(folder: Path) -> None:
    pytest.importorskip("torch")
    rows = {"fc.weight/fisher": -np.ones(SHAPE, "f4"), "fc.bias/fisher": np.ones(4, "f4")}
    save_statistics(folder / "negative", rows, {})
    with pytest.raises(CheckpointError, match=r"negative: the fisher of 'fc.weight' has negative"):
        fusekit.merge(recipe(folder, "fisher", "fisher0", "negative"), folder / "out")


def test_a_model_without_statistics_is_named(folder: Path) -> None:
    path = recipe(folder, "fisher", "fisher0", "fisher1")
    content = yaml.safe_load(path.read_text())
    del content["models"][1]["parameters"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(FusekitError, match=r"models\[1\] \(m1.*needs the parameter 'statistics'"):
        fusekit.plan(path)


def test_models_that_lack_a_tensor_keep_their_own_statistics(folder: Path) -> None:
    """The statistics of the models that are left, not those of the first ones."""
    pytest.importorskip("torch")
    path = recipe(folder, "fisher", "fisher0", "fisher1", normalize=False)
    content = yaml.safe_load(path.read_text())
    tensors = load_file(folder / "m0.safetensors")
    save_file({"fc.bias": tensors["fc.bias"]}, folder / "m0.safetensors")
    save_file(tensors, folder / "m2.safetensors")
    content["models"].append({"model": "m2.safetensors", "parameters": {"statistics": "fisher0"}})
    content["missing"] = "skip-model"
    path.write_text(yaml.safe_dump(content))
    fusekit.merge(path, folder / "out")
    merged = load_file(folder / "out" / "model.safetensors")["fc.weight"]
    pairs = [(load_file(folder / f"m{i}.safetensors")["fc.weight"], j) for i, j in ((1, 1), (2, 0))]
    fishers = [load_file(folder / f"fisher{j}")["fc.weight/fisher"] for _, j in pairs]
    fishers[0] = np.maximum(fishers[0], 1e-6)
    top = sum(F * x for F, (x, _) in zip(fishers, pairs, strict=True))
    np.testing.assert_allclose(merged, top / sum(fishers), rtol=1e-5)
