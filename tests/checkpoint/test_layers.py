"""Layers read off tensor names."""

from __future__ import annotations

import pytest

from fusekit.checkpoint.layers import infer_layers


@pytest.mark.parametrize(
    ("name", "stack", "index"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers", 3),
        ("model.layers.3.mlp.experts.7.w1.weight", "model.layers", 3),
        ("bert.encoder.layer.11.output.dense.bias", "bert.encoder.layer", 11),
        ("transformer.h.0.ln_1.weight", "transformer.h", 0),
        ("0.auto_model.encoder.layer.2.output.weight", "0.auto_model.encoder.layer", 2),
        ("2.weight", "", 2),
        ("model.layers.05.x", "model.layers", 5),
    ],
)
def test_the_outermost_number_after_a_name_is_the_layer(name: str, stack: str, index: int) -> None:
    layer = infer_layers([name])[name]
    assert layer is not None
    assert (layer.stack, layer.index) == (stack, index)


@pytest.mark.parametrize("wrapper", ["module.0", "model.wrapped.0", "stages.0"])
def test_a_single_wrapper_that_is_numbered_is_no_layer(wrapper: str) -> None:
    blocks = [f"{wrapper}.layers.{i}.mlp.{j}.w" for i in range(3) for j in (0, 2)]
    layers = infer_layers([*blocks, f"{wrapper}.norm.weight", "head.weight"])
    assert [layer.rank for name in blocks if (layer := layers[name])] == [0, 0, 1, 1, 2, 2]
    assert layers[f"{wrapper}.norm.weight"] is None


def test_numbers_inside_blocks_stay_inside() -> None:
    names = [f"model.layers.0.mlp.experts.{i}.layers.{j}.w" for i in range(4) for j in range(2)]
    several = [f"stages.{i}.blocks.{j}.w" for i in range(2) for j in range(3)]
    layers = infer_layers([*names, *several])
    assert {layer.stack for layer in layers.values() if layer} == {"model.layers", "stages"}


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.embed_tokens.weight", "w1", "conv2d.weight", "a.3", "7"]
)
def test_tensors_outside_numbered_blocks_have_no_layer(name: str) -> None:
    assert infer_layers([name])[name] is None


def test_ranks_follow_the_numbers_present_and_positions_run_from_0_to_1() -> None:
    names = [f"model.layers.{i}.w" for i in (10, 0, 5)]
    layers = infer_layers([*names, "model.layers.5.b", "norm"])
    found = {name: (layer.rank, layer.position) for name, layer in layers.items() if layer}
    assert found == {
        "model.layers.10.w": (2, 1.0),
        "model.layers.0.w": (0, 0.0),
        "model.layers.5.w": (1, 0.5),
        "model.layers.5.b": (1, 0.5),
    }


def test_every_stack_counts_for_itself() -> None:
    layers = infer_layers(["enc.0.w", "enc.1.w", "dec.0.w", "dec.1.w", "dec.2.w"])
    depths = {name: layer.depth for name, layer in layers.items() if layer}
    assert depths == {"enc.0.w": 2, "enc.1.w": 2, "dec.0.w": 3, "dec.1.w": 3, "dec.2.w": 3}


def test_a_stack_of_one_block_is_at_the_end() -> None:
    (layer,) = infer_layers(["h.0.w"]).values()
    assert layer is not None
    assert layer.position == 1.0
