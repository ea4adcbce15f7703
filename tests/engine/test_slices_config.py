"""What slices do to settings that name layers by number, and to tied heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

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


def test_a_head_that_slices_lose_is_refused(tmp_path: Path) -> None:
    own = model(tmp_path, "own", 1.0, tied=False)
    tied = model(tmp_path, "tied", 2.0, tied=True, head=False)
    with pytest.raises(RecipeError, match=r"the output would have no output head: .*own has one"):
        fusekit.plan(passthrough((own, 0, 2), (tied, 1, 3)))


def test_a_head_that_slices_bring_is_not_called_tied(tmp_path: Path) -> None:
    own = model(tmp_path, "own", 1.0, tied=False)
    tied = model(tmp_path, "tied", 2.0, tied=True, head=False)
    merged, config, _ = merge(tmp_path, **passthrough((tied, 0, 2), (own, 1, 3)))
    np.testing.assert_array_equal(merged[EMBED], np.full((8, 4), 2.0))
    np.testing.assert_array_equal(merged[HEAD], np.full((8, 4), -1.0))
    assert config["tie_word_embeddings"] is False


def test_an_overridden_architecture_is_said_to_have_no_effect(tmp_path: Path) -> None:
    a = model(tmp_path, "a", 1.0)
    named = {"model": {"path": a}, "override_architecture": "LlamaForCausalLM"}
    for entry, told in ((named, True), (a, False)):
        recipe = {"merge_method": "linear", "models": [{"model": entry}]}
        plan = fusekit.plan({**recipe, "parameters": {"weight": 1.0}})
        assert any("override_architecture has no effect" in text for text in plan.warnings) == told
        plan.close()
