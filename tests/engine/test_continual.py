"""Continual merging: the same whether models come together, one by one, or after a crash."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from fusekit import merge, merge_state_dicts, verify  # noqa: E402
from fusekit.engine import continual  # noqa: E402
from fusekit.errors import FusekitError, RecipeError  # noqa: E402
from tests.vectors import Case, StateDict, assert_close, read_case  # noqa: E402


@pytest.mark.parametrize("name", ["case0", "case1", "case2"])
def test_opcm_in_memory(name: str) -> None:
    case = read_case("opcm", name)
    options = {key: case.about[key] for key in ("alpha", "zero_diagonal")}
    merged = merge_state_dicts(case.models, base=case.base, method="opcm", parameters=options)
    assert_close(merged, case.merged, 1e-6, 1e-5)


def folders(case: Case, root: Path) -> list[str]:
    paths = []
    for label, arrays in zip(
        ["base", *(f"model{i}" for i in range(len(case.models)))],
        [case.base, *case.models],
        strict=True,
    ):
        (root / label).mkdir(parents=True)
        save_file(arrays, root / label / "model.safetensors")
        paths.append(str(root / label))
    return paths


def recipe(base: str, models: list[str]) -> dict[str, Any]:
    return {
        "merge_method": "opcm",
        "base_model": base,
        "models": [{"model": model} for model in models],
    }


def weights(folder: Path) -> StateDict:
    loaded: StateDict = load_file(folder / "model.safetensors")
    return loaded


def distance(merged: StateDict, base: StateDict) -> float:
    return float(sum(((merged[k].astype("f8") - base[k]) ** 2).sum() for k in base) ** 0.5)


def test_models_added_one_by_one_give_the_published_result(tmp_path: Path) -> None:
    case = read_case("opcm", "case1")
    base, *models = folders(case, tmp_path)
    out = tmp_path / "merged"
    merge(recipe(base, models[:1]), out)
    norms = case.tensors["out"]["merged_norm_per_step"]
    assert case.base is not None
    for step, model in enumerate(models[1:], start=1):
        merge(recipe(base, [model]), into=out)
        assert distance(weights(out), case.base) == pytest.approx(float(norms[step]), rel=1e-5)
    assert_close(weights(out), case.merged, 1e-6, 1e-5)
    assert continual.read_history(out).models == tuple(models)
    content = json.loads((out / "manifest.json").read_text())
    assert json.loads(content["recipe"]["parameters"]["history"])["count"] == 4
    assert verify(out).ok
    together = tmp_path / "together"
    merge(recipe(base, models), together)
    assert_close(weights(together), weights(out), 1e-6)


def test_a_run_that_died_between_update_and_checkpoint_is_finished(tmp_path: Path) -> None:
    case = read_case("opcm", "case1")
    base, *models = folders(case, tmp_path)
    out, state = tmp_path / "merged", tmp_path / "merged.continual"
    merge(recipe(base, models[:2]), out)
    shutil.copytree(out, tmp_path / "before")
    merge(recipe(base, models[2:3]), into=out)
    expected = weights(out)
    shutil.rmtree(out)
    (tmp_path / "before").rename(out)
    assert len(continual.read_history(state).models) == 3
    with pytest.raises(FusekitError, match=r"already holds .*model2.*which .* does not yet"):
        merge(recipe(base, models[3:]), into=out)
    merge(recipe(base, models[2:3]), into=out)
    assert_close(weights(out), expected, 0.0)
    merge(recipe(base, models[3:]), into=out)
    assert_close(weights(out), case.merged, 1e-6, 1e-5)


def test_norm_of_the_update_is_the_mean_of_the_task_vectors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base, *models = [
        {"w": rng.normal(size=(40, 30)).astype("f4"), "b": rng.normal(size=30).astype("f4")}
        for _ in range(4)
    ]
    merged = merge_state_dicts(models, base=base, method="opcm")
    mean = np.mean([distance(model, base) for model in models])
    assert distance(merged, base) == pytest.approx(float(mean), rel=1e-6)


def test_models_equal_to_the_base_give_the_base() -> None:
    base = {"w": np.random.default_rng(1).normal(size=(5, 4)).astype("f4")}
    merged = merge_state_dicts([base.copy(), base.copy()], base=base, method="opcm")
    assert_close(merged, base, 0.0)


def test_one_model_comes_back() -> None:
    rng = np.random.default_rng(6)
    base, model = (
        {
            name: rng.normal(size=shape).astype("f4")
            for name, shape in {"w.weight": (6, 4), "b": (4,)}.items()
        }
        for _ in range(2)
    )
    assert_close(merge_state_dicts([model], base=base, method="opcm"), model, 1e-6)


def test_what_cannot_be_added_is_refused(tmp_path: Path) -> None:
    case = read_case("opcm", "case0")
    base, *models = folders(case, tmp_path)
    out = tmp_path / "merged"
    with pytest.raises(FusekitError, match="not made by continual merging"):
        merge(recipe(base, models), into=out)
    merge(recipe(base, models[:1]), out)
    with pytest.raises(RecipeError, match=r"base_model: found .*model1.* was merged on .*base"):
        merge(recipe(models[1], models), into=out)
    with pytest.raises(RecipeError, match="'linear' cannot add to a checkpoint"):
        merge({**recipe(base, models), "merge_method": "linear"}, into=out)
    with pytest.raises(FusekitError, match="either the folder to create"):
        merge(recipe(base, models), out, into=out)
    with pytest.raises(FusekitError, match="already exists"):
        merge(recipe(base, models), out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {"alph": 0.2}}, r"parameters.alph: opcm has no parameter .*mean 'alpha'"),
        ({"parameters": {"history": "x"}}, "opcm has no parameter 'history'"),
        ({"chat_template": "chatml"}, "chat_template: opcm adds whole models"),
        ({"missing": "base"}, "missing: found 'base', but opcm adds whole models"),
        ({"models": ["base"]}, "models: opcm found none beside the base, expected one"),
        ({"own": {"weight": 2.0}}, r"models\[0\].parameters.weight: opcm has no parameter"),
        ({"own": {"alpha": 0.2}}, r"models\[0\].parameters.alpha: belongs to the whole merge"),
    ],
)
def test_what_would_be_ignored_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    base, *models = folders(read_case("opcm", "case0"), tmp_path)
    content = {**recipe(base, models), **change}
    own = content.pop("own", {})
    names = [base if name == "base" else name for name in change.get("models", models)]
    content["models"] = [{"model": name, "parameters": own} for name in names]
    with pytest.raises(RecipeError, match=message):
        merge(content, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parameters_in_memory_are_called_as_users_know_them() -> None:
    models = [{"w.weight": np.full((3, 3), i, np.float32)} for i in range(3)]
    for name in ("alph", "history", "scale"):
        with pytest.raises(RecipeError, match=f"parameters.{name}: opcm has no parameter"):
            merge_state_dicts(models[1:], base=models[0], method="opcm", parameters={name: 0.5})


def test_models_may_arrive_in_an_order_of_the_seed(tmp_path: Path) -> None:
    case = read_case("opcm", "case1")
    base, *models = folders(case, tmp_path)
    shuffled = {**recipe(base, models), "seed": 1}
    shuffled["parameters"] = {**shuffled.get("parameters", {}), "order": "shuffled"}
    merge(shuffled, tmp_path / "out")
    order = continual.read_history(tmp_path / "out").models
    assert sorted(order) == sorted(models)
    assert list(order) != models
    merge(recipe(base, list(order)), tmp_path / "same")
    assert_close(weights(tmp_path / "out"), weights(tmp_path / "same"), 0.0)
    options = {"order": "shuffled"}
    found = merge_state_dicts(
        case.models, base=case.base, method="opcm", parameters=options, seed=1
    )
    assert_close(weights(tmp_path / "out"), found, 1e-6)
    for wrong, message in (
        ("random", "parameters.order: found 'random', expected 'given' or 'shuffled'"),
        ([{"filter": "up", "value": "given"}], "order: holds for the whole merge"),
    ):
        with pytest.raises(RecipeError, match=message):
            merge({**shuffled, "parameters": {"order": wrong}}, tmp_path / "wrong")


def test_it_is_not_one_step_among_others(tmp_path: Path) -> None:
    case = read_case("opcm", "case0")
    base, *models = folders(case, tmp_path)
    first = {**recipe(base, models), "name": "first"}
    last = {"merge_method": "linear", "parameters": {"weight": 1.0}}
    last["models"] = [{"model": "first"}, {"model": base}]
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(first) + "\n---\n" + json.dumps(last))
    with pytest.raises(RecipeError, match="opcm keeps a running update beside its result"):
        merge(path, tmp_path / "out")
    first, last = {**last, "models": [{"model": base}], "name": "first"}, recipe(base, ["first"])
    path.write_text(json.dumps(first) + "\n---\n" + json.dumps(last))
    with pytest.raises(RecipeError, match="opcm takes a recipe of one document"):
        merge(path, tmp_path / "out")


def test_relative_references_are_remembered_absolutely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = read_case("opcm", "case0")
    folders(case, tmp_path)
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(recipe("base", ["model0"])))
    merge(path, tmp_path / "out")
    assert continual.read_history(tmp_path / "out").base == str(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path.write_text(json.dumps(recipe("base", ["model1"])))
    merge(path, into=tmp_path / "out")
    assert_close(weights(tmp_path / "out"), case.merged, 1e-6, 1e-5)


def test_command_line_adds_into_a_checkpoint(tmp_path: Path) -> None:
    case = read_case("opcm", "case0")
    base, *models = folders(case, tmp_path)
    out, text = tmp_path / "merged", tmp_path / "recipe.yml"
    merge(recipe(base, models[:1]), out)
    text.write_text(json.dumps(recipe(base, models[1:])))
    command = [sys.executable, "-m", "fusekit", "merge", str(text), "--into", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_close(weights(out), case.merged, 1e-6, 1e-5)
    command[3:] = ["plan", str(text)]
    planned = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "merged as whole matrices; others: sum of the task vectors" in planned
