"""Mixtures of experts made from dense models: routers, refusals, exact copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fusekit
from fusekit import CheckpointError, RecipeError
from fusekit.structure.layouts import choose_layout
from fusekit.structure.routers import (
    degenerate_layers,
    embedding_direction,
    hidden_directions,
    router_rows,
)
from fusekit.structure.upcycle import load_moe_recipe, upcycle
from tests.engine.support import write_model
from tests.vectors import FOLDER, read_case

Array = np.ndarray[Any, np.dtype[Any]]
HIDDEN, INNER = 8, 12


def test_rows_from_embeddings_equal_the_reference() -> None:
    case = read_case("moe-upcycling", "case0")
    embedding = case.tensors["in"]["embed"]
    expected = case.tensors["out"]["router"]
    for i in range(expected.shape[1]):
        given = case.group(f"in/expert{i}")
        sides = [
            embedding_direction(
                embedding, given[f"{side}_input_ids"], given[f"{side}_attention_mask"]
            )
            if f"{side}_input_ids" in given
            else None
            for side in ("pos", "neg")
        ]
        assert sides[0] is not None
        for layer in range(len(expected)):
            np.testing.assert_allclose(router_rows(*sides), expected[layer, i], atol=1e-6)


def test_rows_from_hidden_states_equal_the_reference() -> None:
    case = read_case("moe-upcycling", "case1")
    expected = case.tensors["out"]["router"]
    for i in range(expected.shape[1]):
        given = case.group(f"in/expert{i}")
        sides = [
            hidden_directions(states, np.ones(states.shape[1:3]), "last")
            if (states := given.get(f"{side}_hidden_states")) is not None
            else None
            for side in ("pos", "neg")
        ]
        assert sides[0] is not None
        np.testing.assert_allclose(router_rows(*sides), expected[:, i], atol=1e-6)


def test_averages_leave_padding_out() -> None:
    states = np.ones((3, 1, 4, 2))
    states[:, :, :2] = 100.0
    mask = np.array([[0.0, 0.0, 1.0, 1.0]])
    np.testing.assert_array_equal(hidden_directions(states, mask, "average"), np.ones((2, 2)))


def test_routers_that_cannot_tell_experts_apart_are_found() -> None:
    good, bad = np.eye(2, 5), np.ones((2, 5)) + 1e-3 * np.eye(2, 5)
    assert degenerate_layers(np.stack([good, bad])) == [1]


# -- whole folders --------------------------------------------------------------------------------


def dense(folder: Path, name: str, seed: int, inner: int = INNER, family: str = "llama") -> str:
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (10, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(2):
        layer = f"model.layers.{i}"
        for projection in "qkvo":
            shapes[f"{layer}.self_attn.{projection}_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, HIDDEN)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, HIDDEN)
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, inner)
    tensors = {key: rng.standard_normal(s).astype(np.float32) for key, s in shapes.items()}
    config = {"model_type": family, "intermediate_size": inner, "num_hidden_layers": 2}
    write_model(folder / name, tensors, config)
    return str(folder / name)


def recipe(base: str, *experts: str, **settings: Any) -> dict[str, Any]:
    listed = [{"source_model": expert} for expert in experts]
    return {"base_model": base, "experts": listed, "gate_mode": "random", **settings}


def test_experts_are_copies_and_everything_else_is_the_bases(tmp_path: Path) -> None:
    base, a, b = (dense(tmp_path, name, seed) for seed, name in enumerate(("base", "a", "b")))
    upcycle(recipe(base, a, b), tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    own, experts = load_file(f"{base}/model.safetensors"), [a, b]
    for name in own:
        if ".mlp." not in name:
            assert merged.pop(name).tobytes() == own[name].tobytes()
    for layer in range(2):
        place = f"model.layers.{layer}"
        for i, expert in enumerate(experts):
            theirs = load_file(f"{expert}/model.safetensors")
            for theirs_name, ours in {"gate": "w1", "down": "w2", "up": "w3"}.items():
                found = merged.pop(f"{place}.block_sparse_moe.experts.{i}.{ours}.weight")
                assert found.tobytes() == theirs[f"{place}.mlp.{theirs_name}_proj.weight"].tobytes()
        assert merged.pop(f"{place}.block_sparse_moe.gate.weight").shape == (2, HIDDEN)
    assert not merged
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (2, 2)
    assert fusekit.verify(tmp_path / "out").ok
    assert "arXiv 2212.05055" in (tmp_path / "out/README.md").read_text()


def test_noise_and_scale_are_what_they_say_and_reproducible(tmp_path: Path) -> None:
    base, a = dense(tmp_path, "base", 0), dense(tmp_path, "a", 1, inner=INNER)
    settings = recipe(base, a, base)
    settings["experts"][0] |= {"noise_scale": 0.01, "residual_scale": 0.1}
    upcycle(settings, tmp_path / "one")
    upcycle(settings, tmp_path / "two", threads=1)
    one = load_file(tmp_path / "one/model.safetensors")
    two = load_file(tmp_path / "two/model.safetensors")
    theirs = load_file(f"{a}/model.safetensors")
    for name, values in one.items():
        assert values.tobytes() == two[name].tobytes()
    place = "model.layers.0.block_sparse_moe.experts.0"
    up = one[f"{place}.w3.weight"] - theirs["model.layers.0.mlp.up_proj.weight"]
    down = one[f"{place}.w2.weight"] / 0.1 - theirs["model.layers.0.mlp.down_proj.weight"]
    for noise in (up, down):
        assert 0.005 < noise.std() < 0.02


def test_a_shared_expert_without_gate_makes_the_deepseek_layout(tmp_path: Path) -> None:
    base, a = dense(tmp_path, "base", 0), dense(tmp_path, "a", 1)
    settings = recipe(base, a, base, shared_experts=[{"source_model": a}])
    made = upcycle({**settings, "architecture": "deepseek"}, tmp_path / "out")
    assert made.layout == "deepseek"
    merged = load_file(tmp_path / "out/model.safetensors")
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in merged
    assert not any("shared_expert_gate" in name for name in merged)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["Glm4MoeForCausalLM"]
    assert (config["n_routed_experts"], config["n_shared_experts"]) == (2, 1)
    upcycle({**settings, "architecture": "deepseek_v1"}, tmp_path / "v1")
    assert set(load_file(tmp_path / "v1/model.safetensors")) == {
        name for name in merged if not name.endswith("correction_bias")
    }
    config = json.loads((tmp_path / "v1/config.json").read_text())
    assert (config["model_type"], config["scoring_func"]) == ("deepseek", "softmax")


def test_routers_that_score_by_sigmoids_have_shorter_rows(tmp_path: Path) -> None:
    base, a = dense(tmp_path, "base", 0), dense(tmp_path, "a", 1)
    for layout in ("deepseek", "mixtral"):
        upcycle(recipe(base, a, base, architecture=layout), tmp_path / layout)
    rows = load_file(tmp_path / "mixtral/model.safetensors")
    short = load_file(tmp_path / "deepseek/model.safetensors")
    np.testing.assert_allclose(
        short["model.layers.1.mlp.gate.weight"],
        rows["model.layers.1.block_sparse_moe.gate.weight"] / HIDDEN**0.5,
        rtol=1e-5,
    )


def test_experts_of_another_type_get_that_of_the_base(tmp_path: Path) -> None:
    base, a = dense(tmp_path, "base", 0), dense(tmp_path, "a", 1)
    half = {k: v.astype(np.float16) for k, v in load_file(f"{base}/model.safetensors").items()}
    save_file(half, f"{base}/model.safetensors")
    upcycle(recipe(base, a, base), tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    assert {values.dtype for values in merged.values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize(
    ("name", "layout"),
    [("Mixtral", "mixtral"), ("DeepSeek MoE", "deepseek"), ("qwen", "qwen2_moe")],
)
def test_layouts_have_the_names_that_recipes_use(name: str, layout: str) -> None:
    shared = 1 if layout == "qwen2_moe" else 0
    assert choose_layout(name, "llama", shared).name == layout
    with pytest.raises(RecipeError, match=r"'mixtrl' \(did you mean 'mixtral'\?\)"):
        choose_layout("mixtrl", "llama", 0)


def test_missing_biases_are_zero_where_the_layout_has_them(tmp_path: Path) -> None:
    base, a = dense(tmp_path, "base", 0), dense(tmp_path, "a", 1)
    settings = recipe(base, a, base, shared_experts=[{"source_model": a}])
    made = upcycle(settings, tmp_path / "out")
    assert made.layout == "qwen2_moe"
    merged = load_file(tmp_path / "out/model.safetensors")
    assert not merged["model.layers.0.self_attn.q_proj.bias"].any()
    assert merged["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, HIDDEN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts_per_token": 3}, "experts_per_token: found 3, expected at most the 2 experts"),
        ({"gate_mode": "hidden"}, "experts[0].positive_prompts is missing"),
        ({"gate_mod": "hidden"}, "unknown key 'gate_mod' (did you mean 'gate_mode'?)"),
        ({"experts": []}, "experts: list should have at least 1 item"),
        (
            {"experts": [{"source_model": m, "positive_prompts": ["x"]} for m in "ab"],
             "gate_mode": "hidden"},
            "all have the same prompts",
        ),
        (
            {"experts": [{"source_model": "a", "positive_prompts": [p]} for p in "xy"],
             "gate_mode": "hidden"},
            "all are the same model",
        ),
    ],
)  # fmt: skip
def test_recipes_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_moe_recipe({**recipe("base", "a", "b"), **change})
    assert message in str(caught.value)


def test_experts_of_one_model_may_differ_by_noise() -> None:
    prompted = [
        {"source_model": "a", "positive_prompts": [p], "noise_scale": s}
        for p, s in (("x", None), ("y", 0.01))
    ]
    assert load_moe_recipe({"base_model": "a", "experts": prompted}).gate_mode == "hidden"


def test_fused_experts_are_the_others_end_to_end(tmp_path: Path) -> None:
    base, a, b = (dense(tmp_path, name, seed) for seed, name in enumerate(("base", "a", "b")))
    rounded = {
        key: value.astype(np.float16) for key, value in load_file(f"{b}/model.safetensors").items()
    }
    save_file(rounded, f"{b}/model.safetensors")
    settings = recipe(base, a, b)
    settings["experts"][0] |= {"noise_scale": 0.01, "residual_scale": 0.5}
    upcycle(settings, tmp_path / "apart", threads=1)
    upcycle({**settings, "fused_experts": True}, tmp_path / "fused", threads=2)
    apart, fused = (load_file(tmp_path / out / "model.safetensors") for out in ("apart", "fused"))
    for layer in range(2):
        experts = f"model.layers.{layer}.block_sparse_moe.experts"
        w1, w2, w3 = (
            np.stack([apart.pop(f"{experts}.{i}.w{w}.weight") for i in range(2)]) for w in (1, 2, 3)
        )
        place = f"model.layers.{layer}.mlp"
        np.testing.assert_array_equal(
            fused.pop(f"{place}.experts.gate_up_proj"), np.concatenate([w1, w3], axis=1)
        )
        np.testing.assert_array_equal(fused.pop(f"{place}.experts.down_proj"), w2)
        router = apart.pop(f"model.layers.{layer}.block_sparse_moe.gate.weight")
        np.testing.assert_array_equal(fused.pop(f"{place}.gate.weight"), router)
    assert fused.keys() == apart.keys()
    with pytest.raises(RecipeError, match=r"fused_experts: no program reads .* of deepseek_v1"):
        changed = {"fused_experts": True, "architecture": "deepseek_v1"}
        upcycle({**settings, **changed}, tmp_path / "refused")


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, other = dense(tmp_path, "base", 0), dense(tmp_path, "b", 1, inner=6)
    with pytest.raises(CheckpointError, match=r"shape \[8, 6\], expected shape \[8, 12\]"):
        upcycle(recipe(base, base, other), tmp_path / "out")
    gemma = dense(tmp_path, "gemma", 2, family="gemma")
    with pytest.raises(CheckpointError, match="a model of type 'gemma'"):
        upcycle(recipe(gemma, gemma, base), tmp_path / "out")
    with pytest.raises(RecipeError, match="expected at least 2 for deepseek"):
        alone = recipe(base, base, architecture="deepseek", experts_per_token=1)
        upcycle(alone, tmp_path / "out")
    with pytest.raises(RecipeError, match="qwen3_moe takes models of type qwen3"):
        upcycle(recipe(base, base, other, architecture="qwen3_moe"), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_prompts_are_read_through_the_bases_tokenizer(tmp_path: Path) -> None:
    base, a = FOLDER / "mergekit_e2e/inputs/tok_a", FOLDER / "mergekit_e2e/inputs/tok_a"
    settings = recipe(str(base), str(a), str(a), gate_mode="cheap_embed")
    for expert, prompt in zip(settings["experts"], ("the cat", "zebra quiz"), strict=True):
        expert["positive_prompts"] = [prompt]
    settings["experts"][1]["noise_scale"] = 0.0
    settings["experts"][1]["source_model"] = str(base) + "/"
    upcycle(settings, tmp_path / "out")
    rows = load_file(tmp_path / "out/model.safetensors")[
        "model.layers.0.block_sparse_moe.gate.weight"
    ]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)
    assert abs(float(rows[0] @ rows[1])) < 0.999
