"""Files of statistics: found beside the recipe, checked while planning, one per model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import fusekit
from fusekit.checkpoint.statistics import save_statistics
from fusekit.errors import CheckpointError, FusekitError, RecipeError

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


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_weights_that_are_all_zero_are_refused(folder: Path, method: str) -> None:
    pytest.importorskip("torch")
    names = [f"{'gram' if method == 'regmean' else method}{i}" for i in range(2)]
    with pytest.raises(RecipeError, match=r"'fc\.\w+' sum to 0 and cannot be .*; change a weight$"):
        fusekit.merge(recipe(folder, method, *names, weight=0.0), folder / "out")


def test_negative_fisher_information_is_refused(folder: Path) -> None:
    pytest.importorskip("torch")
    rows = {"fc.weight/fisher": -np.ones(SHAPE, "f4"), "fc.bias/fisher": np.ones(4, "f4")}
    save_statistics(folder / "negative", rows, {})
    with pytest.raises(CheckpointError, match=r"negative: the fisher of 'fc.weight' has negative"):
        fusekit.merge(recipe(folder, "fisher", "fisher0", "negative"), folder / "out")


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_statistics_in_other_types_are_widened(folder: Path, dtype: str) -> None:
    pytest.importorskip("torch")
    gram = np.diag(np.arange(1.0, 7.0))
    about = {"format": "fusekit-statistics/1"}
    save_file(
        {"fc/gram": gram.astype(ml_dtypes.bfloat16 if dtype[0] == "b" else dtype)},
        folder / "other",
        about,
    )
    save_statistics(folder / "plain", {"fc/gram": gram.astype("f4")}, {})
    for name in ("other", "plain"):
        fusekit.merge(recipe(folder, "regmean", "gram0", name), folder / f"out-{name}")
    found, expected = (
        load_file(folder / f"out-{name}" / "model.safetensors") for name in ("other", "plain")
    )
    np.testing.assert_allclose(found["fc.weight"], expected["fc.weight"], rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "entry", "metadata", "message"),
    [
        ("regmean", np.eye(6, dtype="i8"), {}, "'fc/gram' is int64, expected floating-point"),
        ("regmean", np.triu(np.ones((6, 6), "f4")), {}, "the gram of 'fc' is no Gram matrix"),
        ("regmean", -np.eye(6, dtype="f4"), {}, "the gram of 'fc' is no Gram matrix"),
        ("fisher", np.ones(SHAPE, "f4"), {"squared_norms": "{"}, "holds '{' under 'squared_norms'"),
        (
            "fisher",
            np.ones(SHAPE, "f4"),
            {"squared_norms": '{"fc.weight/fisher": -1}'},
            "holds -1 under 'squared_norms'",
        ),
        ("fisher", None, {"about": '{"unreached": 5}'}, "holds 5 under 'about'"),
        ("fisher", None, {"about": "[1]"}, r"holds '\[1\]' under 'about'"),
    ],
)
def test_damaged_statistics_are_refused(
    folder: Path, method: str, entry: Any, metadata: dict[str, str], message: str
) -> None:
    pytest.importorskip("torch")
    entries = {"fc.bias/fisher": np.ones(SHAPE[0], "f4")}
    if entry is not None:
        entries["fc/gram" if method == "regmean" else "fc.weight/fisher"] = entry
    save_file(entries, folder / "damaged", {"format": "fusekit-statistics/1", **metadata})
    first = "gram0" if method == "regmean" else "fisher0"
    with pytest.raises(CheckpointError, match=rf"damaged: .*{message}"):
        fusekit.merge(recipe(folder, method, first, "damaged"), folder / "out")
    assert not (folder / "out").exists()


def test_a_model_without_statistics_is_named(folder: Path) -> None:
    path = recipe(folder, "fisher", "fisher0", "fisher1")
    content = yaml.safe_load(path.read_text())
    del content["models"][1]["parameters"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(FusekitError, match=r"models\[1\] \(m1.*needs the parameter 'statistics'"):
        fusekit.plan(path)


@pytest.mark.parametrize(("method", "said"), [("regmean", "no data"), ("fisher", "no gradients")])
def test_what_the_data_did_not_reach_is_averaged_with_a_remark(
    folder: Path, method: str, said: str
) -> None:
    pytest.importorskip("torch")
    names = ["fc"] if method == "regmean" else ["fc.weight", "fc.bias"]
    about = {"statistic": {"regmean": "gram"}.get(method, method), "unreached": names}
    save_statistics(folder / "nothing", {}, about)
    path = recipe(folder, method, f"{about['statistic']}0", "nothing")
    content = yaml.safe_load(path.read_text())
    content["models"][0]["parameters"]["weight"] = 3.0
    path.write_text(yaml.safe_dump(content))
    report = fusekit.merge(path, folder / "out")
    (remark,) = [each for each in report.warnings if said in each]
    assert "(tensor 'fc." in remark
    first, second = (load_file(folder / f"m{i}.safetensors")["fc.weight"] for i in range(2))
    merged = load_file(folder / "out" / "model.safetensors")["fc.weight"]
    np.testing.assert_allclose(merged, 0.75 * first + 0.25 * second, rtol=1e-6)


def test_a_ridge_is_reported(folder: Path) -> None:
    pytest.importorskip("torch")
    for i in range(2):
        few = np.random.default_rng(i).normal(size=(2, SHAPE[1])).astype("f4")
        save_statistics(folder / f"few{i}", {"fc/gram": few.T @ few / 2}, {})
    report = fusekit.merge(recipe(folder, "regmean", "few0", "few1", scale=1.0), folder / "out")
    assert any("a ridge was added" in each and "'fc.weight'" in each for each in report.warnings)
    shrunk = fusekit.merge(recipe(folder, "regmean", "few0", "few1"), folder / "shrunk")
    assert not any("ridge" in each for each in shrunk.warnings)


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


def change(folder: Path, name: str) -> None:
    """Other values of the same names and shapes."""
    with_twice = {entry: 2 * values for entry, values in load_file(folder / name).items()}
    save_statistics(folder / name, with_twice, {})


class InterruptedMergeError(Exception):
    pass


def interrupt(progress: Any) -> None:
    if progress.written:
        raise InterruptedMergeError


def test_the_manifest_tells_which_statistics_were_used(folder: Path) -> None:
    pytest.importorskip("torch")
    path = recipe(folder, "fisher", "fisher0", "fisher1")
    recorded = []
    for name in ("first", "second", "third"):
        fusekit.merge(path, folder / name)
        recorded.append(json.loads((folder / name / "manifest.json").read_text())["statistics"])
        if name == "second":
            change(folder, "fisher1")
    first, second, third = recorded
    assert [entry["path"] for entry in first] == [str(folder / f"fisher{i}") for i in range(2)]
    assert first == second
    assert first[0] == third[0]
    assert first[1]["header_xxh3"] != third[1]["header_xxh3"]
    assert fusekit.verify(folder / "third").ok


def test_a_merge_without_statistics_records_none(folder: Path) -> None:
    fusekit.merge(
        {
            "merge_method": "linear",
            "models": [{"model": str(folder / f"m{i}.safetensors")} for i in range(2)],
            "parameters": {"weight": 1.0},
        },
        folder / "out",
    )
    assert json.loads((folder / "out" / "manifest.json").read_text())["statistics"] == []


@pytest.mark.parametrize("changed", [True, False])
def test_an_interrupted_merge_goes_on_with_the_same_statistics_only(
    folder: Path, changed: bool
) -> None:
    pytest.importorskip("torch")
    path = recipe(folder, "fisher", "fisher0", "fisher1")
    with pytest.raises(InterruptedMergeError):
        fusekit.merge(path, folder / "out", on_progress=interrupt)
    if not changed:
        assert fusekit.merge(path, folder / "out").resumed == 1
        return
    change(folder, "fisher1")
    with pytest.raises(FusekitError, match=r"the input .*fisher1 has changed since this merge"):
        fusekit.merge(path, folder / "out")
    assert fusekit.merge(path, folder / "out", resume=False).resumed == 0


def test_statistics_that_change_while_they_are_read_are_noticed(folder: Path) -> None:
    pytest.importorskip("torch")
    path = recipe(folder, "fisher", "fisher0", "fisher1")
    with pytest.raises(FusekitError, match="fisher1: changed while it was being read"):
        fusekit.merge(path, folder / "out", on_progress=lambda _: change(folder, "fisher1"))


def test_a_stage_is_made_again_when_its_statistics_have_changed(folder: Path) -> None:
    pytest.importorskip("torch")
    stage = yaml.safe_load(recipe(folder, "fisher", "fisher0", "fisher1").read_text())
    last = {
        "merge_method": "linear",
        "models": [{"model": "both"}, {"model": "m0.safetensors"}],
        "parameters": {"weight": 1.0},
    }
    path = folder / "documents.yml"
    path.write_text(yaml.safe_dump_all([{"name": "both", **stage}, last]))
    made = folder / "out.stages/both/model.safetensors"
    written = []
    for _ in range(2):
        fusekit.merge(path, folder / "out", overwrite=True)
        written.append((made.stat().st_mtime_ns, load_file(made)["fc.weight"]))
    change(folder, "fisher1")
    fusekit.merge(path, folder / "out", overwrite=True)
    assert written[0][0] == written[1][0] != made.stat().st_mtime_ns
