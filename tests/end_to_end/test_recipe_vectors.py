"""Whole checkpoints merged from public recipes equal what the reference tool writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import fusekit
from fusekit.checkpoint.folder import Checkpoint
from fusekit.checkpoint.memory import MemorySource
from fusekit.engine.operands import choose_operands
from fusekit.engine.planner import plan_checkpoints
from fusekit.methods import find
from fusekit.recipe.schema import load_recipe
from tests.vectors import FOLDER

CASES = FOLDER / "mergekit_e2e"
LOOKUPS = json.loads((FOLDER / "merge-recipe-yaml.json").read_text())


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text())
    return config


@pytest.mark.parametrize("case", ["03_slerp_gradient_filters", "17_slices_multi_source"])
def test_recipes_reproduce_the_reference(case: str, tmp_path: Path) -> None:
    fusekit.merge(CASES / case / "config.yml", tmp_path / "out", threads=2)
    found, expected = tensors_of(tmp_path / "out"), load_file(CASES / case / "expected.safetensors")
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=2e-6, err_msg=name)
    config = config_of(tmp_path / "out/config.json")
    wanted = config_of(CASES / case / "expected_config.json")
    assert {key: config[key] for key in wanted} == wanted


def test_a_union_of_vocabularies_reproduces_the_reference_token_by_token(tmp_path: Path) -> None:
    case, out = CASES / "p1_tokenizer_union_public", tmp_path / "out"
    fusekit.merge(case / "config.yml", out, threads=2)
    theirs: dict[str, int] = json.loads((case / "expected_vocab.json").read_text())
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    ours = dict(tokenizer["model"]["vocab"])
    ours |= {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    assert set(ours) == set(theirs)
    found, expected = tensors_of(out), load_file(case / "expected.safetensors")
    assert set(found) == set(expected)
    rows = [[ours[token], theirs[token]] for token in theirs]
    mine, reference = np.array(rows).T
    for name, values in expected.items():
        merged = found[name]
        assert merged.shape == values.shape, name
        if name in {"model.embed_tokens.weight", "lm_head.weight"}:
            merged, values = merged[mine], values[reference]
        np.testing.assert_allclose(merged, values, rtol=0, atol=2e-6, err_msg=name)
    config = config_of(out / "config.json")
    assert config["vocab_size"] == config_of(case / "expected_config.json")["vocab_size"]


# -- which tensors, which parameters --------------------------------------------------------------


def llama(layers: int) -> MemorySource:
    """The names of an untied Llama of so many layers, as the reference lists them."""
    case = LOOKUPS["cases"]["global_filters_gradient"]["tensors"]
    inside = [t["out"].split(".", 3)[3] for t in case if t["out"].startswith("model.layers.0.")]
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{i}.{name}" for i in range(layers) for name in inside]
    return MemorySource(dict.fromkeys(names, np.zeros((2, 2), np.float32)))


@pytest.mark.parametrize("case", LOOKUPS["cases"])
def test_sources_and_parameters_equal_those_of_the_reference(case: str) -> None:
    import yaml

    about = LOOKUPS["cases"][case]
    recipe = load_recipe(yaml.safe_load(about["yaml"]))
    method = find(recipe.merge_method)
    operands = choose_operands(recipe, method)
    opened = [Checkpoint(model, llama(LOOKUPS["models"][model])) for model in operands.models()]
    plan = plan_checkpoints(recipe, method, operands, opened)
    found = {planned.name: planned for planned in plan.tensors}
    assert set(found) == {tensor["out"] for tensor in about["tensors"]}
    for tensor in about["tensors"]:
        planned = found[tensor["out"]]
        refs = [[opened[ref.source].reference, ref.name] for ref in planned.models]
        assert refs == tensor["sources"], tensor["out"]
        for key, value in tensor["params"].items():
            assert planned.tensor.parameters[key] == pytest.approx(value), (tensor["out"], key)
        for (model, _), values in zip(refs, planned.tensor.model_parameters, strict=True):
            for key, value in tensor["model_params"][model].items():
                assert values[key] == pytest.approx(value), (tensor["out"], model, key)
