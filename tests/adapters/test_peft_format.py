from __future__ import annotations

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fusekit.adapters import (
    Adapter,
    LoraModule,
    MergeOptions,
    adapter_from_tensors,
    load_adapter,
    merge_adapters,
    pack_adapters,
    write_adapter,
)
from fusekit.adapters.peft_format import read_array
from fusekit.checkpoint.memory import MemorySource
from fusekit.checkpoint.views import LoraSource
from fusekit.errors import CheckpointError, FusekitError

from .support import load_vectors, make_adapter, make_module, random_adapter, under

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}


def factors(rank=2, rows=3, columns=5, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((rank, columns)).astype(np.float32),
        rng.standard_normal((rows, rank)).astype(np.float32),
    )


def save_folder(folder, tensors, config=CONFIG):
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def simple_tensors(**extra):
    A, B = factors()
    return {
        "base_model.model.q.lora_A.weight": A,
        "base_model.model.q.lora_B.weight": B,
        **extra,
    }


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_folding_in_an_adapter_equals_the_dense_merge(case):
    tensors, cases = load_vectors("peft-format")
    adapter = adapter_from_tensors(
        under(tensors, f"{case}/in/adapter/"), cases[case]["adapter_config"]
    )
    base = under(tensors, f"{case}/in/base/")
    merged = under(tensors, f"{case}/out/merged/")
    assert set(adapter.changed_tensors()) == set(merged)
    for name, weight in base.items():
        expected = merged.get(name, weight)
        np.testing.assert_allclose(adapter.apply(name, weight), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_writing_keeps_every_tensor_and_scaling(case, tmp_path):
    tensors, cases = load_vectors("peft-format")
    before = adapter_from_tensors(
        under(tensors, f"{case}/in/adapter/"), cases[case]["adapter_config"]
    )
    write_adapter(before, tmp_path / "out")
    after = load_adapter(tmp_path / "out")
    on_disk = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, tensor in under(tensors, f"{case}/in/adapter/").items():
        np.testing.assert_array_equal(on_disk[key], tensor)
    assert len(on_disk) == len(under(tensors, f"{case}/in/adapter/"))
    assert {n: m.scaling for n, m in before.modules.items()} == {
        n: m.scaling for n, m in after.modules.items()
    }


def test_different_ranks_and_alphas_are_written_as_exact_patterns(tmp_path):
    long_a, long_b = factors(rank=4)
    short_a, short_b = factors(rank=2)
    adapter = make_adapter(
        make_module("b.c.weight", short_a, short_b, 0.3),
        make_module("a.b.c.weight", long_a, long_b, 2.0),
    )
    write_adapter(adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["rank_pattern"] == {r"^b\.c": 2}
    again = load_adapter(tmp_path / "out")
    assert [m.rank for m in again.modules.values()] == [2, 4]
    assert again.modules["b.c.weight"].scaling == adapter.modules["b.c.weight"].scaling


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_half_precision_survives_a_round_trip(dtype, tmp_path):
    adapter = random_adapter(1, {"q.weight": (6, 5)}, dtype=dtype)
    write_adapter(adapter, tmp_path / "out")
    again = load_adapter(tmp_path / "out").modules["q.weight"]
    assert again.A.dtype == dtype
    np.testing.assert_array_equal(again.A, adapter.modules["q.weight"].A)


def test_rslora_divides_alpha_by_the_root_of_the_rank(tmp_path):
    folder = save_folder(tmp_path / "a", simple_tensors(), {**CONFIG, "use_rslora": True})
    assert load_adapter(folder).modules["q.weight"].scaling == pytest.approx(4 / 2**0.5)


def test_bias_is_scaled_and_padded_where_peft_demands_it(tmp_path):
    A, B = factors()
    bias = np.arange(3, dtype=np.float32)
    adapter = make_adapter(
        make_module("p.weight", A, B, 2.0, bias=bias), make_module("q.weight", A, B, 2.0)
    )
    np.testing.assert_array_equal(adapter.apply("p.bias", np.ones(3, np.float32)), 1 + 2 * bias)
    write_adapter(adapter, tmp_path / "out")
    on_disk = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["lora_bias"] is True
    np.testing.assert_array_equal(on_disk["base_model.model.q.lora_B.bias"], np.zeros(3))


def test_experts_of_a_raw_parameter_get_their_own_product():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((6, 5)).astype(np.float32)
    B = rng.standard_normal((4, 6)).astype(np.float32)
    adapter = adapter_from_tensors(
        {
            "base_model.model.l.experts.lora_A.weight": A,
            "base_model.model.l.experts.lora_B.weight": B,
        },
        {**CONFIG, "target_modules": None, "target_parameters": ["experts.up"]},
    )
    module = adapter.modules["l.experts.up"]
    assert (module.experts, module.rank, module.scaling) == (3, 2, 2.0)
    for layout in ((3, 4, 5), (3, 5, 4)):
        update = module.apply(np.zeros(layout, np.float32))
        for expert in range(3):
            product = 2.0 * B.reshape(4, 2, 3)[:, :, expert] @ A.reshape(3, 2, 5)[expert]
            expected = product if layout == (3, 4, 5) else product.T
            np.testing.assert_allclose(update[expert], expected, rtol=1e-5)


def test_in_memory_keys_with_an_adapter_name_are_understood():
    A, B = factors()
    adapter = adapter_from_tensors(
        {
            "base_model.model.q.lora_A.default.weight": A,
            "base_model.model.q.lora_B.default.weight": B,
            "base_model.model.head.modules_to_save.default.weight": B,
        },
        CONFIG,
    )
    assert list(adapter.modules) == ["q.weight"]
    assert list(adapter.replacements) == ["head.weight"]


def test_kohya_names_are_mapped_with_the_base_and_scaled_by_alpha(tmp_path):
    A, B = factors()
    save_file(
        {
            "lora_unet_down_blocks_0_to_q.lora_down.weight": A,
            "lora_unet_down_blocks_0_to_q.lora_up.weight": B,
            "lora_unet_down_blocks_0_to_q.alpha": np.array(1.0, np.float32),
        },
        tmp_path / "kohya.safetensors",
    )
    names = ["down_blocks.0.to_q.weight", "down_blocks.0.to_k.weight"]
    adapter = load_adapter(tmp_path / "kohya.safetensors", names)
    assert list(adapter.modules) == ["down_blocks.0.to_q.weight"]
    np.testing.assert_allclose(
        adapter.modules["down_blocks.0.to_q.weight"].delta(), 0.5 * B @ A, rtol=1e-6
    )
    with pytest.raises(CheckpointError, match="no tensor of the base is named like"):
        load_adapter(tmp_path / "kohya.safetensors", ["other.weight"])


def lycoris(tmp_path, kernel=(), *, scale=None, middle=False, rank=2, rows=6, columns=5):
    """A file of one module, the base's weight, and the adapted weight in float64 by its formula."""
    rng = np.random.default_rng(0)
    ones = (1,) * len(kernel)
    tensors = {
        "lora_unet_conv.lora_up.weight": rng.standard_normal((rows, rank, *ones)),
        "lora_unet_conv.alpha": np.array(1.0),
    }
    up = tensors["lora_unet_conv.lora_up.weight"].reshape(rows, rank)
    if middle:
        down = rng.standard_normal((rank, columns, *ones))
        between = rng.standard_normal((rank, rank, *kernel))
        tensors["lora_unet_conv.lora_mid.weight"] = between
        product = np.einsum("ij...,jc,oi->oc...", between, down.reshape(rank, columns), up)
    else:
        down = rng.standard_normal((rank, columns, *kernel))
        product = np.einsum("ic...,oi->oc...", down, up)
    tensors["lora_unet_conv.lora_down.weight"] = down
    weight = rng.standard_normal((rows, columns, *kernel))
    adapted = weight + product / rank
    if scale is not None:
        axis = {"output": 0, "input": 1}[scale]
        others = tuple(a for a in range(adapted.ndim) if a != axis)
        norms = np.linalg.norm(
            np.moveaxis(adapted, axis, 0).reshape(adapted.shape[axis], -1), axis=1
        )
        magnitude = np.expand_dims(rng.random(adapted.shape[axis]) + 0.5, others)
        tensors["lora_unet_conv.dora_scale"] = magnitude
        adapted = adapted * magnitude / np.expand_dims(norms, others)
    path = tmp_path / "lycoris.safetensors"
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, path)
    return path, weight.astype(np.float32), adapted


@pytest.mark.parametrize("scale", [None, "output", "input"])
@pytest.mark.parametrize(
    ("kernel", "middle"),
    [((), False), *((k, m) for k in ((3, 3), (1, 1), (3,)) for m in (False, True))],
)
def test_dora_and_middle_factors_of_kohyas_format_mean_what_its_tools_compute(
    kernel, scale, middle, tmp_path
):
    path, weight, expected = lycoris(tmp_path, kernel, scale=scale, middle=middle)
    base = MemorySource({"conv.weight": weight})
    adapter = load_adapter(path, ["conv.weight"])
    np.testing.assert_allclose(adapter.apply("conv.weight", weight), expected, atol=1e-5)
    streamed = read_array(LoraSource(base, adapter), "conv.weight")
    np.testing.assert_allclose(streamed, expected, atol=1e-5)
    rank = min(6, weight[0].size)
    merged = merge_adapters([adapter, adapter], "svd", [0.5, 0.5], MergeOptions(rank=rank), base)
    np.testing.assert_allclose(merged.apply("conv.weight", weight), expected, atol=1e-4)
    write_adapter(merged, tmp_path / "out")
    again = load_adapter(tmp_path / "out").apply("conv.weight", weight)
    np.testing.assert_allclose(again, expected, atol=1e-4)


def test_dora_of_input_features_cannot_be_written_for_peft(tmp_path):
    path, _, _ = lycoris(tmp_path, scale="input")
    with pytest.raises(
        CheckpointError, match="'conv' has DoRA over its input features, which PEFT"
    ):
        write_adapter(load_adapter(path, ["conv.weight"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path, weight, expected = lycoris(tmp_path, scale="output")
    write_adapter(load_adapter(path, ["conv.weight"]), tmp_path / "out")
    written = load_adapter(tmp_path / "out")
    np.testing.assert_allclose(written.apply("conv.weight", weight), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "lora_mid.weight",
            (3, 2, 3, 3),
            r"shape \[3, 2, 3, 3\], expected \[2, 2, kernel\] between",
        ),
        (
            "dora_scale",
            (4, 1),
            r"'lora_unet_conv\.dora_scale' has shape \[4, 1\], expected 6 elements",
        ),
        ("hada_w1_a", (4, 4), "belongs to LoHa: not supported"),
        ("lokr_w1", (4, 4), "belongs to LoKr: not supported"),
    ],
)
def test_what_kohyas_format_cannot_mean_is_refused(name, shape, message, tmp_path):
    path, _, _ = lycoris(tmp_path)
    tensors = load_file(path) | {f"lora_unet_conv.{name}": np.ones(shape, np.float32)}
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(path, ["conv.weight"])


@pytest.mark.parametrize("use", ["write", "merge", "pack"])
def test_flattened_names_are_looked_at_but_not_passed_on(use, tmp_path):
    path, _, _ = lycoris(tmp_path)
    adapter = load_adapter(path)
    assert list(adapter.modules) == ["conv.weight"]
    with pytest.raises(
        CheckpointError, match=r"module 'conv' is named as kohya's .* expected a base"
    ):
        if use == "write":
            write_adapter(adapter, tmp_path / "out")
        elif use == "merge":
            merge_adapters([adapter, adapter], "cat")
        else:
            pack_adapters({"x": adapter}, tmp_path / "out", directions=1)
    assert not (tmp_path / "out").exists()


def kohya_file(path, **modules):
    """A file of rank-2 LoRA for flattened module names, with an alpha of 2."""
    A, B = factors()
    tensors = {}
    for name in modules.values():
        tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
        tensors[f"{name}.alpha"] = np.array(2.0, np.float32)
    save_file(tensors, path)
    return path


def test_of_a_pipelines_lora_the_part_of_the_base_is_taken(tmp_path):
    path = kohya_file(
        tmp_path / "k.safetensors",
        unet="lora_unet_down_blocks_0_to_q",
        first="lora_te1_text_model_encoder_layers_0_mlp_fc1",
        second="lora_te2_text_model_encoder_layers_1_mlp_fc1",
    )
    unet = load_adapter(path, ["down_blocks.0.to_q.weight"])
    assert list(unet.modules) == ["down_blocks.0.to_q.weight"]
    assert unet.left_out == {"te1": 3, "te2": 3}
    layers = [f"text_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(2)]
    assert list(load_adapter(path, layers[:1]).modules) == layers[:1]
    with pytest.raises(CheckpointError, match=r"the base's names fit te1, te2: .*component='te1'"):
        load_adapter(path, layers)
    chosen = load_adapter(path, layers, component="te2")
    assert list(chosen.modules) == layers[1:]
    with pytest.raises(CheckpointError, match="fit none of them"):
        load_adapter(path, ["other.weight"])
    with pytest.raises(CheckpointError, match=r"several models \(te1, te2, unet\): give the base"):
        load_adapter(path)
    with pytest.raises(CheckpointError, match=r"no component 'te3' \(did you mean"):
        load_adapter(path, layers, component="te3")


def test_diffusers_components_are_told_apart_too(tmp_path):
    A, B = factors()
    stems = ("unet.mid.to_q", "text_encoder.text_model.fc1")
    parts = {f"{s}.lora_{f}.weight": x for s in stems for f, x in (("A", A), ("B", B))}
    save_file(parts, tmp_path / "lora.safetensors")
    adapter = load_adapter(tmp_path / "lora.safetensors", ["text_model.fc1.weight"])
    assert list(adapter.modules) == ["text_model.fc1.weight"]
    assert adapter.left_out == {"unet": 2}
    with pytest.raises(CheckpointError, match="several models"):
        load_adapter(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("stem", "module"),
    [
        ("unet.mid.attn.to_q.lora_A.weight", "mid.attn.to_q"),
        ("unet.mid.attn.processor.to_out_lora.down.weight", "mid.attn.to_out.0"),
        ("transformer.blocks.0.ff.lora.down.weight", "blocks.0.ff"),
    ],
)
def test_diffusers_names_lose_their_component(stem, module, tmp_path):
    A, B = factors()
    up = stem.replace("lora_A", "lora_B").replace(".down.", ".up.")
    save_file({stem: A, up: B}, tmp_path / "lora.safetensors")
    adapter = load_adapter(tmp_path / "lora.safetensors")
    assert list(adapter.modules) == [f"{module}.weight"]
    assert adapter.modules[f"{module}.weight"].scaling == 1.0


def test_gpt2_keeps_its_transformer_prefix_when_the_base_has_it(tmp_path):
    A, B = factors()
    stem = "transformer.h.0.attn.c_attn.lora"
    save_file({f"{stem}_A.weight": A, f"{stem}_B.weight": B}, tmp_path / "lora.safetensors")
    base = ["transformer.h.0.attn.c_attn.weight"]
    assert list(load_adapter(tmp_path / "lora.safetensors", base).modules) == base


def test_the_layout_follows_the_base_when_the_flag_is_wrong():
    A, B = factors(rows=3, columns=5)
    module = make_module("q.weight", A, B, transposed=True)
    np.testing.assert_allclose(module.apply(np.zeros((3, 5), np.float32)), B @ A, rtol=1e-6)
    with pytest.raises(CheckpointError, match=r"'q.weight'.*\[5, 3\].*\[4, 4\].*another base"):
        module.apply(np.zeros((4, 4), np.float32))


def test_a_dead_row_stays_dead_under_dora():
    A, B = factors()
    B[1] = 0
    module = make_module("q.weight", A, B, magnitude=np.ones(3, np.float32))
    weight = np.ones((3, 5), np.float32)
    weight[1] = 0
    assert np.all(module.apply(weight)[1] == 0)
    np.testing.assert_allclose(np.linalg.norm(module.apply(weight)[[0, 2]], axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA', expected 'LORA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "relative to a modified base"),
        ({"r": 4}, "module 'q' has rank 2 in its tensors, adapter_config.json says 4"),
        ({"rank_pattern": {"q": 3}}, "adapter_config.json says 3"),
        ({"r": "2"}, "r is '2', expected a number"),
        ({"lora_alpha": [4]}, "lora_alpha is [4], expected a number"),
        ({"rank_pattern": ["q"]}, "rank_pattern is ['q'], expected an object"),
        ({"alpha_pattern": {"q(": 3}}, "alpha_pattern has 'q(': 3, expected a pattern"),
        ({"target_parameters": {"q": 1}}, "expected a list of names"),
        ({"modules_to_save": [1]}, "modules_to_save is [1], expected a list of names"),
    ],
)
def test_configs_that_cannot_be_honoured_are_refused(change, message, tmp_path):
    folder = save_folder(tmp_path / "a", simple_tensors(), {**CONFIG, **change})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"base_model.model.k.lora_A.weight": np.ones((2, 5), "f4")}, "'k' has no lora_B"),
        ({"base_model.model.k.lora_E.weight": np.ones((2, 5), "f4")}, "unknown suffix"),
        ({"base_model.model.q.lora_A.b.weight": np.ones((2, 5), "f4")}, "same part of one module"),
        (
            {"base_model.model.q.lora_magnitude_vector": np.ones(4, "f4")},
            "has shape [4], expected 3 elements",
        ),
    ],
)
def test_malformed_tensors_are_refused(extra, message, tmp_path):
    folder = save_folder(tmp_path / "a", simple_tensors(**extra))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_adapter(folder)


def test_unmerged_shards_are_explained(tmp_path):
    tensors = simple_tensors()
    tensors["base_model.model.q.lora_A.weight"] = np.zeros(0, np.float32)
    with pytest.raises(CheckpointError, match="ZeRO-3 or FSDP"):
        load_adapter(save_folder(tmp_path / "a", tensors))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_non_finite_values_are_reported_with_their_tensor(dtype):
    A, B = (factor.astype(dtype) for factor in factors())
    A[0, 1], A[1, 2] = np.nan, np.inf
    adapter = adapter_from_tensors(
        {"base_model.model.q.lora_A.weight": A, "base_model.model.q.lora_B.weight": B}, CONFIG
    )
    with pytest.raises(CheckpointError, match=r"'base_model.model.q.lora_A.weight' holds 2 NaN"):
        adapter.modules["q.weight"]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_adapter(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"expected adapter_model\.safetensors"):
        load_adapter(tmp_path)


def test_writing_refuses_what_peft_could_not_load(tmp_path):
    A, B = factors()
    mixed = make_adapter(
        make_module("p.weight", A, B, magnitude=np.ones(3, "f4")), make_module("q.weight", A, B)
    )
    with pytest.raises(CheckpointError, match="'q' has no DoRA magnitudes while others have"):
        write_adapter(mixed, tmp_path / "mixed")
    with pytest.raises(CheckpointError, match="no module has an update"):
        write_adapter(Adapter("memory", {}, {}, {}), tmp_path / "empty")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(FusekitError, match="already exists"):
        write_adapter(random_adapter(1, {"q.weight": (3, 3)}), tmp_path / "taken")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FusekitError, match="file: is a file, expected a folder or nothing"):
        write_adapter(random_adapter(1, {"q.weight": (3, 3)}), tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "kept"


def test_an_adapter_without_tensors_is_refused(tmp_path):
    write_adapter(random_adapter(1, {"q.weight": (3, 3)}), tmp_path / "a")
    save_file({}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="a: holds no tensors, expected the factors of a"):
        load_adapter(tmp_path / "a")


def test_modules_to_save_are_named_by_the_hint_that_covers_them(tmp_path):
    A, B = factors()
    adapter = Adapter(
        "memory",
        {"q.weight": LoraModule("q.weight", A, B, alpha=2)},
        {
            "net.classifier.dense.weight": B,
            "net.classifier.out.bias": B[0],
            "q.bias": B[:, 0],
            "norm.weight": B[0],
        },
        {"modules_to_save": ["classifier"], "bias": "lora_only"},
    )
    write_adapter(adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "norm"]
    again = load_adapter(tmp_path / "out")
    assert set(again.replacements) == set(adapter.replacements)
    on_disk = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert "base_model.model.q.base_layer.bias" in on_disk
