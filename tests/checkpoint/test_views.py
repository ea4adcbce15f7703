"""Renamed views, and a LoRA folded in on the fly, against dense float64 references."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fusekit.adapters import adapter_from_tensors, load_adapter
from fusekit.checkpoint.memory import MemorySource
from fusekit.checkpoint.recent import Recent
from fusekit.checkpoint.views import LoraSource, RenamedSource
from fusekit.errors import CheckpointError
from tests.checkpoint.zip_files import read

VECTORS = Path(__file__).parents[1] / "vectors" / "peft-format.safetensors"
PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}


def normal(*shape: int, seed: int = 0, kind: Any = np.float32) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(kind)


def lora(
    module: str, rows: int, columns: int, rank: int = 2, seed: int = 1
) -> dict[str, np.ndarray]:
    return {
        f"{PREFIX}{module}.lora_A.weight": normal(rank, columns, seed=seed),
        f"{PREFIX}{module}.lora_B.weight": normal(rows, rank, seed=seed + 1),
    }


def folded(
    base: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray], **config: Any
) -> LoraSource:
    adapter = adapter_from_tensors(tensors, CONFIG | config, "adapter")
    return LoraSource(MemorySource(base, "base"), adapter)


def product(tensors: Mapping[str, np.ndarray], module: str) -> np.ndarray:
    first = tensors[f"{PREFIX}{module}.lora_A.weight"].astype(np.float64)
    second = tensors[f"{PREFIX}{module}.lora_B.weight"].astype(np.float64)
    return second @ first


def piecewise(source: LoraSource, name: str, step: int) -> np.ndarray:
    info = source.tensors[name]
    out = bytearray(info.nbytes)
    width = info.dtype.itemsize
    for start in reversed(range(0, info.size, step)):
        stop = min(info.size, start + step)
        source.read_into(name, start, stop, memoryview(out)[start * width : stop * width])
    return np.frombuffer(out, info.dtype.numpy).reshape(info.shape)


# ---- renamed ----------------------------------------------------------------------------------


def test_renamed_source_offers_the_same_bytes_under_new_names() -> None:
    source = MemorySource({"a": np.arange(6.0), "b": np.ones(2)}, "base")
    view = RenamedSource(source, {"x.weight": "a"})
    assert list(view.tensors) == ["x.weight"]
    assert view.tensors["x.weight"].name == "x.weight"
    np.testing.assert_array_equal(read(view, "x.weight"), np.arange(6.0))
    assert view.where("x.weight") == "base"


def test_renaming_what_is_not_there_names_the_nearest() -> None:
    source = MemorySource({"model.norm.weight": np.ones(2)}, "base")
    with pytest.raises(CheckpointError, match=r"'norm\.weight'.*nearest is 'model\.norm\.weight'"):
        RenamedSource(source, {"x": "norm.weight"})


# ---- parity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_golden_dense_merges_are_reproduced(case: str) -> None:
    tensors = load_file(VECTORS)
    with safe_open(VECTORS, "np") as file:
        config = json.loads(file.metadata()[case])["adapter_config"]

    def under(prefix: str) -> dict[str, np.ndarray]:
        start = f"{case}/{prefix}/"
        return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}

    base, merged = under("in/base"), under("out/merged")
    source = LoraSource(
        MemorySource(base, "base"), adapter_from_tensors(under("in/adapter"), config)
    )
    assert list(source.tensors) == list(base)
    assert merged
    for name, weight in base.items():
        expected = merged.get(name, weight)
        np.testing.assert_allclose(read(source, name), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(piecewise(source, name, 7), read(source, name))


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / np.sqrt(2)),
        ({"alpha_pattern": {"q": 10}}, 5.0),
        ({"alpha_pattern": {"other": 10}}, 3.0),
    ],
)
def test_scaling_follows_the_config(config: dict[str, Any], scaling: float) -> None:
    tensors = lora("layer.q", 5, 4)
    weight = normal(5, 4)
    source = folded({"layer.q.weight": weight}, tensors, **config)
    expected = weight.astype(np.float64) + scaling * product(tensors, "layer.q")
    np.testing.assert_allclose(read(source, "layer.q.weight"), expected, rtol=1e-6, atol=1e-6)


def test_rank_pattern_is_used_for_its_module() -> None:
    tensors = lora("q", 5, 4, rank=3)
    weight = normal(5, 4)
    source = folded({"q.weight": weight}, tensors, rank_pattern={"q": 3})
    expected = weight.astype(np.float64) + 2.0 * product(tensors, "q")
    np.testing.assert_allclose(read(source, "q.weight"), expected, rtol=1e-6, atol=1e-6)


def test_dora_uses_the_norms_of_the_adapted_base() -> None:
    tensors = lora("q", 5, 4)
    magnitude = np.abs(normal(5, seed=9)) + 1
    tensors[f"{PREFIX}q.lora_magnitude_vector"] = magnitude
    weight = normal(5, 4)
    source = folded({"q.weight": weight}, tensors, use_dora=True)
    adapted = weight.astype(np.float64) + 3.0 * product(tensors, "q")
    expected = magnitude[:, None] * adapted / np.linalg.norm(adapted, axis=1, keepdims=True)
    np.testing.assert_allclose(read(source, "q.weight"), expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(piecewise(source, "q.weight", 3), read(source, "q.weight"))


def test_dora_norms_span_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusekit.checkpoint.views._NORM_ELEMENTS", 9)
    for flag in (False, True):
        tensors = lora("q", 7, 4)
        tensors[f"{PREFIX}q.lora_magnitude_vector"] = np.ones(7, np.float32)
        weight = normal(4, 7) if flag else normal(7, 4)
        source = folded({"q.weight": weight}, tensors, use_dora=True, fan_in_fan_out=flag)
        result = read(source, "q.weight")
        norms = np.linalg.norm(result, axis=0 if flag else 1)
        np.testing.assert_allclose(norms, np.ones(7), rtol=1e-6)


def test_dora_keeps_a_feature_without_norm_at_zero() -> None:
    tensors = lora("q", 3, 2)
    tensors[f"{PREFIX}q.lora_B.weight"][1] = 0
    tensors[f"{PREFIX}q.lora_magnitude_vector"] = np.ones(3, np.float32)
    weight = normal(3, 2)
    weight[1] = 0
    source = folded({"q.weight": weight}, tensors, use_dora=True)
    assert read(source, "q.weight")[1].tolist() == [0, 0]


def test_adapted_bias_is_scaled_too() -> None:
    tensors = lora("q", 5, 4) | {f"{PREFIX}q.lora_B.bias": normal(5, seed=3)}
    base = {"q.weight": normal(5, 4), "q.bias": normal(5, kind=np.float16)}
    source = folded(base, tensors, lora_bias=True)
    assert source.tensors["q.bias"].dtype.name == "F32"
    expected = base["q.bias"] + 3.0 * tensors[f"{PREFIX}q.lora_B.bias"].astype(np.float64)
    np.testing.assert_allclose(piecewise(source, "q.bias", 2), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "offered"),
    [
        (np.float16, "F32"),
        (ml_dtypes.bfloat16, "F32"),
        (np.float32, "F32"),
        (np.float64, "F64"),
    ],
)
def test_changed_tensors_keep_full_precision_and_others_their_type(kind: Any, offered: str) -> None:
    base = {"q.weight": normal(64, 48, kind=kind), "k.weight": normal(3, 3, kind=kind)}
    tensors = lora("q", 64, 48)
    source = folded(base, tensors)
    assert source.tensors["q.weight"].dtype.name == offered
    assert read(source, "k.weight").dtype == base["k.weight"].dtype
    np.testing.assert_array_equal(read(source, "k.weight"), base["k.weight"])
    expected = base["q.weight"].astype(np.float64) + 3.0 * product(tensors, "q")
    tolerance = 1e-14 if offered == "F64" else 1e-6
    np.testing.assert_allclose(
        read(source, "q.weight"), expected, rtol=tolerance, atol=tolerance * 4
    )


def test_stacked_experts_get_their_own_factors() -> None:
    experts, rows, columns, rank = 3, 5, 4, 2
    A, B = normal(experts * rank, columns, seed=1), normal(rows, experts * rank, seed=2)
    tensors = {f"{PREFIX}mlp.experts.lora_A.weight": A, f"{PREFIX}mlp.experts.lora_B.weight": B}
    per_expert = np.einsum(
        "ore,eri->eoi",
        B.reshape(rows, rank, experts).astype(np.float64),
        A.reshape(experts, rank, columns),
    )
    config = {"target_parameters": ["mlp.experts.down_proj"]}
    for transposed in (False, True):
        delta = per_expert.transpose(0, 2, 1) if transposed else per_expert
        weight = normal(*delta.shape)
        source = folded({"mlp.experts.down_proj": weight}, tensors, **config)
        found = piecewise(source, "mlp.experts.down_proj", 7)
        np.testing.assert_allclose(found, weight + 3.0 * delta, rtol=1e-5, atol=1e-5)


# ---- properties -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 1500),
    rank=st.integers(1, 5),
    transposed=st.booleans(),
    cuts=st.lists(st.floats(0, 1), max_size=4),
)
def test_values_do_not_depend_on_how_a_tensor_is_cut(
    rows: int, columns: int, rank: int, transposed: bool, cuts: list[float]
) -> None:
    tensors = lora("q", rows, columns, rank)
    shape = (columns, rows) if transposed else (rows, columns)
    source = folded({"q.weight": normal(*shape)}, tensors, r=rank, fan_in_fan_out=transposed)
    size = rows * columns
    out = bytearray(size * 4)
    edges = [0, *sorted(int(cut * size) for cut in cuts), size]
    for start, stop in itertools.pairwise(edges):
        source.read_into("q.weight", start, stop, memoryview(out)[start * 4 : stop * 4])
    assert bytes(out) == read(source, "q.weight").tobytes()


def test_a_zero_update_leaves_the_base_bit_for_bit() -> None:
    tensors = lora("q", 8, 8)
    tensors[f"{PREFIX}q.lora_B.weight"][:] = 0
    weight = normal(8, 8)
    assert read(folded({"q.weight": weight}, tensors), "q.weight").tobytes() == weight.tobytes()


def test_threads_get_the_same_bytes() -> None:
    base = {f"{i}.weight": normal(40, 30, seed=i) for i in range(40)}
    tensors = {k: v for i in range(40) for k, v in lora(str(i), 40, 30, seed=i).items()}
    tensors |= {f"{PREFIX}{i}.lora_magnitude_vector": np.ones(40, np.float32) for i in range(40)}
    source = folded(base, tensors, use_dora=True)
    expected = {name: read(source, name).tobytes() for name in base}
    with ThreadPoolExecutor(8) as pool:
        names = [name for name in base for _ in range(4)]
        for name, found in zip(
            names, pool.map(lambda n: read(source, n).tobytes(), names), strict=True
        ):
            assert found == expected[name]


# ---- replacements and names -------------------------------------------------------------------


def test_saved_modules_replace_the_base_before_the_update() -> None:
    tensors = lora("lm_head", 6, 4) | {
        f"{PREFIX}lm_head.base_layer.weight": normal(6, 4, seed=8),
        f"{PREFIX}score.weight": normal(2, 4, seed=9, kind=np.float16),
        f"{PREFIX}q.bias": normal(3, seed=10),
    }
    base = {"q.bias": normal(3), "lm_head.weight": normal(5, 4)}
    source = folded(base, tensors, modules_to_save=["score"], bias="all")
    assert list(source.tensors) == ["q.bias", "lm_head.weight", "score.weight"]
    assert source.tensors["lm_head.weight"].shape == (6, 4)
    np.testing.assert_array_equal(read(source, "q.bias"), tensors[f"{PREFIX}q.bias"])
    np.testing.assert_array_equal(
        piecewise(source, "score.weight", 3), normal(2, 4, seed=9, kind=np.float16)
    )
    expected = normal(6, 4, seed=8) + 3.0 * product(tensors, "lm_head")
    np.testing.assert_allclose(read(source, "lm_head.weight"), expected, rtol=1e-5, atol=1e-6)
    assert source.where("score.weight") == "adapter"


@pytest.mark.parametrize(
    ("adapted", "offered"),
    [
        ("transformer.h.0.attn", "h.0.attn"),
        ("encoder.layer.0.q", "bert.encoder.layer.0.q"),
        ("model.layers.0.q", "model.layers.0.q"),
    ],
)
def test_one_leading_prefix_may_differ_from_the_base(adapted: str, offered: str) -> None:
    base = {f"{offered}.weight": normal(5, 4), "lm_head.weight": normal(5, 4)}
    tensors = lora(adapted, 5, 4) | lora("lm_head", 5, 4)
    source = folded(base, tensors)
    assert list(source.tensors) == list(base)
    expected = base[f"{offered}.weight"] + 3.0 * product(tensors, adapted)
    np.testing.assert_allclose(read(source, f"{offered}.weight"), expected, rtol=1e-5, atol=1e-6)


def base_of(**tensors: np.ndarray) -> dict[str, np.ndarray]:
    return {name.replace("_", "."): array for name, array in tensors.items()}


@pytest.mark.parametrize(
    ("base", "tensors", "config", "problem"),
    [
        (
            base_of(layers_0_q_weight=normal(5, 4)),
            lora("layers.0.w", 5, 4),
            {},
            r"adapts tensor 'layers\.0\.w\.weight'.*the nearest is 'layers\.0\.q\.weight'",
        ),
        (base_of(q_weight=normal(5, 5)), lora("q", 5, 4), {}, r"\[5, 4\], the base has \[5, 5\]"),
        (base_of(q_weight=np.ones((5, 4), np.int8)), lora("q", 5, 4), {}, "is I8: a LoRA can only"),
        (
            base_of(q_weight=normal(5, 4).astype(ml_dtypes.float8_e4m3fn)),
            lora("q", 5, 4),
            {},
            "is F8_E4M3: a LoRA can only be folded into F16, BF16, F32, F64; dequantise",
        ),
        (
            base_of(q_weight=normal(5, 4)),
            lora("q", 5, 4) | {f"{PREFIX}q.lora_B.bias": normal(5)},
            {"lora_bias": True},
            r"module 'q\.weight' changes a bias of 5 elements.*no such tensor 'q\.bias'",
        ),
        (
            base_of(q_weight=normal(5, 4)),
            lora("q", 5, 4) | {f"{PREFIX}head.weight": normal(2, 4)},
            {},
            r"adapts tensor 'head\.weight', which is not there",
        ),
        (
            base_of(q_weight=normal(5, 4), q_bias=normal(5)),
            lora("q", 5, 4) | {f"{PREFIX}q.bias": normal(6)},
            {"bias": "all"},
            r"tensor 'q\.bias' has shape \[6\], base has \[5\]",
        ),
        (
            base_of(q_weight=normal(5, 4)),
            lora("q", 5, 4) | {f"{PREFIX}q.lora_A.weight": np.full((2, 4), np.nan, np.float32)},
            {},
            "holds 8 NaN or Inf values",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused_when_opened(
    base: dict[str, np.ndarray],
    tensors: dict[str, np.ndarray],
    config: dict[str, Any],
    problem: str,
) -> None:
    with pytest.raises(CheckpointError, match=problem):
        folded(base, tensors, **config)


def test_adapter_folder_on_disk_and_its_identity(tmp_path: Path) -> None:
    tensors = lora("q", 5, 4)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    base = MemorySource({"q.weight": normal(5, 4)}, "base")
    source = LoraSource(base, load_adapter(tmp_path, base.tensors))
    assert source.label == f"base+{tmp_path}"
    expected = normal(5, 4) + 3.0 * product(tensors, "q")
    np.testing.assert_allclose(read(source, "q.weight"), expected, rtol=1e-5, atol=1e-6)
    identity = json.loads(json.dumps(source.identity()))
    assert [Path(file["path"]).name for file in identity["adapter"]["files"]] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


# ---- the cache underneath ---------------------------------------------------------------------


def test_recent_makes_a_value_once_for_all_threads() -> None:
    recent: Recent[str, int] = Recent(2)
    gate, calls = threading.Event(), []

    def make() -> int:
        calls.append(1)
        gate.wait(5)
        return 7

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(recent.get, "a", make) for _ in range(4)]
        gate.set()
        assert [future.result() for future in futures] == [7] * 4
    assert len(calls) == 1


def test_recent_forgets_the_oldest_and_what_failed() -> None:
    recent: Recent[str, str] = Recent(2)

    def constant(value: str) -> Callable[[], str]:
        return lambda: value

    for key in ("a", "b", "a", "c"):
        recent.get(key, constant(key))
    assert ("a" in recent, "b" in recent, "c" in recent) == (True, False, True)

    def fail() -> str:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        recent.get("d", fail)
    assert recent.get("d", constant("d")) == "d"
