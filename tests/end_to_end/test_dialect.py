"""Recipes as people have them, against the dialect said plainly in float64."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import fusekit
from fusekit.checkpoint.folder import open_checkpoint
from tests.end_to_end.dialect import plain_merge
from tests.vectors import FOLDER

INPUTS = FOLDER / "mergekit_e2e/inputs"

RECIPES = {
    "slerp of slices": """
        # the recipe that most merges of two models are made with
        slices:
          - sources:
              - model: ft1
                layer_range: [0, 3]
              - model: ft2
                layer_range: [0, 3]
        merge_method: slerp
        base_model: ft1
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5 # fallback for rest of tensors
        dtype: float32
        """,
    "slerp with the base second": """
        models: [{model: ft2}, {model: ft1}]
        merge_method: slerp
        base_model: ft1
        parameters: {t: [0.1, 0.9]}
        """,
    "ties": """
        models:
          - model: ft1
            # no parameters necessary for base model
          - model: ft2
            parameters:
              density: [1, 0.7, 0.1] # density gradient
              weight: 1.0
          - model: ft3
            parameters:
              density: 0.33
              weight:
                - filter: mlp
                  value: 0.5
                - value: 0
        merge_method: ties
        base_model: ft1
        parameters:
          normalize: true
          int8_mask: true
        dtype: float32
        """,
    "ties without a base among the models": """
        models:
          - {model: ft2, parameters: {density: 0.4, weight: 0.7}}
          - {model: ft3, parameters: {density: 0.6, weight: -0.3}}
        merge_method: ties
        base_model: ft1
        parameters: {normalize: 0, lambda: [0.5, 1.5]}
        """,
    "task arithmetic": """
        merge_method: task_arithmetic
        base_model: ft1
        models:
          - model: ft2
            parameters: {weight: [0.2, 0.8]}
          - model: ft3
        parameters:
          weight:
            - {filter: q_proj, value: 0.0}
            - {filter: layers.1., value: [1.0, 2.0]}
            - {filter: "*", value: 0.4}
          lambda: 0.9
        """,
    "normalised task arithmetic": """
        merge_method: task_arithmetic
        base_model: ft1
        models:
          - {model: ft2, parameters: {weight: 0.7}}
          - {model: ft3, parameters: {weight: 0.6}}
        parameters: {normalize: true}
        """,
    "linear, weights summing to something else": """
        merge_method: linear
        models:
          - {model: ft1, parameters: {weight: 0.5}}
          - {model: ft2, parameters: {weight: 1.5}}
        parameters: {normalize: false}
        out_dtype: bfloat16
        dtype: float32
        """,
    "linear with a base that is one more model": """
        merge_method: linear
        base_model: ft3
        models: [{model: ft1}, {model: ft2, parameters: {weight: 2.0}}]
        parameters: {weight: 1.0}
        """,
    "the same model twice": """
        merge_method: linear
        models:
          - {model: ft1, parameters: {weight: 0.25}}
          - {model: ft2, parameters: {weight: 0.5}}
          - {model: ft1, parameters: {weight: 0.25}}
        """,
    "depth up-scaling": """
        slices:
          - sources: [{model: ft1, layer_range: [0, 2]}]
          - sources:
              - model: ft1
                layer_range: [1, 3]
                parameters:
                  scale:
                    - {filter: o_proj, value: 0.0}
                    - {filter: down_proj, value: 0.5}
                    - {value: 1.0}
          - sources: [{model: ft2, layer_range: [2, 3]}]
        merge_method: passthrough
        dtype: float16
        """,
    "slices with a base and parameters of their own": """
        merge_method: task_arithmetic
        base_model: ft1
        slices:
          - sources:
              - {model: ft2, layer_range: [0, 2], parameters: {weight: 0.3}}
              - {model: ft1, layer_range: [1, 3]}
          - sources:
              - {model: ft3, layer_range: [1, 2]}
              - {model: ft2, layer_range: [0, 1]}
            base_model: ft2
            parameters: {weight: [0.1, 0.9]}
        parameters: {weight: 0.6}
        """,
    "anchors": """
        merge_method: linear
        models:
          - model: ft1
            parameters: &half
              weight: [{filter: norm, value: 0.1}, {value: &w 0.5}]
          - model: ft2
            parameters:
              <<: *half
          - {model: ft3, parameters: {weight: *w}}
        """,
}


def written(folder: Path) -> dict[str, np.ndarray]:
    with contextlib.closing(open_checkpoint(str(folder)).source) as source:
        found = {}
        for info in source.tensors.values():
            values = np.empty(info.shape, info.dtype.numpy)
            source.read_into(info.name, 0, info.size, values.reshape(-1).view(np.uint8).data)
            found[info.name] = values
    return found


@pytest.mark.parametrize("title", RECIPES)
def test_recipes_give_what_the_dialect_says(title: str, tmp_path: Path) -> None:
    recipe: dict[str, Any] = yaml.safe_load(RECIPES[title])
    path = tmp_path / "recipe.yml"
    path.write_text(RECIPES[title])
    for model in INPUTS.iterdir():
        (tmp_path / model.name).symlink_to(model)
    fusekit.merge(path, tmp_path / "out", threads=2)
    found, expected = written(tmp_path / "out"), plain_merge(recipe, INPUTS)
    assert set(found) == set(expected)
    dtype = recipe.get("out_dtype") or recipe.get("dtype") or "float32"
    for name, values in expected.items():
        assert found[name].dtype.name == dtype
        step = {"float32": 2e-7, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
        np.testing.assert_allclose(
            found[name].astype(np.float64), values, rtol=step, atol=1e-6, err_msg=name
        )
    config = json.loads((tmp_path / "out/config.json").read_text())
    depth = 1 + max(int(name.split(".")[2]) for name in expected if ".layers." in name)
    assert config["num_hidden_layers"] == depth
    assert {config[key] for key in ("torch_dtype", "dtype") if key in config} <= {dtype}
