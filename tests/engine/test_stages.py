"""Recipes of several documents: results that are models of others."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import fusekit
from fusekit import RecipeError, load_recipe
from tests.engine.support import write_model
from tests.vectors import FOLDER

TWO = """
merge_method: linear
parameters: {weight: 1.0}
models:
  - model: halves
  - model: c
---
name: halves
merge_method: linear
parameters: {weight: 1.0}
models:
  - model: a
  - model: b
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for name, value in {"a": 0.0, "b": 2.0, "c": 5.0}.items():
        write_model(tmp_path / name, {"w": np.full((3, 4), value, np.float32)}, {"of": name})
    path = tmp_path / "recipe.yml"
    path.write_text(TWO)
    return path


def merged(out: Path) -> float:
    (value,) = np.unique(load_file(out / "model.safetensors")["w"])
    return float(value)


def test_a_named_result_is_a_model_of_another_document(recipe: Path, tmp_path: Path) -> None:
    report = fusekit.merge(recipe, tmp_path / "out")
    assert report.tensors == 1
    assert merged(tmp_path / "out") == 3.0
    assert merged(tmp_path / "out.stages/halves") == 1.0
    assert json.loads((tmp_path / "out/config.json").read_text())["of"] == "a"


def test_a_finished_stage_is_reused_and_a_changed_one_is_made_again(
    recipe: Path, tmp_path: Path
) -> None:
    fusekit.merge(recipe, tmp_path / "out")
    stage = tmp_path / "out.stages/halves/model.safetensors"
    before = stage.stat().st_mtime_ns
    fusekit.merge(recipe, tmp_path / "out", overwrite=True)
    assert stage.stat().st_mtime_ns == before
    recipe.write_text(TWO.replace("- model: b", "- model: c"))
    fusekit.merge(recipe, tmp_path / "out", overwrite=True)
    assert stage.stat().st_mtime_ns != before
    assert merged(tmp_path / "out") == (2.5 + 5.0) / 2


def test_planning_needs_no_stage_to_exist(recipe: Path) -> None:
    plan = fusekit.plan(recipe)
    assert [planned.name for planned in plan.tensors] == ["w"]
    assert not list(recipe.parent.glob("*.stages"))


def test_a_mistake_in_the_last_document_is_found_before_any_stage_is_made(
    recipe: Path, tmp_path: Path
) -> None:
    recipe.write_text(TWO.replace("model: c\n---", "model: nowhere/at/all\n---"))
    with pytest.raises(fusekit.CheckpointError, match="nowhere/at/all"):
        fusekit.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out.stages").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TWO.replace("- model: a", "- model: halves"), "need each other: halves -> halves"),
        (TWO.replace("name: halves\n", ""), "2 of 2 documents are final results, expected one"),
        (f"{TWO}---\n{TWO.split('---')[1]}", "two documents have the name 'halves'"),
    ],
)
def test_documents_that_make_no_sense_are_refused(recipe: Path, text: str, message: str) -> None:
    recipe.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert message in str(caught.value)


def test_stages_are_made_in_the_order_they_need_each_other(tmp_path: Path) -> None:
    def document(name: str, *models: str) -> dict[str, Any]:
        listed = [{"model": model} for model in models]
        return {"name": name, "merge_method": "linear", "models": listed}

    import yaml

    path = tmp_path / "r.yml"
    documents = [document("z", "y", "x"), document("y", "x"), document("x", "a")]
    path.write_text(yaml.safe_dump_all(documents))
    recipe = load_recipe(path)
    assert recipe.name == "z"
    assert [stage.name for stage in recipe.stages] == ["x", "y"]


def test_a_result_brings_its_vocabulary_to_the_documents_it_feeds(tmp_path: Path) -> None:
    """While planning, too, when its files are not made yet."""
    inputs = FOLDER / "mergekit_e2e/inputs"
    path = tmp_path / "recipe.yml"
    path.write_text(
        f"""
name: both
merge_method: linear
models: [{{model: {inputs}/tok_a}}, {{model: {inputs}/tok_b}}]
parameters: {{weight: 1.0}}
tokenizer_source: union
---
merge_method: linear
models: [{{model: {inputs}/tok_b}}, {{model: both}}]
parameters: {{weight: 1.0}}
tokenizer:
  source: both
  tokens: {{"<|im_start|>": {{source: both, force: true}}}}
"""
    )
    with contextlib.closing(fusekit.plan(path)) as plan:
        rows = plan.config["vocab_size"] if plan.config is not None else 0
    fusekit.merge(path, tmp_path / "out", threads=1)
    both = tmp_path / "out.stages/both/tokenizer.json"
    assert (tmp_path / "out/tokenizer.json").read_bytes() == both.read_bytes()
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == rows


def test_a_result_of_another_depth_is_counted_as_it_will_be(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.w": np.full(2, i, np.float32) for i in range(2)}
    write_model(tmp_path / "a", tensors, {"num_hidden_layers": 2})
    path = tmp_path / "recipe.yml"
    twice = "[{model: a, layer_range: [0, 2]}]"
    path.write_text(
        f"name: deep\nmerge_method: passthrough\nslices: [{{sources: {twice}}}, "
        f"{{sources: {twice}}}]\n---\nmerge_method: passthrough\n"
        "slices: [{sources: [{model: deep, layer_range: [1, 4]}]}]\n"
    )
    with contextlib.closing(fusekit.plan(path)) as plan:
        assert plan.config == {"num_hidden_layers": 3}
    fusekit.merge(path, tmp_path / "out", threads=1)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"num_hidden_layers": 3}
