"""What people get wrong in recipes, and the one sentence that tells them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fusekit
from fusekit import FusekitError
from fusekit.errors import did_you_mean
from tests.engine.support import write_model

WRONG = {
    "a misspelt required key": (
        "merge_methd: linear\nmodels: [{model: ft1}]",
        "unknown key 'merge_methd' (did you mean 'merge_method'?)",
    ),
    "a method in capitals": (
        "merge_method: LINEAR\nmodels: [{model: ft1}]",
        "unknown merge_method 'LINEAR' (did you mean 'linear'?)",
    ),
    "a model as a key": (
        "merge_method: linear\nmodels: [{ft1: {weight: 1}}]",
        "unknown key 'models[0].ft1' (known: model, parameters)",
    ),
    "a slice without sources": (
        "merge_method: passthrough\nslices: [{model: ft1, layer_range: [0, 2]}]",
        "unknown key 'slices[0].model': it stands in an entry of the slice's sources",
    ),
    "one filter without a list": (
        "merge_method: linear\nmodels: [{model: ft1}]\nparameters: {weight: {filter: x, value: 1}}",
        "parameters.weight: found {'filter': 'x', 'value': 1}, expected a number or a list of "
        "{filter, value}",
    ),
    "an empty file": ("# nothing yet\n", "with merge_method and models, found nothing"),
    "a misspelt folder": (
        "merge_method: linear\nmodels: [{model: ./ft11}]",
        "ft11) (did you mean 'ft1'?)",
    ),
    "a missing adapter": (
        "merge_method: linear\nmodels: [{model: ft1+./adaptr}]",
        "adapter './adaptr': no such file or folder (looked at ",
    ),
    "models of different depth": (
        "merge_method: linear\nmodels: [{model: ft1}, {model: flat}]\nparameters: {weight: 1}",
        "tensor 'model.layers.1.w' of ft1 is missing: flat has 1 layers, ft1 2; choose among them "
        "with slices",
    ),
    "three models for a method of two": (
        "merge_method: slerp\nmodels: [{model: ft1}, {model: ft1}, {model: ft1}]",
        "models: slerp merges 1 to 2 model(s), found 3; for more see multislerp and karcher",
    ),
    "weights that sum to 0": (
        "merge_method: linear\nmodels: [{model: ft1}, {model: ft1}]\n"
        "parameters: {weight: [{filter: norm, value: 0}, {value: 1}]}",
        "linear: the weights of tensor 'model.norm.weight' sum to 0 and cannot be normalised",
    ),
    "weights that sum to 0 but for rounding": (
        "merge_method: model_soups\nmodels:\n- {model: ft1, parameters: {weight: 0.1}}\n"
        "- {model: ft1, parameters: {weight: 0.2}}\n- {model: ft1, parameters: {weight: -0.3}}",
        "model_soups: the weights of tensor 'model.layers.0.w' sum to 0",
    ),
    "shares of nothing": (
        "merge_method: karcher\nmodels: [{model: ft1}, {model: ft1}]\nparameters: {weight: 0}",
        "karcher: the weights of tensor 'model.layers.0.w' sum to 0 and cannot be normalised; "
        "change a weight",
    ),
    "probabilities beyond 1 in one layer": (
        "merge_method: della\nbase_model: ft1\nmodels: [{model: ft1/model.safetensors}]\n"
        "parameters: {density: [0.5, 0.9], epsilon: 0.2}",
        "density 0.9 and epsilon 0.2 for tensor 'model.layers.1.w': keep probabilities run from "
        "0.7 to 1.1",
    ),
    "a pattern that is none": (
        "merge_method: widen\nbase_model: ft1\nmodels: [{model: ft1/model.safetensors}]\n"
        "parameters: {exclude: '('}",
        "widen: exclude: found '(', expected a regular expression",
    ),
    "settings that exclude each other": (
        "merge_method: varm\nbase_model: ft1\nmodels: [{model: ft1/model.safetensors}]\n"
        "parameters: {elementwise: true, temperature: 1}",
        "varm: temperature does not apply with elementwise",
    ),
    "densities that differ within a group": (
        "merge_method: ties\nbase_model: ft1\nmodels: [{model: ft1/model.safetensors}]\n"
        "granularity: model\nparameters: {density: [0.5, 0.9]}",
        "ties: tensors 'model.layers.0.w' and 'model.layers.1.w' share a summary (granularity) "
        "but have different parameters",
    ),
    "a group of which a part is left whole": (
        "merge_method: ties\nbase_model: ft1\nmodels: [{model: ft1/model.safetensors}]\n"
        "granularity: model\nparameters: {density: [{filter: norm, value: 1}, {value: 0.5}]}",
        "ties: tensors 'model.layers.0.w' and 'model.norm.weight' share a summary",
    ),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, layers in (("ft1", 2), ("flat", 1)):
        tensors = {f"model.layers.{i}.w": np.ones(2, np.float32) for i in range(layers)}
        write_model(tmp_path / name, {**tensors, "model.norm.weight": np.ones(2, np.float32)}, {})
    return tmp_path


@pytest.mark.parametrize("what", WRONG)
def test_it_is_named_in_one_sentence(what: str, folder: Path) -> None:
    text, expected = WRONG[what]
    (folder / "recipe.yml").write_text(text)
    with pytest.raises(FusekitError) as caught:
        fusekit.plan(folder / "recipe.yml")
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message


def test_a_group_may_hold_tensors_of_a_single_model(folder: Path) -> None:
    models = [{"model": str(folder / name), "layer_range": [0, 1]} for name in ("ft1", "flat")]
    alone = [{"model": str(folder / "ft1"), "layer_range": [1, 2]}]
    slices = [{"sources": models}, {"sources": alone}]
    recipe = {"merge_method": "slerp", "slices": slices, "parameters": {"t": 0.5}}
    fusekit.plan({**recipe, "granularity": "model"}).close()


@pytest.mark.parametrize(("pattern", "told"), [("nrom", True), ("layers.1", False), ("*", False)])
def test_a_filter_that_no_name_has_in_it_is_told(folder: Path, pattern: str, told: bool) -> None:
    weight = [{"filter": pattern, "value": 0.5}, {"value": 1.0}]
    models = [{"model": str(folder / "ft1"), "parameters": {"weight": weight}}]
    with_filter = {"merge_method": "linear", "models": models}
    plan = fusekit.plan(with_filter)
    plan.close()
    wanted = ("the filter 'nrom' of weight is in no tensor's name (did you mean 'norm'?)",)
    assert plan.warnings == (wanted if told else ())


def test_near_words_are_found_whatever_their_case() -> None:
    assert did_you_mean("density", ["Density"]) == " (did you mean 'Density'?)"
    assert did_you_mean("TOKENIZER_SOURCE", ["tokenizer_source", "tokenizer"]) == (
        " (did you mean 'tokenizer_source'?)"
    )


def test_many_known_names_are_cut_short() -> None:
    names = [f"model.layers.{i:03}.self_attn.q_proj.weight" for i in range(1000)]
    message = did_you_mean("zzz", names)
    assert message.startswith(f" (known: {names[0]}, {names[1]}, ")
    assert message.endswith(" and 981 more)")
    methods = fusekit.methods.available()
    assert all(name in did_you_mean("zzzzzzzzz", methods) for name in methods)


def test_int8_mask_is_left_alone_in_recipes_of_any_method(folder: Path) -> None:
    models = [{"model": str(folder / "ft1"), "parameters": {"weight": 1.0}}]
    plan = fusekit.plan(
        {"merge_method": "linear", "models": models, "parameters": {"int8_mask": True}}
    )
    plan.close()
    assert plan.warnings == ("parameters.int8_mask has no effect: linear has no masks",)
