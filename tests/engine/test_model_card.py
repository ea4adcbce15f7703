"""The README.md of a merged model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

import fusekit
from tests.engine.support import write_model


def test_the_card_names_models_recipe_method_and_citation(tmp_path: Path) -> None:
    for name in ("base", "a"):
        write_model(tmp_path / name, {"w": np.ones(3, np.float32)}, {})
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        "merge_method: ties\nbase_model: base\nmodels:\n- model: a\n"
        "  parameters: {weight: 0.25}\nparameters: {density: 0.5}\n"
    )
    fusekit.merge(recipe, tmp_path / "a-ties")
    card = (tmp_path / "a-ties/README.md").read_text()
    _, front, body = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["tags"] == ["merge", "fusekit", "ties"]
    assert matter["library_name"] == "transformers"
    assert "base_model" not in matter  # local folders are not on the hub
    written = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert written == yaml.safe_load(recipe.read_text())
    assert body.startswith("\n# Merge of base and a\n")
    assert "- `base` (1 tensor)" in body
    assert "arXiv 2306.01708" in body


def test_models_of_the_hub_are_linked(tmp_path: Path) -> None:
    from fusekit.checkpoint.folder import Checkpoint
    from fusekit.checkpoint.memory import MemorySource
    from fusekit.engine.model_card import model_card
    from fusekit.engine.operands import choose_operands
    from fusekit.engine.planner import plan_checkpoints
    from fusekit.methods import find
    from fusekit.recipe.schema import load_recipe

    recipe = load_recipe(
        {
            "merge_method": "linear",
            "models": [{"model": "org/a@main"}, {"model": "org/b+org/adapter"}, {"model": "c"}],
            "parameters": {"weight": 1.0},
        }
    )
    method = find("linear")
    operands = choose_operands(recipe, method)
    cached = tmp_path / "models--org--a" / "snapshots" / "0123"
    source = MemorySource({"w": np.ones(2, np.float32)})
    opened = [
        Checkpoint(reference, source, None if reference == "c" else cached)
        for reference in operands.models()
    ]
    front = model_card(plan_checkpoints(recipe, method, operands, opened)).split("---\n")[1]
    assert yaml.safe_load(front)["base_model"] == ["org/a", "org/b"]
    assert yaml.safe_load(front)["base_model_relation"] == "merge"


@pytest.mark.parametrize(
    ("name", "content", "library"),
    [
        ("model_index.json", '{"_class_name": "P"}', "diffusers"),
        ("modules.json", '[{"path": ""}]', "sentence-transformers"),
        ("config.json", '{"_diffusers_version": "0.36"}', "diffusers"),
        ("config.json", '{"model_type": "llama"}', "transformers"),
        ("notes.txt", "", None),
    ],
)
def test_the_library_that_loads_the_model_is_named(
    tmp_path: Path, name: str, content: str, library: str | None
) -> None:
    write_model(tmp_path / "a", {"w": np.ones(3, np.float32)})
    (tmp_path / "a" / name).write_text(content)
    copy = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "a")}]}
    fusekit.merge(copy, tmp_path / "out", threads=1)
    front = (tmp_path / "out/README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front).get("library_name") == library
