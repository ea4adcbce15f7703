"""Recipes with a tokenizer section, against their rules said plainly, token by token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import fusekit
from tests.end_to_end.dialect import merged as merge_values
from tests.vectors import FOLDER

INPUTS = FOLDER / "mergekit_e2e/inputs"
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
Array = np.ndarray[Any, np.dtype[Any]]

RECIPES = {
    "linear, union": """
        merge_method: linear
        models:
          - {model: tok_a, parameters: {weight: 0.3}}
          - {model: tok_b, parameters: {weight: 0.7}}
        tokenizer_source: union
        """,
    "union with overrides": """
        merge_method: linear
        models: [{model: tok_b}, {model: tok_a}]
        parameters: {weight: 1.0}
        tokenizer:
          source: union
          pad_to_multiple_of: 16
          tokens:
            "<|im_start|>":
              source: tok_b
              force: true
            "<|im_end|>":
              source: {kind: zero}
            "</s>":
              source: {kind: model_token, model: tok_b, token_id: 5}
              force: true
        """,
    "task arithmetic, the base's tokenizer": """
        merge_method: task_arithmetic
        base_model: tok_a
        models: [{model: tok_b, parameters: {weight: 0.8}}]
        tokenizer_source: base
        """,
    "task arithmetic, another model's tokenizer": """
        merge_method: task_arithmetic
        base_model: tok_a
        models: [{model: tok_b, parameters: {weight: [0.2, 0.8]}}]
        tokenizer: {source: tok_b, pad_to_multiple_of: 8}
        """,
    "slerp, union": """
        merge_method: slerp
        base_model: tok_b
        models: [{model: tok_b}, {model: tok_a}]
        parameters: {t: 0.3}
        tokenizer_source: union
        """,
    "stacked layers, union": """
        merge_method: passthrough
        slices:
          - sources: [{model: tok_a, layer_range: [0, 2]}]
          - sources: [{model: tok_b, layer_range: [1, 2]}]
        tokenizer_source: union
        """,
}


def vocabulary(folder: Path) -> dict[str, int]:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids: dict[str, int] = dict(tokenizer["model"]["vocab"])
    return ids | {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}


def rows_of(
    model: str, name: str, tokens: dict[str, int], listed: list[str], recipe: dict[str, Any]
) -> dict[str, Array]:
    """A model's row for every token of the output."""
    ids = {each: vocabulary(INPUTS / each) for each in listed}
    matrices = {
        each: load_file(INPUTS / each / "model.safetensors")[name].astype(np.float64)
        for each in listed
    }
    overrides = (recipe.get("tokenizer") or {}).get("tokens", {})
    rows = {}
    for token in tokens:
        holders = [each for each in listed if token in ids[each]]
        own = ids[model].get(token)
        setting = overrides.get(token, {})
        if own is not None and not setting.get("force"):
            rows[token] = matrices[model][own]
        elif setting:
            source = setting["source"]
            if isinstance(source, str):
                rows[token] = matrices[source][ids[source][token]]
            elif source["kind"] == "zero":
                rows[token] = np.zeros(matrices[model].shape[1])
            else:
                rows[token] = matrices[source["model"]][source["token_id"]]
        elif len(holders) == 1:
            rows[token] = matrices[holders[0]][ids[holders[0]][token]]
        elif recipe.get("base_model") in holders:
            base = recipe["base_model"]
            rows[token] = matrices[base][ids[base][token]]
        else:
            rows[token] = np.mean([matrices[each][ids[each][token]] for each in holders], axis=0)
    return rows


def expected_rows(name: str, tokens: dict[str, int], recipe: dict[str, Any], size: int) -> Array:
    """The merged matrix, rows in the order of `tokens`, those of the padding last."""
    entries = recipe.get("models")
    if entries is None:
        part = recipe["slices"][0 if "embed" in name else -1]["sources"]
        listed = ["tok_a", "tok_b"]
        entries = [{"model": source["model"]} for source in part]
    else:
        listed = [entry["model"] for entry in entries]
    base = recipe.get("base_model")
    if base is not None and base not in listed:
        listed = [*listed, base]
    aligned: dict[str, Array] = {}
    for model in listed:
        stacked = np.stack(list(rows_of(model, name, tokens, listed, recipe).values()))
        padding = np.repeat(stacked.mean(axis=0)[None], size - len(stacked), axis=0)
        aligned[model] = np.concatenate([stacked, padding])
    models = [entry["model"] for entry in entries if entry["model"] != base]
    own: list[Any] = []
    for entry in entries:
        given = {**recipe.get("parameters", {}), **entry.get("parameters", {})}
        weight = given.get("weight")
        weight = weight[0] if isinstance(weight, list) else weight
        if entry["model"] != base:
            own.append({"weight": weight, "scale": 1.0})
    top = {"normalize": None, "lambda": 1.0, "t": recipe.get("parameters", {}).get("t")}
    return merge_values(
        recipe["merge_method"],
        None if base is None else aligned[base],
        [aligned[model] for model in models],
        own,
        top,
    )


UNIONS: dict[str, Callable[[str], bool]] = {
    "union": lambda _token: True,
    "base": lambda token: token in vocabulary(INPUTS / "tok_a"),
    "tok_b": lambda token: token in vocabulary(INPUTS / "tok_b"),
}


@pytest.mark.parametrize("title", RECIPES)
def test_every_token_has_the_row_that_the_rules_give_it(title: str, tmp_path: Path) -> None:
    recipe: dict[str, Any] = yaml.safe_load(RECIPES[title])
    path = tmp_path / "recipe.yml"
    path.write_text(RECIPES[title])
    for model in ("tok_a", "tok_b"):
        (tmp_path / model).symlink_to(INPUTS / model)
    fusekit.merge(path, tmp_path / "out", threads=2)
    found = load_file(tmp_path / "out/model.safetensors")
    tokens = vocabulary(tmp_path / "out")
    source = recipe.get("tokenizer_source") or recipe["tokenizer"]["source"]
    known = vocabulary(INPUTS / "tok_a").keys() | vocabulary(INPUTS / "tok_b").keys()
    assert set(tokens) == {token for token in known if UNIONS[source](token)}
    size = json.loads((tmp_path / "out/config.json").read_text())["vocab_size"]
    multiple = (recipe.get("tokenizer") or {}).get("pad_to_multiple_of", 1)
    assert size % multiple == 0
    for name in VOCABULARY:
        assert len(found[name]) == size
        order = list(tokens.values())
        order += [row for row in range(size) if row not in set(order)]
        np.testing.assert_allclose(
            found[name][order], expected_rows(name, tokens, recipe, size), atol=2e-6, err_msg=name
        )
