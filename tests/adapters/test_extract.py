from __future__ import annotations

import json
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.adapters import ExtractOptions, extract_adapter, load_adapter
from fusekit.adapters.extract import as_matrix, decompose, low_rank_residual, twin_rank
from fusekit.adapters.linalg import energy_rank, randomized_svd
from fusekit.checkpoint.memory import MemorySource
from fusekit.errors import CheckpointError, FusekitError

from .support import load_vectors, under


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_golden_truncation_energy_and_randomized(case):
    tensors, cases = load_vectors("lora-extract")
    meta, tensors = cases[case], under(tensors, f"{case}/")
    role = "embedding" if meta["transpose_embedding"] else "linear"
    delta = as_matrix(tensors["in/finetuned"] - tensors["in/base"], role)
    options = ExtractOptions(rank=meta["max_rank"], sv_epsilon=meta["sv_epsilon"], svd="exact")
    found = decompose(delta, options)
    assert len(found.S) == tensors["out/exact/rank"]
    A, B = found.factors()
    np.testing.assert_allclose(B @ A, tensors["out/exact/delta"], atol=1e-4)
    np.testing.assert_allclose(
        np.linalg.norm(A, axis=1), tensors["out/exact/absA_norms"], atol=1e-4
    )
    np.testing.assert_allclose(
        np.linalg.norm(B, axis=0), tensors["out/exact/absB_norms"], atol=1e-4
    )
    values = np.linalg.svd(delta, compute_uv=False)
    np.testing.assert_allclose(values, tensors["out/singular_values"], atol=1e-4)
    assert energy_rank(values, meta["energy"]) == tensors["out/energy_rank"]
    rough = randomized_svd(
        delta, meta["max_rank"], iterations=meta["rsvd"]["niter"], omega=tensors["in/omega"]
    )
    np.testing.assert_allclose((rough.U * rough.S) @ rough.Vt, tensors["out/rsvd/delta"], atol=1e-4)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_golden_conventions_of_the_common_tool(case):
    tensors, cases = load_vectors("extract-lora")
    meta, tensors = cases[case], under(tensors, f"{case}/")
    role = "embedding" if meta["transpose_for_embedding"] else "linear"
    delta = as_matrix(tensors["in/model/w"] - tensors["in/base/w"], role)
    found = decompose(delta, ExtractOptions(rank=meta["max_rank"], svd="exact"))
    A, B = found.factors("balanced" if meta["distribute_scale"] else "right")
    np.testing.assert_allclose(B @ A, tensors["out/product_BA"], atol=2e-6)
    np.testing.assert_allclose(np.abs(A), np.abs(tensors["out/lora_A"]), atol=1e-4)
    np.testing.assert_allclose(np.abs(B), np.abs(tensors["out/lora_B"]), atol=1e-4)
    assert np.all(A[np.arange(len(A)), np.abs(A).argmax(axis=1)] > 0)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_golden_layer_residuals_of_a_shared_block(case):
    tensors, cases = load_vectors("relaxed-recursive")
    meta, tensors = cases[case], under(tensors, f"{case}/")
    checked = 0
    for key, expected in tensors.items():
        match = re.fullmatch(r"out/(\w+)/lora\.(\d+)\.(.+)\.delta", key)
        if match is None:
            continue
        init, layer, module = match[1], int(match[2]), match[3]
        shared = tensors[f"out/{init}/shared.{layer % meta['K_block']}.{module}.weight"]
        A, B = low_rank_residual(
            tensors[f"in/layers.{layer}.{module}.weight"], shared, meta["rank"]
        )
        np.testing.assert_allclose(B @ A, expected, atol=1e-4)
        checked += 1
    assert checked


@pytest.mark.parametrize("case", ["case0", "case2"])
def test_golden_low_rank_twins(case):
    tensors, cases = load_vectors("twin-merging")
    meta, tensors = cases[case], under(tensors, f"{case}/")
    for index in range(meta["n_models"]):
        for name, twin in under(tensors, f"out/twin{index}/").items():
            if twin.ndim != 2:
                continue
            rank = twin_rank(twin.shape, meta["mask_rate"])
            A, B = low_rank_residual(
                tensors[f"in/model{index}/{name}"], tensors[f"out/shared/{name}"], rank
            )
            np.testing.assert_allclose(B @ A, twin, atol=1e-4)


def decaying(seed, shape=(60, 40), ratio=0.8):
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((shape[0], min(shape))))[0]
    v = np.linalg.qr(rng.standard_normal((shape[1], min(shape))))[0]
    return ((u * ratio ** np.arange(min(shape))) @ v.T).astype(np.float32)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 20), wide=st.booleans())
def test_randomized_is_nearly_as_good_as_exact_and_repeats(seed, rank, wide):
    matrix = decaying(seed)
    matrix = matrix.T if wide else matrix
    rough = randomized_svd(matrix, rank, seed=seed)
    again = randomized_svd(matrix, rank, seed=seed)
    np.testing.assert_array_equal(rough.U, again.U)
    best = np.linalg.norm(np.linalg.svd(matrix, compute_uv=False)[rank:])
    error = np.linalg.norm(matrix - (rough.U * rough.S) @ rough.Vt)
    assert error <= 1.05 * best + 1e-5
    np.testing.assert_allclose(rough.U.T @ rough.U, np.eye(rank), atol=1e-5)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=10), st.floats(0.05, 0.95))
def test_more_energy_needs_no_smaller_rank(values, energy):
    values = np.sort(values)[::-1]
    assert energy_rank(values, energy) <= energy_rank(values, min(1.0, energy + 0.05))
    assert energy_rank(values, 1.0) <= len(values)


def models(seed=0, dtype=np.float32):
    """A base and a fine-tune of known rank, with every kind of tensor."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    base = {
        "model.embed_tokens.weight": normal(11, 8),
        "model.layers.0.q_proj.weight": normal(8, 8),
        "model.layers.0.q_proj.bias": normal(8),
        "model.layers.0.up_proj.weight": normal(12, 8),
        "model.layers.0.norm.weight": normal(8),
        "model.layers.0.norm.bias": normal(8),
        "model.conv.weight": normal(6, 3, 2, 2),
        "lm_head.weight": normal(11, 8),
        "model.cls": normal(8),
    }
    tuned = dict(base)
    for name, rank in (("model.layers.0.q_proj.weight", 2), ("model.layers.0.up_proj.weight", 3)):
        rows, columns = base[name].shape
        tuned[name] = (base[name] + normal(rows, rank) @ normal(rank, columns)).astype(dtype)
    conv = base["model.conv.weight"]
    kernels = (normal(6, 1) @ normal(1, 12)).reshape(conv.shape)
    tuned["model.conv.weight"] = (conv + kernels).astype(dtype)
    for name in ("model.layers.0.q_proj.bias", "model.layers.0.norm.weight", "lm_head.weight"):
        tuned[name] = base[name] + normal(*base[name].shape)
    return base, tuned


def extract(base, tuned, folder, **fields):
    return extract_adapter(
        MemorySource(base, "base"), MemorySource(tuned, "model"), folder, ExtractOptions(**fields)
    )


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("biases", ["lora", "save"])
def test_a_low_rank_fine_tune_is_recovered_whole(svd, biases, tmp_path):
    base, tuned = models()
    report = extract(base, tuned, tmp_path / "a", rank=4, svd=svd, biases=biases, sv_epsilon=1e-4)
    adapter = load_adapter(tmp_path / "a")
    for name in base:
        np.testing.assert_allclose(adapter.apply(name, base[name]), tuned[name], atol=1e-4)
    assert {m.name: m.rank for m in report.modules} == {
        "model.layers.0.q_proj.weight": 2,
        "model.layers.0.up_proj.weight": 3,
        "model.conv.weight": 1,
    }
    assert report.residual < 1e-4
    assert report.lost == ()
    assert report.unchanged == 3
    assert "model.layers.0.norm.bias" in report.saved


def test_the_reported_residual_is_the_tail_of_the_spectrum(tmp_path):
    base, tuned = models()
    report = extract(base, tuned, tmp_path / "a", rank=1, svd="exact")
    for module in report.modules:
        delta = (tuned[module.name] - base[module.name]).reshape(base[module.name].shape[0], -1)
        tail = np.linalg.norm(np.linalg.svd(delta, compute_uv=False)[1:])
        assert module.residual * module.norm == pytest.approx(tail, rel=1e-3, abs=1e-4)


def test_energy_counts_what_lies_beyond_the_largest_rank(tmp_path):
    base = {"q.weight": np.zeros((40, 40), np.float32)}
    tuned = {"q.weight": decaying(1, (40, 40), ratio=0.97)}
    report = extract(base, tuned, tmp_path / "a", rank=20, energy=0.5)
    values = np.linalg.svd(tuned["q.weight"], compute_uv=False)
    assert report.modules[0].rank == energy_rank(values, 0.5)
    capped = extract(base, tuned, tmp_path / "b", rank=3, energy=0.999)
    assert capped.modules[0].rank == 3


def test_a_budget_is_spent_where_the_difference_is_largest(tmp_path):
    base = {"a.weight": np.zeros((10, 10), "f4"), "b.weight": np.zeros((10, 10), "f4")}
    tuned = {"a.weight": 10 * decaying(1, (10, 10)), "b.weight": 0.01 * decaying(2, (10, 10))}
    report = extract(base, tuned, tmp_path / "a", parameter_budget=60)
    assert [(m.name, m.rank) for m in report.modules] == [("a.weight", 3)]
    assert report.lost == ("b.weight",)


def test_singular_values_go_to_both_factors_or_to_one(tmp_path):
    base, tuned = models()
    for distribute in (True, False):
        extract(base, tuned, tmp_path / str(distribute), rank=3, distribute=distribute)
        module = load_adapter(tmp_path / str(distribute)).modules["model.layers.0.up_proj.weight"]
        lengths = np.linalg.norm(module.B, axis=0)
        wanted = np.linalg.norm(module.A, axis=1) if distribute else np.ones(3)
        np.testing.assert_allclose(lengths, wanted, rtol=1e-4)


def test_embeddings_as_lora_and_skips(tmp_path):
    base, tuned = models()
    tuned["model.embed_tokens.weight"] = base["model.embed_tokens.weight"] + 1
    extract(base, tuned, tmp_path / "lora", rank=8, embeddings="lora")
    adapter = load_adapter(tmp_path / "lora")
    assert adapter.modules["model.embed_tokens.weight"].kind == "embedding"
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_allclose(adapter.apply(name, base[name]), tuned[name], atol=1e-4)
    report = extract(
        base, tuned, tmp_path / "skip", embeddings="skip", others="skip", biases="skip"
    )
    assert report.saved == ()
    assert set(report.lost) == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.q_proj.bias",
        "model.layers.0.norm.weight",
    }


def test_new_tokens_are_saved_whole(tmp_path):
    base, tuned = models()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tuned[name] = np.concatenate([tuned[name], np.ones((2, 8), "f4")])
    for policy in ("save", "lora"):
        extract(base, tuned, tmp_path / policy, rank=4, embeddings=policy)
        adapter = load_adapter(tmp_path / policy)
        np.testing.assert_array_equal(
            adapter.replacements["lm_head.weight"], tuned["lm_head.weight"]
        )


def test_filters_leave_modules_at_the_base(tmp_path):
    base, tuned = models()
    report = extract(
        base, tuned, tmp_path / "a", include=("q_proj", "up_proj"), exclude=(r"layers\.0\.up",)
    )
    assert [m.name for m in report.modules] == ["model.layers.0.q_proj.weight"]
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.q_proj"]
    assert "model.layers.0.up_proj.weight" in report.lost
    assert "model.conv.weight" in report.lost


def test_modules_can_be_stored_whole(tmp_path):
    base, tuned = models()
    options = {"save": (r"layers\.0\.up",), "others": "skip", "embeddings": "skip"}
    report = extract(base, tuned, tmp_path / "a", **options)
    assert "model.layers.0.up_proj.weight" not in {m.name for m in report.modules}
    assert {name.rpartition(".")[0] for name in report.saved} == {"model.layers.0.up_proj"}
    adapter = load_adapter(tmp_path / "a")
    name = "model.layers.0.up_proj.weight"
    np.testing.assert_array_equal(adapter.apply(name, base[name]), tuned[name])
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.layers.0.up_proj"]
    with pytest.raises(FusekitError, match=r"'\(' is not a regular expression"):
        extract(base, tuned, tmp_path / "b", save=("(",))


def test_half_precision_models_give_half_precision_adapters(tmp_path):
    base, tuned = models(dtype=ml_dtypes.bfloat16)
    extract(base, tuned, tmp_path / "a", rank=4)
    module = load_adapter(tmp_path / "a").modules["model.layers.0.up_proj.weight"]
    assert module.A.dtype == ml_dtypes.bfloat16
    truth = tuned[module.name].astype("f4") - base[module.name].astype("f4")
    assert np.linalg.norm(module.delta() - truth) < 0.02 * np.linalg.norm(truth)


def test_factors_larger_than_the_matrix_are_reported(tmp_path):
    base, tuned = models()
    report = extract(base, tuned, tmp_path / "a", rank=8, svd="exact")
    assert {m.name: m.wasteful for m in report.modules}["model.layers.0.q_proj.weight"]


def test_conv1d_weights_are_turned(tmp_path):
    rng = np.random.default_rng(0)
    base = {"h.0.c_attn.weight": rng.standard_normal((8, 24)).astype("f4")}
    tuned = {"h.0.c_attn.weight": base["h.0.c_attn.weight"] + 1}
    extract(base, tuned, tmp_path / "a", rank=2, conv1d=True)
    module = load_adapter(tmp_path / "a").modules["h.0.c_attn.weight"]
    assert module.transposed
    assert module.A.shape[1] == 8
    np.testing.assert_allclose(module.apply(base[module.name]), tuned[module.name], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra.weight": np.ones((2, 2), "f4")}, "'extra.weight' is not in the base base"),
        (
            {"model.layers.0.q_proj.weight": np.ones((9, 8), "f4")},
            "has shape [9, 8] in model, [8, 8] in the base",
        ),
        ({"model.layers.0.q_proj.bias": np.full(8, np.nan, "f4")}, "holds 8 NaN or Inf"),
    ],
)
def test_models_that_do_not_fit_are_refused(change, message, tmp_path):
    base, tuned = models()
    with pytest.raises(CheckpointError, match=re.escape(message)):
        extract(base, {**tuned, **change}, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_equal_values_in_another_type_are_unchanged(tmp_path):
    _, tuned = models(dtype=ml_dtypes.bfloat16)
    base = {name: tensor.astype(np.float32) for name, tensor in tuned.items()}
    tuned["model.layers.0.up_proj.weight"] = tuned["model.layers.0.up_proj.weight"] * 2
    report = extract(base, tuned, tmp_path / "a", rank=8, svd="exact")
    assert report.unchanged == len(base) - 1
    assert [module.name for module in report.modules] == ["model.layers.0.up_proj.weight"]


def test_equal_models_have_no_adapter(tmp_path):
    base, _ = models()
    with pytest.raises(CheckpointError, match="no weight matrix differs from that of"):
        extract(base, base, tmp_path / "a")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"energy": 0.5, "parameter_budget": 10}, "exclude each other"),
        ({"include": ("(",)}, "'(' is not a regular expression"),
    ],
)
def test_impossible_options_are_refused(fields, message, tmp_path):
    base, tuned = models()
    with pytest.raises(FusekitError, match=re.escape(message)):
        extract(base, tuned, tmp_path / "a", **fields)


def test_what_cannot_be_written_is_refused_before_any_difference_is_taken(tmp_path, monkeypatch):
    weights = {"q.weight": np.eye(4, dtype="f4")}
    base, tuned = MemorySource(weights), MemorySource({"q.weight": 2 * weights["q.weight"]})
    extract_adapter(base, tuned, tmp_path / "out", ExtractOptions(rank=1))
    with pytest.raises(CheckpointError, match="no weight matrix that was chosen differs"):
        extract_adapter(base, tuned, tmp_path / "new", ExtractOptions(include=("zzz",)))
    extract_adapter(base, tuned, tmp_path / "out", ExtractOptions(rank=2), overwrite=True)
    assert load_adapter(tmp_path / "out").modules["q.weight"].rank == 2
    monkeypatch.setattr("fusekit.adapters.extract.decompose", None)
    with pytest.raises(FusekitError, match="out: already exists"):
        extract_adapter(base, tuned, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
