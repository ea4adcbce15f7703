"""What slices do to settings that name layers by number, and to tied heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fusekit
from fusekit import RecipeError
from tests.engine.support import write_model
from tests.engine.test_matching import EMBED, HEAD, merge, model, tensors

LAYERS = 4


def listed(folder: Path, name: str, **settings: Any) -> str:
    config = {"num_hidden_layers": LAYERS, **settings}
    write_model(folder / name, tensors(1.0, layers=LAYERS), config)
    return str(folder / name)


def passthrough(*ranges: tuple[str, int, int]) -> dict[str, Any]:
    slices = [
        {"sources": [{"model": name, "layer_range": [start, end]}]} for name, start, end in ranges
    ]
    return {"merge_method": "passthrough", "slices": slices}


@pytest.mark.parametrize("key", ["mlp_only_layers", "moe_layers", "cross_attention_layers"])
def test_lists_of_layer_numbers_follow_their_layers(tmp_path: Path, key: str) -> None:
    a = listed(tmp_path, "a", **{key: [1, 3]})
    b = listed(tmp_path, "b", **{key: [0]})
    _, config, _ = merge(tmp_path, **passthrough((a, 1, 4), (b, 0, 2), (a, 0, 2)))
    assert config["num_hidden_layers"] == 7
    assert config[key] == [0, 2, 3, 6]


def test_a_list_of_numbers_as_long_as_the_model_is_not_taken_layer_by_layer(
    tmp_path: Path,
) -> None:
    a = listed(tmp_path, "a", moe_layers=[0, 1, 2, 3], no_rope_layers=[1, 1, 1, 0])
    _, config, _ = merge(tmp_path, **passthrough((a, 0, 4), (a, 2, 4)))
    assert config["moe_layers"] == [0, 1, 2, 3, 4, 5]
    assert config["no_rope_layers"] == [1, 1, 1, 0, 1, 0]


def test_a_count_of_first_layers_is_counted_again_or_refused(tmp_path: Path) -> None:
    a = listed(tmp_path, "a", first_k_dense_replace=2)
    _, config, _ = merge(tmp_path, **passthrough((a, 1, 3), (a, 2, 4)))
    assert config["first_k_dense_replace"] == 1
    _, config, _ = merge(tmp_path, **passthrough((a, 0, 2), (a, 0, 4)))
    assert config["first_k_dense_replace"] == 4
    with pytest.raises(RecipeError, match=r"first_k_dense_replace.* layer 2 of the output, which"):
        fusekit.plan(passthrough((a, 0, 3), (a, 0, 4)))


@pytest.mark.parametrize("key", ["decoder_sparse_step", "sliding_window_pattern"])
def test_periods_of_layers_are_kept_or_refused(tmp_path: Path, key: str) -> None:
    a = listed(tmp_path, "a", **{key: 2})
    _, config, _ = merge(tmp_path, **passthrough((a, 0, 3), (a, 1, 4)))
    assert (config["num_hidden_layers"], config[key]) == (6, 2)
    with pytest.raises(RecipeError, match=rf"slices: {key} .*layer 3 of the output, .* layer 2 of"):
        fusekit.plan(passthrough((a, 0, 3), (a, 2, 4)))
    b = listed(tmp_path, "b", **{key: 3})
    with pytest.raises(RecipeError, match=f"is of a model with {key}: 3, expected 2"):
        fusekit.plan(passthrough((a, 0, 2), (b, 2, 4)))


def test_a_period_beside_a_list_of_all_layers_is_no_obstacle(tmp_path: Path) -> None:
    a = listed(tmp_path, "a", sliding_window_pattern=2, layer_types=["s", "f", "s", "f"])
    _, config, _ = merge(tmp_path, **passthrough((a, 0, 3), (a, 2, 4)))
    assert config["layer_types"] == ["s", "f", "s", "s", "f"]


def test_slices_of_different_tied_models_warn_of_the_head(tmp_path: Path) -> None:
    a = model(tmp_path, "a", 1.0, tied=True, head=False)
    b = model(tmp_path, "b", 2.0, tied=True, head=False)
    merged, config, warnings = merge(tmp_path, **passthrough((a, 0, 2), (b, 1, 3)))
    assert HEAD not in merged
    assert config["tie_word_embeddings"] is True
    (warning,) = warnings
    assert warning.startswith(f"the output head is the embedding of {a}, since")
    assert f"the last layers are those of {b}" in warning
    assert merge(tmp_path, **passthrough((a, 0, 2), (b, 1, 3), (a, 1, 3)))[2] == []


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("stated", [True, None])
def test_a_tied_head_after_another_embedding_is_written(
    tmp_path: Path, stored: bool, stated: bool | None
) -> None:
    own = model(tmp_path, "own", 1.0, tied=False)
    tied = model(tmp_path, "tied", 2.0, tied=stated, head=False)
    if stored and stated:  # the file repeats what its config says is tied
        path = tmp_path / "tied/model.safetensors"
        save_file({**load_file(path), HEAD: load_file(path)[EMBED]}, path)
    merged, config, _ = merge(tmp_path, **passthrough((own, 0, 2), (tied, 1, 3)))
    np.testing.assert_array_equal(merged[EMBED], np.full((8, 4), 1.0))
    np.testing.assert_array_equal(merged[HEAD], np.full((8, 4), 2.0))
    assert config["tie_word_embeddings"] is False


def test_a_head_that_slices_lose_is_refused(tmp_path: Path) -> None:
    own = model(tmp_path, "own", 1.0, tied=False)
    headless = model(tmp_path, "headless", 2.0, tied=False, head=False)
    with pytest.raises(RecipeError, match=r"the output would have no output head: .*own has one"):
        fusekit.plan(passthrough((own, 0, 2), (headless, 1, 3)))


def test_layers_of_models_of_another_width_are_refused(tmp_path: Path) -> None:
    a, b = model(tmp_path, "a", 1.0), model(tmp_path, "b", 1.0, width=5)
    expected = (
        r"has shape \[8, 4\] in \S*a but \[8, 5\] in \S*b; slices take layers of models of one"
    )
    for ranges in ([(a, 0, 2), (b, 1, 3)], [(a, 0, 2), (b, 1, 3), (a, 0, 1)]):
        with pytest.raises(RecipeError, match=expected):
            fusekit.plan(passthrough(*ranges))
    with pytest.raises(RecipeError, match=expected):  # the base's config would be carried over
        fusekit.plan({**passthrough((a, 0, 2), (a, 1, 3)), "base_model": b})


def test_layers_of_another_size_need_a_config_that_lists_sizes(tmp_path: Path) -> None:
    def sized(name: str, rows: int, **settings: Any) -> str:
        own = {f"model.layers.{i}.mlp.up_proj.weight": np.ones((rows, 4)) for i in range(3)}
        config = {"num_hidden_layers": 3, **settings}
        write_model(tmp_path / name, {**tensors(1.0), **own}, config)
        return str(tmp_path / name)

    ranges = (sized("a", 4), 0, 2), (sized("b", 6), 1, 3)
    expected = r"'mlp.up_proj.weight' of every layer has shape \[4, 4\] in \S*a but \[6, 4\] in"
    with pytest.raises(RecipeError, match=expected):
        fusekit.plan(passthrough(*ranges))
    ranges = (
        (sized("listed_a", 4, intermediate_size=[4, 4, 4]), 0, 2),
        (sized("listed_b", 6, intermediate_size=[6, 6, 6]), 1, 3),
    )
    merged, config, _ = merge(tmp_path, **passthrough(*ranges))
    assert config["intermediate_size"] == [4, 4, 6, 6]
    assert merged["model.layers.3.mlp.up_proj.weight"].shape == (6, 4)


def test_a_head_of_another_vocabulary_than_the_embedding_is_pointed_out(tmp_path: Path) -> None:
    a, b = model(tmp_path, "a", 1.0), model(tmp_path, "b", 1.0, rows=9)
    (warning,) = merge(tmp_path, **passthrough((a, 0, 2), (b, 1, 3)))[2]
    assert f"the embedding of {a} has 8 rows, the head of {b} 9: few libraries load" in warning
    assert merge(tmp_path, **passthrough((a, 0, 2), (b, 1, 3), (a, 2, 3)))[2] == []


def test_parameters_of_a_tied_head_go_by_the_heads_name(tmp_path: Path) -> None:
    own = model(tmp_path, "own", 1.0, tied=False)
    tied = model(tmp_path, "tied", 3.0, tied=True, head=False)
    weights = [
        {"filter": "embed", "value": 3.0},
        {"filter": "lm_head", "value": 0.5},
        {"value": 1.0},
    ]
    models = [
        {"model": own, "parameters": {"weight": 0.5}},
        {"model": tied, "parameters": {"weight": weights}},
    ]
    merged, _, _ = merge(
        tmp_path, merge_method="linear", models=models, parameters={"normalize": False}
    )
    np.testing.assert_allclose(merged[HEAD], np.full((8, 4), 0.5 * -1.0 + 0.5 * 3.0))
    np.testing.assert_allclose(merged[EMBED], np.full((8, 4), 0.5 * 1.0 + 3.0 * 3.0))


def test_a_head_that_slices_bring_is_not_called_tied(tmp_path: Path) -> None:
    own = model(tmp_path, "own", 1.0, tied=False)
    tied = model(tmp_path, "tied", 2.0, tied=True, head=False)
    merged, config, _ = merge(tmp_path, **passthrough((tied, 0, 2), (own, 1, 3)))
    np.testing.assert_array_equal(merged[EMBED], np.full((8, 4), 2.0))
    np.testing.assert_array_equal(merged[HEAD], np.full((8, 4), -1.0))
    assert config["tie_word_embeddings"] is False


def adapter(folder: Path, name: str, tensors: dict[str, np.ndarray], **config: Any) -> str:
    """A PEFT adapter of rank 1 and alpha 2."""
    (folder / name).mkdir()
    save_file(
        {f"base_model.model.{key}": value.astype(np.float32) for key, value in tensors.items()},
        folder / name / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["lm_head"]}
    (folder / name / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return str(folder / name)


def test_a_tied_head_that_an_adapter_trained_is_written(tmp_path: Path) -> None:
    tied = model(tmp_path, "tied", 2.0, tied=True, head=False)
    factors = {"lm_head.lora_A.weight": np.ones((1, 4)), "lm_head.lora_B.weight": np.ones((8, 1))}
    whole = {"lm_head.base_layer.weight": np.full((8, 4), 2.0)}
    one = adapter(tmp_path, "one", {**factors, **whole})
    merged, config, _ = merge(tmp_path, **passthrough((f"{tied}+{one}", 0, 3)))
    np.testing.assert_array_equal(merged[EMBED], np.full((8, 4), 2.0))
    np.testing.assert_array_equal(merged[HEAD], np.full((8, 4), 4.0))
    assert config["tie_word_embeddings"] is False


def test_a_tied_head_that_an_adapter_only_repeats_stays_tied(tmp_path: Path) -> None:
    tied = model(tmp_path, "tied", 2.0, tied=True, head=False)
    saved = {"model.embed_tokens.weight": np.full((8, 4), 5.0), HEAD: np.full((8, 4), 5.0)}
    settings = {"target_modules": [], "modules_to_save": ["embed_tokens", "lm_head"]}
    merged, config, _ = merge(
        tmp_path,
        **passthrough((f"{tied}+{adapter(tmp_path, 'one', saved, **settings)}", 0, 3)),
    )
    assert HEAD not in merged
    np.testing.assert_array_equal(merged[EMBED], np.full((8, 4), 5.0))
    assert config["tie_word_embeddings"] is True


def test_an_adapter_with_more_tokens_sets_the_vocabulary_size(tmp_path: Path) -> None:
    own = model(tmp_path, "own", 1.0, tied=False)
    saved = {}
    for name, value in (("model.embed_tokens", 5.0), ("lm_head", 6.0)):  # as PEFT writes it
        for copy in ("", "modules_to_save.", "original_module."):
            made = value if copy != "original_module." else 0.0
            saved[f"{name}.{copy}weight"] = np.full((10, 4), made)
    settings = {"target_modules": [], "modules_to_save": ["embed_tokens", "lm_head"]}
    one = adapter(tmp_path, "one", saved, **settings)
    merged, config, _ = merge(tmp_path, **passthrough((f"{own}+{one}", 0, 3)))
    assert config["vocab_size"] == 10
    np.testing.assert_array_equal(merged[EMBED], np.full((10, 4), 5.0))
    np.testing.assert_array_equal(merged[HEAD], np.full((10, 4), 6.0))
    assert merged.keys() == tensors(1.0).keys()


def test_a_head_beside_a_tied_copy_is_not_called_tied(tmp_path: Path) -> None:
    tied = model(tmp_path, "tied", 2.0, tied=True, head=False)
    path = tmp_path / "tied/model.safetensors"
    save_file({**load_file(path), HEAD: load_file(path)[EMBED]}, path)
    own = model(tmp_path, "own", 1.0, tied=False)
    models = [{"model": tied}, {"model": own}]
    merged, config, _ = merge(tmp_path, models=models, parameters={"weight": 1.0})
    np.testing.assert_allclose(merged[HEAD], np.full((8, 4), (2.0 - 1.0) / 2))
    assert config["tie_word_embeddings"] is False


def test_an_overridden_architecture_is_said_to_have_no_effect(tmp_path: Path) -> None:
    a = model(tmp_path, "a", 1.0)
    named = {"model": {"path": a}, "override_architecture": "LlamaForCausalLM"}
    for entry, told in ((named, True), (a, False)):
        recipe = {"merge_method": "linear", "models": [{"model": entry}]}
        plan = fusekit.plan({**recipe, "parameters": {"weight": 1.0}})
        assert any("override_architecture has no effect" in text for text in plan.warnings) == told
        plan.close()


# -- which count, of which tower ------------------------------------------------------------------


def test_the_count_follows_where_the_base_is_deeper_than_the_models(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 6, "layer_types": [f"base {i}" for i in range(6)]}
    write_model(tmp_path / "base", tensors(0.0, layers=6), config)
    a = listed(tmp_path, "a", layer_types=[f"a {i}" for i in range(4)])
    recipe = passthrough((a, 0, 3), (a, 2, 4))
    _, config, _ = merge(tmp_path, base_model=str(tmp_path / "base"), **recipe)
    assert config["num_hidden_layers"] == 5
    assert config["layer_types"] == ["a 0", "a 1", "a 2", "a 2", "a 3"]


def test_a_count_that_leaves_layers_out_is_set_all_the_same(tmp_path: Path) -> None:
    write_model(tmp_path / "a", tensors(1.0, layers=4), {"num_hidden_layers": 3})  # one to predict
    _, config, _ = merge(tmp_path, **passthrough((str(tmp_path / "a"), 0, 2)))
    assert config["num_hidden_layers"] == 2


def tower_recipe(folder: Path, tower: str, *others: str, **config: Any) -> dict[str, Any]:
    """One of two towers, each of two layers, cut to its second half and put behind itself."""
    made = {
        f"{name}.{i}.w": np.full(4, i, np.float32) for name in (tower, *others) for i in range(2)
    }
    write_model(folder / "a", made, config)
    a = {"model": str(folder / "a")}
    ranges = ([0, 2], [1, 2])
    slices = [{"sources": [{**a, "layer_range": layers}]} for layers in ranges]
    module = tower.partition(".")[0]
    modules = {other.partition(".")[0]: {"models": [a]} for other in others}
    return {"merge_method": "passthrough", "modules": {module: {"slices": slices}, **modules}}


@pytest.mark.parametrize("tower", ["vision", "text", "audio"])
def test_of_several_towers_the_one_that_is_stacked_is_counted(tmp_path: Path, tower: str) -> None:
    names = ["vision_tower.layers", "text_model.layers", "audio_tower.layers"]
    own = next(name for name in names if name.startswith(tower))
    counts = {f"{name.partition('_')[0]}_config": {"num_hidden_layers": 2} for name in names}
    others = [name for name in names if name != own]
    _, config, _ = merge(tmp_path, **tower_recipe(tmp_path, own, *others, **counts))
    counts[f"{tower}_config"] = {"num_hidden_layers": 3}
    assert config == counts


@pytest.mark.parametrize("tower", ["encoder", "decoder"])
def test_two_whole_models_in_one_are_counted_apart(tmp_path: Path, tower: str) -> None:
    names = ["encoder.encoder.layer", "decoder.bert.encoder.layer"]
    own, other = names if tower == "encoder" else reversed(names)
    counts = {"encoder": {"num_hidden_layers": 2}, "decoder": {"num_hidden_layers": 2}}
    _, config, _ = merge(tmp_path, **tower_recipe(tmp_path, own, other, **counts))
    assert config == {**counts, tower: {"num_hidden_layers": 3}}


@pytest.mark.parametrize(("tower", "changed"), [("encoder", 2), ("decoder", 1)])
def test_a_plain_count_beside_both_is_that_of_the_encoder(
    tmp_path: Path, tower: str, changed: int
) -> None:
    counts = {"encoder_layers": 2, "decoder_layers": 2, "num_hidden_layers": 2}
    other = "encoder" if tower == "decoder" else "decoder"
    recipe = tower_recipe(tmp_path, f"{tower}.layers", f"{other}.layers", **counts)
    _, config, _ = merge(tmp_path, **recipe)
    assert config[f"{tower}_layers"] == 3
    assert config[f"{other}_layers"] == 2
    assert sum(value == 3 for value in config.values()) == changed


def test_a_count_that_is_repeated_for_the_whole_model_is_set_twice(tmp_path: Path) -> None:
    counts = {"num_hidden_layers": 2, "text_config": {"num_hidden_layers": 2}}
    recipe = tower_recipe(tmp_path, "language_model.layers", "visual.blocks", **counts)
    _, config, _ = merge(tmp_path, **recipe)
    assert config == {"num_hidden_layers": 3, "text_config": {"num_hidden_layers": 3}}


@pytest.mark.parametrize(
    "key", ["begin_suppress_tokens", "conv_dim", "out_indices", "image_mean", "mrope_section"]
)
def test_lists_of_other_things_are_kept_however_long(tmp_path: Path, key: str) -> None:
    a = listed(tmp_path, "a", **{key: [5, 6, 7, 8]})
    _, config, _ = merge(tmp_path, **passthrough((a, 0, 4), (a, 2, 4)))
    assert config[key] == [5, 6, 7, 8]


def test_stages_of_growing_width_are_not_stacked(tmp_path: Path) -> None:
    a = listed(tmp_path, "a", depths=[1, 1, 2, 1])
    with pytest.raises(RecipeError, match=r"stages of growing width \(depths: \[1, 1, 2, 1\]"):
        fusekit.plan(passthrough((a, 0, 2), (a, 1, 4)))
    assert merge(tmp_path, **passthrough((a, 0, 4)))[1]["depths"] == [1, 1, 2, 1]


def test_a_first_layer_unlike_the_others_that_moves_is_told(tmp_path: Path) -> None:
    own = tensors(1.0, layers=3)
    own["model.layers.0.bias_table"] = np.ones(2, np.float32)
    write_model(tmp_path / "a", own, {"num_hidden_layers": 3})
    a = str(tmp_path / "a")
    for ranges, layer, index in (([(1, 3)], 0, 1), ([(0, 2), (0, 1)], 2, 0)):
        (warning,) = merge(tmp_path, **passthrough(*((a, *each) for each in ranges)))[2]
        assert warning.startswith(f"layer {layer} of the output is layer {index} of {a}, whose")
        assert "'bias_table'" in warning
    assert merge(tmp_path, **passthrough((a, 0, 3), (a, 1, 3)))[2] == []


# -- modules within modules -----------------------------------------------------------------------


def chosen(folder: Path, names: list[str], *modules: str) -> dict[str, int]:
    """Which of the modules' models (0, 1, ...) every tensor comes from."""
    made = {}
    for i, module in enumerate(modules):
        write_model(folder / str(i), {name: np.full(2, i, np.float32) for name in names}, {})
        made[module] = {"models": [{"model": str(folder / str(i))}]}
    merged, _, _ = merge(folder, merge_method="passthrough", modules=made)
    return {name: int(values[0]) for name, values in merged.items()}


def test_a_module_inside_of_another_has_its_tensors(tmp_path: Path) -> None:
    names = ["visual.blocks.0.w", "visual.merger.w", "model.layers.0.w"]
    found = chosen(tmp_path, names, "vision_tower", "multi_modal_projector", "text_decoder")
    assert list(found.values()) == [0, 1, 2]


def test_the_outer_of_two_modules_in_a_name_has_the_tensor(tmp_path: Path) -> None:
    names = ["encoder.layer.0.w", "decoder.bert.encoder.layer.0.w", "head.w"]
    found = chosen(tmp_path, names, "encoder", "decoder", "default")
    assert list(found.values()) == [0, 1, 2]
