"""Slices, modules, tied heads, missing tensors and vocabularies of different size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import fusekit
from fusekit import CheckpointError, RecipeError
from tests.engine.support import write_model

Array = np.ndarray[Any, np.dtype[Any]]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensors(
    value: float, layers: int = 3, rows: int = 8, head: bool = True, width: int = 4
) -> dict[str, Array]:
    """A toy decoder whose entries tell model and layer: `value + layer / 10`."""
    made = {EMBED: np.full((rows, width), value), "model.norm.weight": np.full(width, value)}
    for i in range(layers):
        made[f"model.layers.{i}.mlp.up_proj.weight"] = np.full((width, width), value + i / 10)
    if head:
        made[HEAD] = np.full((rows, width), -value)
    return {name: array.astype(np.float32) for name, array in made.items()}


def model(folder: Path, name: str, value: float, tied: bool | None = None, **shape: Any) -> str:
    layers, rows = shape.get("layers", 3), shape.get("rows", 8)
    config: dict[str, Any] = {"num_hidden_layers": layers, "vocab_size": rows, "model_type": "toy"}
    if tied is not None:
        config["tie_word_embeddings"] = tied
    write_model(folder / name, tensors(value, **shape), config)
    return str(folder / name)


def merge(folder: Path, **recipe: Any) -> tuple[dict[str, Array], dict[str, Any], list[str]]:
    out = folder / "out"
    report = fusekit.merge({"merge_method": "linear", **recipe}, out, threads=1, overwrite=True)
    config = json.loads((out / "config.json").read_text())
    return load_file(out / "model.safetensors"), config, list(report.warnings)


def refused(**recipe: Any) -> str:
    with pytest.raises((RecipeError, CheckpointError)) as caught:
        fusekit.plan({"merge_method": "linear", **recipe})
    message = str(caught.value)
    assert "\n" not in message
    return message


def equally(*models: str) -> dict[str, Any]:
    return {"models": [{"model": m} for m in models], "parameters": {"weight": 1.0}}


# -- slices ---------------------------------------------------------------------------------------


def test_layers_are_renumbered_and_the_outside_comes_from_first_and_last(tmp_path: Path) -> None:
    a, b = model(tmp_path, "a", 1.0), model(tmp_path, "b", 2.0)
    slices = [
        {"sources": [{"model": a, "layer_range": [0, 2]}]},
        {"sources": [{"model": b, "layer_range": [1, 3]}]},
    ]
    merged, config, _ = merge(tmp_path, merge_method="passthrough", slices=slices)
    assert config["num_hidden_layers"] == 4
    depth = [merged[f"model.layers.{i}.mlp.up_proj.weight"][0, 0] for i in range(4)]
    np.testing.assert_allclose(depth, [1.0, 1.1, 2.1, 2.2])
    assert (merged[EMBED][0, 0], merged["model.norm.weight"][0], merged[HEAD][0, 0]) == (1, 2, -2)


def test_stacking_all_layers_of_one_model_copies_it(tmp_path: Path) -> None:
    a = model(tmp_path, "a", 1.0)
    slices = [{"sources": [{"model": a, "layer_range": [0, 3]}]}]
    merged, _, _ = merge(tmp_path, merge_method="passthrough", slices=slices)
    for name, values in tensors(1.0).items():
        assert merged[name].tobytes() == values.tobytes()


def test_a_base_that_is_no_source_gives_the_layers_of_the_first_source(tmp_path: Path) -> None:
    base, a = model(tmp_path, "base", 1.0), model(tmp_path, "a", 3.0)
    slices = [{"sources": [{"model": a, "layer_range": [1, 3]}]}]
    merged, config, _ = merge(
        tmp_path,
        merge_method="task_arithmetic",
        base_model=base,
        slices=slices,
        parameters={"weight": 0.5},
    )
    assert config["num_hidden_layers"] == 2
    np.testing.assert_allclose(merged["model.layers.0.mlp.up_proj.weight"], 2.1, atol=1e-6)


def test_slices_that_cannot_be_are_refused(tmp_path: Path) -> None:
    a, b = model(tmp_path, "a", 1.0), model(tmp_path, "b", 1.0, layers=5)

    def message(*ranges: tuple[str, list[int]], method: str = "passthrough") -> str:
        sources = [{"model": name, "layer_range": layers} for name, layers in ranges]
        return refused(merge_method=method, slices=[{"sources": sources}])

    assert "[2, 9), but" in message((a, [2, 9]))
    assert "has 3 layers" in message((a, [2, 9]))
    assert "slices[0].sources[0].layer_range: found [2, 2], expected [start, end)" in message(
        (a, [2, 2])
    )
    assert "ranges of equal length" in message((a, [0, 1]), (b, [0, 2]), method="linear")
    assert "passthrough merges 1 model(s), found 2" in message((a, [0, 1]), (b, [0, 1]))


def test_models_of_different_depth_are_refused_without_slices(tmp_path: Path) -> None:
    a, b = model(tmp_path, "a", 1.0), model(tmp_path, "b", 1.0, layers=5)
    assert "'model.layers.3.mlp.up_proj.weight'" in refused(**equally(a, b))


# -- tied heads -----------------------------------------------------------------------------------


def test_tied_heads_stay_tied(tmp_path: Path) -> None:
    a, b = (model(tmp_path, n, v, tied=True, head=False) for n, v in (("a", 1.0), ("b", 3.0)))
    merged, config, _ = merge(tmp_path, **equally(a, b))
    assert HEAD not in merged
    assert config["tie_word_embeddings"] is True
    assert merged[EMBED][0, 0] == 2.0


def test_a_head_that_every_model_shares_with_its_embedding_is_not_written(tmp_path: Path) -> None:
    a, b = (model(tmp_path, n, v, tied=True, head=True) for n, v in (("a", 1.0), ("b", 3.0)))
    merged, config, _ = merge(tmp_path, **equally(a, b))
    assert HEAD not in merged
    assert config["tie_word_embeddings"] is True


@pytest.mark.parametrize("tied_first", [True, False])
def test_the_embedding_stands_in_for_the_head_of_a_tied_model(
    tmp_path: Path, tied_first: bool
) -> None:
    tied = model(tmp_path, "tied", 1.0, tied=True, head=False)
    untied = model(tmp_path, "untied", 3.0, tied=False)
    models = (tied, untied) if tied_first else (untied, tied)
    merged, config, _ = merge(tmp_path, **equally(*models))
    np.testing.assert_array_equal(merged[HEAD], (1.0 - 3.0) / 2)
    assert config["tie_word_embeddings"] is False


def test_a_head_that_is_missing_without_being_tied_is_refused(tmp_path: Path) -> None:
    a, b = model(tmp_path, "a", 1.0), model(tmp_path, "b", 1.0, tied=False, head=False)
    message = refused(**equally(a, b))
    assert "'lm_head.weight'" in message
    assert "config says tie_word_embeddings: false" in message


# -- missing tensors ------------------------------------------------------------------------------


def without(folder: Path, reference: str, name: str) -> str:
    kept = load_file(Path(reference) / "model.safetensors")
    del kept[name]
    write_model(folder / "lacking", kept, {"tie_word_embeddings": False})
    return str(folder / "lacking")


def test_tensors_that_a_model_lacks(tmp_path: Path) -> None:
    name = "model.norm.weight"
    base, a = model(tmp_path, "base", 1.0), model(tmp_path, "a", 3.0)
    lacking = without(tmp_path, a, name)
    recipe = {"base_model": base, "merge_method": "task_arithmetic", **equally(a, lacking)}
    assert f"{name!r} of {base} is missing" in refused(**recipe)
    skipped, _, _ = merge(tmp_path, **recipe, missing="skip-model")
    filled, _, _ = merge(tmp_path, **recipe, missing="base")
    assert skipped[name][0] == filled[name][0] == 3.0
    assert skipped[EMBED][0, 0] == 5.0
    mean = equally(a, lacking)
    assert merge(tmp_path, **mean, missing="skip-model")[0][name][0] == 3.0
    assert "base_model, which is missing" in refused(**mean, missing="base")


def test_a_tensor_no_model_but_the_base_has_is_the_bases(tmp_path: Path) -> None:
    name = "model.norm.weight"
    base, a = model(tmp_path, "base", 1.0), model(tmp_path, "a", 3.0)
    recipe = {
        "base_model": base,
        "merge_method": "task_arithmetic",
        **equally(without(tmp_path, a, name)),
        "missing": "skip-model",
    }
    merged, _, _ = merge(tmp_path, **recipe, out_dtype="float16")
    assert (str(merged[name].dtype), float(merged[name][0])) == ("float16", 1.0)


def with_tower(folder: Path, name: str, value: float, tower: str) -> str:
    """A model with an encoder of its own, in two layers."""
    own = {
        f"{tower}.encoder.layers.{i}.fc.weight": np.full((2, 3), value + i, np.float32)
        for i in range(2)
    }
    write_model(folder / name, {**tensors(value), **own}, {"num_hidden_layers": 3})
    return str(folder / name)


@pytest.mark.parametrize(
    ("method", "expected"),
    [("linear", (3.0 + 5.0) / 2), ("task_arithmetic", 1.0 + 2.0 + 4.0), ("optmerge", 4.0)],
)
def test_models_of_different_modalities_keep_their_encoders(
    tmp_path: Path, method: str, expected: float
) -> None:
    if method == "optmerge":
        pytest.importorskip("torch")
    base = model(tmp_path, "base", 1.0)
    towers = [
        with_tower(tmp_path, "a", 3.0, "vision"),
        with_tower(tmp_path, "b", 5.0, "audio"),
    ]
    recipe: dict[str, Any] = {"merge_method": method, **equally(*towers)}
    if method != "linear":
        recipe["base_model"] = base
    if method == "optmerge":
        recipe["parameters"] = {"variant": "modality", "steps": 0}
    message = refused(**recipe)
    assert "vision.encoder" in message or "audio.encoder" in message
    merged, _, warnings = merge(tmp_path, **recipe, missing="copy")
    assert merged["model.norm.weight"][0] == expected
    for value, tower in ((3.0, "vision"), (5.0, "audio")):
        for i in range(2):
            copied = merged[f"{tower}.encoder.layers.{i}.fc.weight"]
            np.testing.assert_array_equal(copied, np.full((2, 3), value + i, np.float32))
    assert any("4 tensor(s) that only one model has are copied from it" in w for w in warnings)
    assert fusekit.verify(tmp_path / "out").ok


def test_what_the_base_alone_has_is_kept_and_what_it_alone_lacks_refused(tmp_path: Path) -> None:
    name = "model.norm.weight"
    base, a = model(tmp_path, "base", 1.0), model(tmp_path, "a", 3.0)
    lacking = without(tmp_path, a, name)
    recipe = {"merge_method": "task_arithmetic", "missing": "copy"}
    merged, _, _ = merge(tmp_path, **recipe, base_model=base, **equally(lacking))
    assert merged[name][0] == 1.0
    both = equally(a, model(tmp_path, "b", 5.0))
    assert f"{name!r} is not in {lacking}" in refused(**recipe, base_model=lacking, **both)


# -- vocabularies of different size ---------------------------------------------------------------


def test_interpolations_keep_the_rows_that_all_models_have(tmp_path: Path) -> None:
    a, b = model(tmp_path, "a", 1.0, rows=10), model(tmp_path, "b", 3.0, rows=8)
    merged, config, warnings = merge(tmp_path, **equally(a, b))
    assert merged[EMBED].shape == merged[HEAD].shape == (8, 4)
    assert config["vocab_size"] == 8
    assert merged[EMBED][0, 0] == 2.0
    assert len(warnings) == 2
    assert "only the first 8 are merged; set tokenizer_source" in warnings[0]


@pytest.mark.parametrize(
    ("method", "parameters"), [("nuslerp", {"weight": 1.0}), ("model_stock", {})]
)
def test_interpolations_around_a_base_cut_its_rows_too(
    tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    base = model(tmp_path, "base", 1.0, rows=10)
    a, b = model(tmp_path, "a", 2.0, rows=9), model(tmp_path, "b", 4.0, rows=8)
    models = [{"model": a}, {"model": b}]
    recipe = {"base_model": base, "models": models, "parameters": parameters}
    merged, config, _ = merge(tmp_path, **recipe, merge_method=method)
    assert merged[EMBED].shape == merged[HEAD].shape == (8, 4)
    assert config["vocab_size"] == 8
    np.testing.assert_allclose(merged[EMBED], 3.0)


def test_task_vectors_keep_the_rows_of_the_base(tmp_path: Path) -> None:
    base = model(tmp_path, "base", 1.0, rows=8)
    larger, smaller = model(tmp_path, "b", 3.0, rows=10), model(tmp_path, "c", 3.0, rows=6)
    recipe = {"base_model": base, "merge_method": "task_arithmetic"}
    merged, config, warnings = merge(tmp_path, **recipe, **equally(larger))
    assert merged[EMBED].shape == (8, 4)
    assert config["vocab_size"] == 8
    assert warnings
    assert "tokenizer_source: union" in refused(**recipe, **equally(smaller))


def test_any_other_difference_in_shape_is_refused(tmp_path: Path) -> None:
    a, b = model(tmp_path, "a", 1.0), model(tmp_path, "b", 1.0, width=5)
    assert "has shape [8, 5], expected [8, 4] as in" in refused(**equally(a, b))


# -- modules --------------------------------------------------------------------------------------


def towers(folder: Path, name: str, value: float) -> str:
    made = {f"vision_tower.layers.{i}.w": np.full(4, value, np.float32) for i in range(2)}
    made |= {f"language_model.layers.{i}.w": np.full(4, value, np.float32) for i in range(3)}
    made["projector.w"] = np.full(4, value, np.float32)
    config = {
        "text_config": {"num_hidden_layers": 3},
        "vision_config": {"num_hidden_layers": 2},
    }
    write_model(folder / name, made, config)
    return str(folder / name)


def test_modules_have_models_and_parameters_of_their_own(tmp_path: Path) -> None:
    a, b = towers(tmp_path, "a", 0.0), towers(tmp_path, "b", 1.0)
    both = [{"model": a}, {"model": b}]
    weighted = [{"model": a, "parameters": {"weight": 1.0}}, {"model": b}]
    recipe = {
        "modules": {
            "vision_tower": {"models": both, "parameters": {"weight": 2.0}},
            "text_decoder": {"models": weighted, "parameters": {"weight": 3.0}},
            "default": {"models": [{"model": b}]},
        },
        "parameters": {"weight": 1.0},
    }
    merged, _, _ = merge(tmp_path, **recipe)
    found = {name: float(values[0]) for name, values in merged.items()}
    assert found["vision_tower.layers.1.w"] == 0.5
    assert found["language_model.layers.2.w"] == 0.75
    assert found["projector.w"] == 1.0


def test_modules_must_cover_the_model_and_exist(tmp_path: Path) -> None:
    a = towers(tmp_path, "a", 0.0)
    models = {"models": [{"model": a}], "parameters": {"weight": 1.0}}
    message = refused(modules={"vision_tower": models, "language_model": models})
    assert "'projector.w'" in message
    assert "add a module 'default'" in message
    message = refused(modules={"vision_towr": models, "default": models})
    assert "(did you mean 'vision_tower'?)" in message


def test_layer_ranges_of_a_model_with_several_towers_need_modules(tmp_path: Path) -> None:
    a = towers(tmp_path, "a", 0.0)
    slices = [{"sources": [{"model": a, "layer_range": [0, 2]}]}]
    message = refused(merge_method="passthrough", slices=slices)
    assert "several stacks of layers" in message
    assert "use modules" in message


# -- parameters that do nothing -------------------------------------------------------------------


def test_a_global_parameter_at_a_model_is_pointed_out(tmp_path: Path) -> None:
    a, b = model(tmp_path, "a", 1.0), model(tmp_path, "b", 3.0)
    models = [{"model": a, "parameters": {"normalize": False}}, {"model": b}]
    _, _, warnings = merge(tmp_path, models=models, parameters={"weight": 1.0})
    assert warnings[0].startswith("models[0].parameters.normalize has no effect")


# -- base_model where the method has no use for one -----------------------------------------------


def test_a_listed_base_of_a_method_without_one_gives_the_config(tmp_path: Path) -> None:
    a, b = model(tmp_path, "a", 1.0), model(tmp_path, "b", 3.0, tied=False)
    merged, config, _ = merge(tmp_path, **equally(a, b), base_model=b)
    assert merged[EMBED][0, 0] == 2.0
    assert "tie_word_embeddings" in config


def test_an_unlisted_base_of_a_method_without_one_is_one_more_model(tmp_path: Path) -> None:
    a, b = model(tmp_path, "a", 1.0), model(tmp_path, "b", 4.0, tied=False)
    merged, config, warnings = merge(tmp_path, **equally(a, a), base_model=b)
    assert merged[EMBED][0, 0] == 2.0
    assert config["tie_word_embeddings"] is False
    assert warnings == [f"base_model {b} is merged as one more model: linear has no base"]
    models = [{"model": a, "parameters": {"weight": 1.0}}]
    assert f"base_model ({b}): linear needs the parameter 'weight'" in refused(
        models=models, base_model=b
    )


def test_stacking_takes_the_config_of_a_base_that_is_no_source(tmp_path: Path) -> None:
    a, b = model(tmp_path, "a", 1.0), model(tmp_path, "b", 3.0, tied=False)
    slices = [{"sources": [{"model": a, "layer_range": [0, 2]}]}]
    merged, config, _ = merge(tmp_path, merge_method="passthrough", base_model=b, slices=slices)
    assert merged[EMBED][0, 0] == 1.0
    assert config["num_hidden_layers"] == 2
    assert "tie_word_embeddings" in config


def test_the_same_model_twice_is_two_entries(tmp_path: Path) -> None:
    a, b = model(tmp_path, "a", 1.0), model(tmp_path, "b", 4.0)
    models = [{"model": m, "parameters": {"weight": w}} for m, w in ((a, 1.0), (b, 1.0), (a, 2.0))]
    merged, _, _ = merge(tmp_path, models=models)
    assert merged[EMBED][0, 0] == (1.0 + 4.0 + 2.0) / 4.0


def test_slices_may_have_bases_of_their_own(tmp_path: Path) -> None:
    base, other, a = (model(tmp_path, n, v) for n, v in (("base", 1.0), ("other", 2.0), ("a", 5.0)))
    slices = [
        {"sources": [{"model": m, "layer_range": [0, 1]} for m in (base, a)]},
        {"sources": [{"model": a, "layer_range": [0, 1]}], "base_model": other},
    ]
    merged, _, _ = merge(
        tmp_path,
        merge_method="task_arithmetic",
        base_model=base,
        slices=slices,
        parameters={"weight": 0.5},
    )
    depth = [merged[f"model.layers.{i}.mlp.up_proj.weight"][0, 0] for i in range(2)]
    assert depth == [3.0, 3.5]


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "model_stock", "ramplus"])
def test_a_slice_of_the_base_alone_is_copied(tmp_path: Path, method: str) -> None:
    base, a, b = (model(tmp_path, name, i) for i, name in enumerate(("base", "a", "b"), start=1))
    alone = [{"model": base, "layer_range": [0, 2]}]
    merged = [{"model": name, "layer_range": [2, 3]} for name in (base, a, b)]
    recipe = {"merge_method": method, "base_model": base, "granularity": "model"}
    out, _, _ = merge(tmp_path, **recipe, slices=[{"sources": alone}, {"sources": merged}])
    layers = [out[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)]
    np.testing.assert_array_equal(layers[:2], np.float32([[[1.0]], [[1.1]]]) * np.ones((4, 4)))
    assert (layers[2] > np.float32(1.2)).any()
    whole = {"merge_method": method, "base_model": base, "models": [{"model": base}]}
    assert "besides its base, found 0" in refused(**whole)
