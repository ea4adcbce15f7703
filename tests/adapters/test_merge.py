from __future__ import annotations

import dataclasses
import json
import re
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.adapters import Adapter, load_adapter, merge_adapters, write_adapter
from fusekit.adapters import knots as knots_module
from fusekit.adapters import merge as merge_module
from fusekit.adapters.combine import prune_magnitude
from fusekit.adapters.knots import Agreement, Block, align, merge_coordinates
from fusekit.adapters.lego import LegoOptions, merge_pieces
from fusekit.adapters.merge import METHODS, MergeOptions
from fusekit.checkpoint.memory import MemorySource
from fusekit.errors import CheckpointError, FusekitError

from .support import load_vectors, make_adapter, make_module, random_adapter, under

SHAPES = {"a.weight": (9, 7), "b.weight": (6, 8)}
DENSE_METHODS = [m for m in METHODS if m.endswith("svd")]


def delta_of(adapter, name="m.weight"):
    return adapter.modules[name].delta()


def dense_sum(adapters, weights, name):
    return sum(
        w * a.modules[name].delta()
        for a, w in zip(adapters, weights, strict=True)
        if name in a.modules
    )


def options_for(method, **fields):
    needs = method.startswith(("ties", "dare", "magnitude", "knots_dare"))
    return MergeOptions(density=0.6 if needs else None, **fields)


def peft_case(tensors, meta, case):
    return [
        make_adapter(
            make_module(
                "m.weight",
                tensors[f"{case}/in/model{i}/lora_A"],
                tensors[f"{case}/in/model{i}/lora_B"],
                alpha / rank,
            )
        )
        for i, (alpha, rank) in enumerate(zip(meta["alphas"], meta["ranks"], strict=True))
    ]


def peft_runs():
    _, cases = load_vectors("peft-lora-merge")
    return [(case, run) for case, meta in cases.items() for run in meta["runs"]]


@pytest.mark.parametrize(("case", "run"), peft_runs())
def test_golden_runs_of_peft(case, run, monkeypatch):
    tensors, cases = load_vectors("peft-lora-merge")
    meta = cases[case]
    arguments = dict(meta["runs"][run])
    method = arguments.pop("combination_type")
    masks = under(tensors, f"{case}/in/{run}/mask_")

    def recorded_masks(name, what, parts, options):
        def drop(place, start, entries):
            mask = masks[f"{what}_{place}"].reshape(-1)
            entries *= mask[start : start + entries.size] / np.float32(options.density)

        return drop

    if masks:
        monkeypatch.setattr(merge_module, "_dropper", recorded_masks)
    options = MergeOptions(
        convention="peft",
        rank=arguments.pop("svd_rank", None),
        density=arguments.pop("density", None),
        majority_sign_method=arguments.pop("majority_sign_method", "total"),
    )
    assert not arguments
    adapters = peft_case(tensors, meta, case)
    module = merge_adapters(adapters, method, meta["weights"], options).modules["m.weight"]
    expected = under(tensors, f"{case}/out/{run}/")
    assert module.scaling == 1.0
    scale = np.abs(expected["delta"]).max()
    np.testing.assert_allclose(module.delta(), expected["delta"], atol=1e-4 * scale)
    if "lora_A" in expected:
        np.testing.assert_allclose(module.A, expected["lora_A"], atol=1e-5)
        np.testing.assert_allclose(module.B, expected["lora_B"], atol=1e-5)


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_golden_lego(case):
    tensors, cases = load_vectors("lora-lego")
    meta = cases[case]
    parts = [
        (tensors[f"{case}/in/model{i}/lora_A"], tensors[f"{case}/in/model{i}/lora_B"], 1.0)
        for i in range(meta["n_models"])
    ]
    options = LegoOptions(
        iterations=meta["kmeans_iters"],
        parameter_reweighting=meta["param_reweighting"],
        output_reweighting=meta["output_reweighting"],
    )
    result = merge_pieces(parts, meta["K"], options, initial=tensors[f"{case}/in/init_idx"])
    np.testing.assert_array_equal(result.labels, tensors[f"{case}/out/labels"])
    np.testing.assert_allclose(result.centres, tensors[f"{case}/out/centroids"], atol=1e-4)
    np.testing.assert_allclose(result.B @ result.A, tensors[f"{case}/out/delta"], atol=1e-4)


def low_rank_factors(delta):
    u, s, vt = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    keep = s > 1e-6
    return vt[keep].astype(np.float32), (u[:, keep] * s[keep]).astype(np.float32)


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_golden_knots(case):
    tensors, cases = load_vectors("knots")
    meta = cases[case]
    layers = sorted(under(tensors, f"{case}/in/base/"))
    adapters = [
        make_adapter(
            *(
                make_module(name, *low_rank_factors(tensors[f"{case}/in/model{i}/{name}"]))
                for name in layers
            )
        )
        for i in range(meta["n_models"])
    ]
    method = {"ties": "knots_ties", "tv": "knots_linear"}[meta["merge_method"]]
    merged = merge_adapters(
        adapters,
        method,
        [meta["scaling"]] * meta["n_models"],
        MergeOptions(density=meta["topK"] / 100),
    )
    for name in layers:
        np.testing.assert_allclose(
            delta_of(merged, name), tensors[f"{case}/out/merged/{name}"], atol=2e-4
        )
        parts = [(a.modules[name].A, a.modules[name].B, 1.0) for a in adapters]
        values = tensors[f"{case}/out/singular_values/{name.removesuffix('.weight')}"]
        np.testing.assert_allclose(align(parts).S, values, atol=2e-4)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_cat_and_full_rank_svd_are_the_weighted_sum_of_updates(method):
    adapters = [
        random_adapter(1, SHAPES, rank=2, scaling=0.5),
        random_adapter(2, SHAPES, rank=3, scaling=2.0),
    ]
    weights = [0.7, -1.3]
    rank = 5 if method == "svd" else None
    merged = merge_adapters(adapters, method, weights, MergeOptions(rank=rank))
    for name in SHAPES:
        np.testing.assert_allclose(
            delta_of(merged, name), dense_sum(adapters, weights, name), atol=2e-5
        )


def test_svd_is_the_best_approximation_of_its_rank():
    adapters = [random_adapter(seed, SHAPES, rank=3) for seed in range(3)]
    merged = merge_adapters(adapters, "svd", [1, 1, 1], MergeOptions(rank=2))
    for name in SHAPES:
        target = dense_sum(adapters, [1, 1, 1], name)
        tail = np.linalg.svd(target, compute_uv=False)[2:]
        error = np.linalg.norm(target - delta_of(merged, name))
        assert error == pytest.approx(np.linalg.norm(tail), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_identical_adapters_with_default_weights_give_that_adapter(method):
    adapter = random_adapter(3, SHAPES, rank=3, scaling=1.5)
    fields = {"rank": 3} if method == "lora_lego" else {}
    options = MergeOptions(density=1.0, lego=LegoOptions(restarts=20), **fields)
    merged = merge_adapters([adapter, adapter], method, options=options)
    for name in SHAPES:
        np.testing.assert_allclose(
            delta_of(merged, name), delta_of(adapter, name), atol=2e-4, rtol=1e-3
        )


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lora_lego"])
@pytest.mark.parametrize("fields", [{"rslora": True}, {"magnitude": np.ones(3, np.float32)}])
def test_a_single_adapter_of_weight_one_survives_whole(method, fields, tmp_path):
    rng = np.random.default_rng(0)
    module = make_module(
        "q.weight",
        rng.standard_normal((2, 5)).astype("f4"),
        rng.standard_normal((3, 2)).astype("f4"),
        bias=None,
        **fields,
    )
    adapter = make_adapter(module)
    merged = merge_adapters([adapter], method, [1.0], options_for(method)).modules["q.weight"]
    weight = rng.standard_normal((3, 5)).astype("f4")
    np.testing.assert_array_equal(merged.apply(weight), module.apply(weight))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_handles_missing_modules_and_ranks(method, tmp_path):
    ranks = [3, 3] if method in {"ties", "dare_ties"} else [2, 3]
    first = random_adapter(1, SHAPES, rank=ranks[0])
    second = random_adapter(2, {"a.weight": (9, 7), "c.weight": (4, 4)}, rank=ranks[1])
    merged = merge_adapters([first, second], method, [1.0, 0.5], options_for(method))
    assert list(merged.modules) == ["a.weight", "b.weight", "c.weight"]
    write_adapter(merged, tmp_path / "out")
    again = load_adapter(tmp_path / "out")
    for name in merged.modules:
        np.testing.assert_array_equal(delta_of(again, name), delta_of(merged, name))


@pytest.mark.parametrize("method", [m for m in METHODS if "dare" not in m and m != "lora_lego"])
def test_the_order_of_adapters_does_not_matter(method):
    adapters = [random_adapter(seed, SHAPES, rank=3) for seed in range(3)]
    weights = [0.5, 0.3, -0.2]
    there = merge_adapters(adapters, method, weights, options_for(method, rank=3))
    back = merge_adapters(adapters[::-1], method, weights[::-1], options_for(method, rank=3))
    for name in SHAPES:
        np.testing.assert_allclose(delta_of(there, name), delta_of(back, name), atol=1e-4)


def permuted(adapter, seed, factor):
    """The same updates with ranks shuffled and each piece's size shifted between A and B."""
    rng = np.random.default_rng(seed)
    modules = {}
    for name, module in adapter.modules.items():
        order = rng.permutation(module.rank)
        modules[name] = dataclasses.replace(
            module,
            A=module.A[order] * np.float32(factor),
            B=module.B[:, order] / np.float32(factor),
        )
    return Adapter("permuted", modules, {}, {})


GAUGE_FREE = ["cat", *DENSE_METHODS, *(m for m in METHODS if m.startswith("knots"))]
"""Methods that see the updates only, not how they are split into factors."""


@pytest.mark.parametrize("method", GAUGE_FREE)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), factor=st.floats(1e-3, 1e3))
def test_the_gauge_of_a_source_does_not_matter(method, seed, factor):
    adapters = [random_adapter(seed + i, {"m.weight": (8, 6)}, rank=3) for i in range(2)]
    gauged = [permuted(adapters[0], seed, factor), adapters[1]]
    plain = merge_adapters(adapters, method, [1.0, 0.7], options_for(method, rank=3))
    other = merge_adapters(gauged, method, [1.0, 0.7], options_for(method, rank=3))
    np.testing.assert_allclose(delta_of(plain), delta_of(other), atol=2e-3)


@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), factor=st.floats(1e-3, 1e3))
def test_a_gauge_common_to_all_sources_does_not_matter_to_factor_methods(method, seed, factor):
    adapters = [random_adapter(seed + i, {"m.weight": (8, 6)}, rank=3) for i in range(2)]
    gauged = [permuted(adapter, seed, factor) for adapter in adapters]
    plain = merge_adapters(adapters, method, [1.0, 0.7], options_for(method))
    other = merge_adapters(gauged, method, [1.0, 0.7], options_for(method))
    np.testing.assert_allclose(delta_of(plain), delta_of(other), atol=2e-3)
    one = merge_adapters([gauged[0], adapters[1]], method, [1.0, 0.7], options_for(method))
    moved = permuted(adapters[0], seed, factor).modules["m.weight"]
    if np.abs(moved.A - adapters[0].modules["m.weight"].A).max() > 0.5:  # a gauge of one does
        assert np.abs(delta_of(plain) - delta_of(one)).max() > 1e-3


def test_lego_finds_shared_pieces_in_any_order_of_ranks_and_adapters():
    rng = np.random.default_rng(0)
    pieces = [(rng.standard_normal((1, 20)), rng.standard_normal((30, 1))) for _ in range(4)]
    adapters = []
    for i in range(3):
        noise = 0.01 * rng.standard_normal((4, 20))
        order = rng.permutation(4)
        A = (np.concatenate([a for a, _ in pieces]) + noise)[order].astype("f4")
        B = np.concatenate([b for _, b in pieces], axis=1)[:, order].astype("f4")
        adapters.append(make_adapter(make_module("m.weight", A, B), label=str(i)))
    options = MergeOptions(rank=4, lego=LegoOptions(restarts=20))
    truth = sum(b @ a for a, b in pieces)
    for chosen in (adapters, adapters[::-1]):
        merged = delta_of(merge_adapters(chosen, "lora_lego", options=options))
        averaged = delta_of(merge_adapters(chosen, "linear"))
        assert np.linalg.norm(merged - truth) < 0.05 * np.linalg.norm(truth)
        assert np.linalg.norm(averaged - truth) > 0.3 * np.linalg.norm(truth)


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_a_piece_may_carry_its_size_on_either_side(factor):
    adapters = [random_adapter(i, {"m.weight": (8, 6)}, rank=2) for i in range(2)]
    gauged = [permuted(adapters[0], 0, factor), adapters[1]]
    merged = merge_adapters(gauged, "svd", [1.0, 1.0], MergeOptions(rank=4))
    expected = dense_sum(adapters, [1.0, 1.0], "m.weight")
    np.testing.assert_allclose(delta_of(merged), expected, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_lego_at_full_size_is_task_arithmetic_over_the_root_of_n(seed):
    adapters = [random_adapter(seed + i, {"m.weight": (8, 6)}, rank=2) for i in range(2)]
    merged = merge_adapters(adapters, "lora_lego", options=MergeOptions(rank=4))
    expected = dense_sum(adapters, [1, 1], "m.weight") / np.sqrt(2)
    np.testing.assert_allclose(delta_of(merged), expected, atol=1e-4)


def test_lego_undoes_a_permutation_of_ranks_that_averaging_does_not():
    adapter = random_adapter(5, {"m.weight": (30, 20)}, rank=4)
    shuffled = permuted(adapter, 2, 1.0)
    options = MergeOptions(rank=4, lego=LegoOptions(restarts=20))
    merged = merge_adapters([adapter, shuffled], "lora_lego", options=options)
    np.testing.assert_allclose(delta_of(merged), delta_of(adapter), atol=1e-3)
    averaged = merge_adapters([adapter, shuffled], "linear")
    assert np.abs(delta_of(averaged) - delta_of(adapter)).max() > 0.1


def test_canonical_pieces_see_through_sign_and_scale():
    adapter = random_adapter(5, {"m.weight": (30, 20)}, rank=4)
    flipped = permuted(adapter, 1, -3.0)
    lego = LegoOptions(restarts=20, canonicalize=True)
    options = MergeOptions(rank=4, lego=lego)
    merged = merge_adapters([adapter, flipped], "lora_lego", options=options)
    np.testing.assert_allclose(delta_of(merged), delta_of(adapter), atol=1e-3)


def test_members_that_cancel_do_not_explode():
    a, b = np.ones((1, 4), np.float32), np.ones((3, 1), np.float32)
    noise = np.array([[3e-6, 0, 0, 0]], np.float32)
    parts = [(a, b, 1.0), (-a + noise, -b, 1.0)]
    result = merge_pieces(parts, 1, LegoOptions(), initial=np.array([0]))
    assert 0 < np.abs(result.A).max() < 1e-3


def test_knots_linear_sums_the_updates_exactly():
    adapters = [random_adapter(seed, SHAPES, rank=2, scaling=0.5) for seed in range(3)]
    merged = merge_adapters(adapters, "knots_linear", [0.4, 0.4, -0.2])
    for name in SHAPES:
        expected = dense_sum(adapters, [0.4, 0.4, -0.2], name)
        np.testing.assert_allclose(delta_of(merged, name), expected, atol=1e-5)


def test_knots_on_the_input_side_is_knots_of_the_transposed_updates():
    adapters = [random_adapter(seed, {"m.weight": (8, 6)}, rank=2) for seed in range(2)]
    turned = [
        make_adapter(dataclasses.replace(m, A=m.B.T, B=m.A.T))
        for a in adapters
        for m in a.modules.values()
    ]
    options = MergeOptions(density=0.5)
    expected = delta_of(merge_adapters(turned, "knots_ties", options=options)).T
    inputs = dataclasses.replace(options, knots_basis="input")
    merged = delta_of(merge_adapters(adapters, "knots_ties", options=inputs))
    np.testing.assert_allclose(merged, expected, atol=1e-5)
    outputs = delta_of(merge_adapters(adapters, "knots_ties", options=options))
    assert np.abs(merged - outputs).max() > 0.01


def test_aligned_coordinates_rebuild_every_update():
    adapters = [random_adapter(seed, SHAPES, rank=3, scaling=0.5) for seed in range(2)]
    parts = [(a.modules["a.weight"].A, a.modules["a.weight"].B, 0.5) for a in adapters]
    aligned = align(parts)
    basis = aligned.basis([B for _, B, _ in parts])
    np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-6)
    (block,) = aligned.blocks([A for A, _, _ in parts], (0, 1))
    for coordinates, adapter in zip(block.coordinates, adapters, strict=True):
        np.testing.assert_allclose(basis @ coordinates, delta_of(adapter, "a.weight"), atol=1e-5)


@pytest.mark.parametrize("method", ["knots_ties", "knots_linear"])
def test_blocks_of_columns_change_nothing(method, monkeypatch):
    adapters = [random_adapter(seed, {"m.weight": (8, 50)}, rank=2) for seed in range(3)]
    options = MergeOptions(density=0.3)
    whole = delta_of(merge_adapters(adapters, method, options=options))
    monkeypatch.setattr(knots_module, "BLOCK_COLUMNS", 7)
    blocks = delta_of(merge_adapters(adapters, method, options=options))
    np.testing.assert_allclose(blocks, whole, atol=1e-6)


def test_knots_drops_directions_of_rounding_noise():
    eye = np.eye(6, dtype=np.float32)
    scales = np.array([1.0, 1e-3, 1e-6], np.float32)
    aligned = align([(eye[:3], eye[:, :3] * scales, 1.0)])
    np.testing.assert_allclose(aligned.S, [1.0, 1e-3], rtol=1e-6)


def test_knots_ties_turns_with_the_output_space():
    adapters = [random_adapter(seed, {"m.weight": (8, 6)}, rank=2) for seed in range(2)]
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0].astype("f4")
    turned = [
        make_adapter(dataclasses.replace(m, B=turn @ m.B))
        for a in adapters
        for m in a.modules.values()
    ]
    plain = merge_adapters(adapters, "knots_ties", options=MergeOptions(density=0.5))
    other = merge_adapters(turned, "knots_ties", options=MergeOptions(density=0.5))
    np.testing.assert_allclose(turn @ delta_of(plain), delta_of(other), atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), density=st.floats(0, 0.999), misleading=st.booleans())
def test_global_thresholds_are_exact_order_statistics(seed, density, misleading):
    rng = np.random.default_rng(seed)
    blocks = [
        Block((0, 1), rng.standard_normal((2, 3, 5)).astype("f4")),
        Block((1,), rng.standard_normal((1, 2, 4)).astype("f4")),
    ]
    if misleading:
        blocks[0].coordinates[:, :, 0] *= 1e6

    def every(step):
        return [Block(b.sources, b.coordinates[:, :, ::step]) for b in blocks]

    found = Agreement(every, [density] * 2).thresholds
    for source in range(2):
        rows = [b.rows[b.sources.index(source)] for b in blocks if source in b.sources]
        values = np.sort(np.abs(np.concatenate(rows)))
        assert found[source] == values[len(values) - int(len(values) * density) - 1]


def test_an_adapter_that_keeps_everything_has_no_threshold():
    blocks = [Block((0, 1), np.ones((2, 2, 3), np.float32))]
    np.testing.assert_array_equal(
        Agreement(lambda _: blocks, [1.0, 0.5, 0.5]).thresholds, [0, 1, 0]
    )


@pytest.mark.parametrize("majority", [1, -1])
def test_entries_that_cancel_follow_the_whole_models_majority(majority):
    one = np.array([[2.0, 5.0, 0.0]], np.float32)
    other = np.array([[-2.0, 1.0, 0.0]], np.float32)
    rest = np.full((1, 9), majority, np.float32)
    blocks = [Block((0, 1), np.stack([one, other])), Block((0,), rest[None])]
    agreement = Agreement(lambda _: blocks, [1.0, 1.0])
    merged = merge_coordinates(blocks[0], [1.0, 1.0], "ties", agreement)
    np.testing.assert_array_equal(merged, [[2.0 * majority, 3.0, 0.0]])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), density=st.floats(0, 1), levels=st.integers(1, 40))
def test_pruning_keeps_exactly_the_promised_number(seed, density, levels):
    tensor = np.random.default_rng(seed).integers(1, levels + 1, (6, 7)).astype(np.float32)
    kept = tensor.copy()
    prune_magnitude(kept, density)
    assert np.count_nonzero(kept) == int(density * tensor.size)
    if np.any(kept):
        assert np.abs(kept[kept != 0]).min() >= np.abs(tensor[kept == 0]).max(initial=0)


@pytest.mark.parametrize("method", ["ties_svd", "dare_ties_svd", "magnitude_prune_svd"])
def test_blocks_of_rows_change_nothing(method, monkeypatch):
    adapters = [random_adapter(seed, {"m.weight": (20, 6)}, rank=2) for seed in range(2)]
    options = MergeOptions(density=0.4, rank=6)
    whole = merge_adapters(adapters, method, [1, 1], options)
    expected = delta_of(whole)
    monkeypatch.setattr(merge_module, "BLOCK_BYTES", 4 * 6 * 2 * 3)
    np.testing.assert_allclose(delta_of(whole), expected, atol=1e-5)


def test_equal_magnitudes_are_counted_across_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    A, B = (rng.integers(-2, 3, shape).astype("f4") for shape in ((2, 6), (20, 2)))
    adapters = [make_adapter(make_module("m.weight", A, B)) for _ in range(2)]
    monkeypatch.setattr(merge_module, "BLOCK_BYTES", 4 * 6 * 2 * 3)
    options = MergeOptions(density=0.3, rank=6)
    merged = merge_adapters(adapters, "magnitude_prune_svd", [0.5, 0.5], options)
    expected = B @ A
    prune_magnitude(expected, 0.3)
    np.testing.assert_allclose(delta_of(merged), expected, atol=1e-4)


def test_randomized_and_exact_decompositions_agree_on_low_rank():
    shapes = {"m.weight": (80, 60)}
    adapters = [random_adapter(seed, shapes, rank=3) for seed in range(2)]
    pruned = MergeOptions(density=1.0, rank=6, svd="exact")
    exact = merge_adapters(adapters, "magnitude_prune_svd", [1, 1], pruned)
    rough = merge_adapters(
        adapters, "magnitude_prune_svd", [1, 1], dataclasses.replace(pruned, svd="randomized")
    )
    np.testing.assert_allclose(delta_of(exact), delta_of(rough), atol=1e-4)


def test_a_parameter_budget_goes_where_it_helps_most(tmp_path):
    strong = random_adapter(1, {"a.weight": (9, 7)}, rank=4, scaling=10)
    weak = random_adapter(2, {"b.weight": (9, 7)}, rank=4, scaling=0.01)
    budget = 4 * (9 + 7)
    merged = merge_adapters([strong, weak], "cat", [1, 1], MergeOptions(parameter_budget=budget))
    assert list(merged.modules) == ["a.weight"]
    assert sum(m.A.size + m.B.size for m in merged.modules.values()) == budget
    with pytest.raises(FusekitError, match="budget of 3 parameters holds no rank at all"):
        merge_adapters([strong, weak], "cat", [1, 1], MergeOptions(parameter_budget=3))


def test_experts_are_merged_one_by_one():
    rng = np.random.default_rng(0)

    def experts():
        return make_adapter(
            make_module(
                "x.up",
                rng.standard_normal((6, 5)).astype("f4"),
                rng.standard_normal((4, 6)).astype("f4"),
                kind="parameter",
                experts=3,
            )
        )

    adapters = [experts(), experts()]
    for method in ("cat", "svd", "knots_linear"):
        options = MergeOptions(rank=4 if method == "svd" else None)
        merged = merge_adapters(adapters, method, [1.0, 0.5], options)
        expected = dense_sum(adapters, [1.0, 0.5], "x.up")
        np.testing.assert_allclose(delta_of(merged, "x.up"), expected, atol=1e-4)


def test_dora_is_merged_through_the_base_and_refused_without_it():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 6)).astype("f4")
    first = random_adapter(1, {"m.weight": (8, 6)}, rank=2)
    dora = make_adapter(
        dataclasses.replace(
            first.modules["m.weight"], magnitude=np.linalg.norm(weight, axis=1) * np.float32(1.5)
        )
    )
    plain = random_adapter(2, {"m.weight": (8, 6)}, rank=2)
    with pytest.raises(CheckpointError, match="uses DoRA: its update depends on the base"):
        merge_adapters([dora, plain], "svd").modules["m.weight"]
    base = MemorySource({"m.weight": weight})
    with pytest.raises(CheckpointError, match="not a product of two small factors"):
        merge_adapters([dora, plain], "cat", base=base).modules["m.weight"]
    merged = merge_adapters([dora, plain], "svd", [1, 1], MergeOptions(rank=6), base)
    expected = dora.modules["m.weight"].apply(weight) - weight + delta_of(plain)
    np.testing.assert_allclose(delta_of(merged), expected, atol=1e-4)


def test_module_biases_add_up_with_their_scalings():
    one = random_adapter(1, {"m.weight": (3, 5)}, rank=2, scaling=2.0).modules["m.weight"]
    bias = np.arange(3, dtype=np.float32)
    with_bias = make_adapter(dataclasses.replace(one, bias=bias))
    without = random_adapter(2, {"m.weight": (3, 5)}, rank=2)
    merged = merge_adapters([with_bias, without], "svd", [0.5, 1.0])
    zero = np.zeros(3, np.float32)
    np.testing.assert_allclose(merged.apply("m.bias", zero), 0.5 * 2.0 * bias, rtol=1e-6)


def test_saved_tensors_follow_the_policy():
    one, two = (random_adapter(s, {"m.weight": (3, 5)}) for s in (1, 2))
    head = np.ones((2, 2), np.float32)
    one = dataclasses.replace(one, replacements={"head.weight": head, "same.weight": head})
    two = dataclasses.replace(two, replacements={"head.weight": 3 * head, "same.weight": head})
    with pytest.raises(CheckpointError, match=r"'head\.weight' is saved whole, and differently"):
        merge_adapters([one, two])
    equal = [dataclasses.replace(a, replacements={"same.weight": head}) for a in (one, two)]
    np.testing.assert_array_equal(merge_adapters(equal).replacements["same.weight"], head)
    first = merge_adapters([one, two], options=MergeOptions(replacements="first"))
    np.testing.assert_array_equal(first.replacements["head.weight"], head)
    mean = merge_adapters([one, two], "svd", [1, 3], MergeOptions(replacements="average"))
    np.testing.assert_allclose(mean.replacements["head.weight"], 2.5 * head)


@pytest.mark.parametrize(
    ("method", "weights", "fields", "message"),
    [
        ("tise", None, {}, "unknown adapter merge method 'tise' (did you mean 'ties'?)"),
        ("svd", [1.0], {}, "1 weights for 2 adapters"),
        ("svd", [1.0, float("nan")], {}, "weights must be finite"),
        ("ties", None, {}, "method 'ties' needs a density"),
        ("ties", None, {"density": 1.5}, "density is 1.5, expected 0 to 1"),
        ("dare_linear", None, {"density": 0.0}, "DARE divides by it"),
        ("svd", None, {"rank": 0}, "rank is 0, expected 1 or more"),
        ("svd", None, {"rank": 1, "parameter_budget": 9}, "exclude each other"),
    ],
)
def test_impossible_requests_are_refused_at_once(method, weights, fields, message):
    adapters = [random_adapter(seed, SHAPES) for seed in range(2)]
    with pytest.raises(FusekitError, match=re.escape(message)):
        merge_adapters(adapters, method, weights, MergeOptions(**fields))


def test_disagreements_between_adapters_are_named():
    one, two = random_adapter(1, {"m.weight": (3, 5)}), random_adapter(2, {"m.weight": (4, 5)})
    with pytest.raises(CheckpointError, match=r"\[4, 5\] in adapter2.*\[3, 5\] in adapter1"):
        merge_adapters([one, two]).modules["m.weight"]
    ragged = random_adapter(2, {"m.weight": (3, 5)}, rank=2)
    with pytest.raises(FusekitError, match=r"ranks \[4, 2\].*use cat or svd"):
        merge_adapters([one, ragged], "linear", options=MergeOptions(convention="peft")).modules[
            "m.weight"
        ]


def test_random_masks_follow_the_seed_alone():
    adapters = [random_adapter(seed, SHAPES) for seed in range(2)]

    def merged(seed):
        options = MergeOptions(density=0.5, seed=seed)
        return delta_of(merge_adapters(adapters, "dare_linear", options=options), "b.weight")

    np.testing.assert_array_equal(merged(1), merged(1))
    assert np.abs(merged(1) - merged(2)).max() > 0


def test_all_zero_weights_give_a_zero_adapter(tmp_path):
    adapters = [random_adapter(seed, SHAPES) for seed in range(2)]
    for method in ("svd", "linear", "cat"):
        merged = merge_adapters(adapters, method, [0.0, 0.0])
        write_adapter(merged, tmp_path / method)
        again = load_adapter(tmp_path / method)
        assert all(np.all(module.delta() == 0) for module in again.modules.values())
        assert json.loads((tmp_path / method / "adapter_config.json").read_text())["r"] >= 1


@pytest.mark.parametrize("method", [m for m in METHODS if options_for(m).density is not None])
def test_every_adapter_can_have_a_density_of_its_own(method):
    adapters = [random_adapter(seed, SHAPES, rank=3) for seed in range(2)]
    both = merge_adapters(adapters, method, options=MergeOptions(density=[0.4, 0.9]))
    same = merge_adapters(adapters, method, options=MergeOptions(density=[0.6, 0.6]))
    one = merge_adapters(adapters, method, options=MergeOptions(density=0.6))
    alone = merge_adapters(adapters, method, [1.0, 0.0], MergeOptions(density=[0.6, 1.0]))
    other = merge_adapters(adapters, method, [1.0, 0.0], MergeOptions(density=[0.6, 0.1]))
    for name in SHAPES:
        np.testing.assert_array_equal(delta_of(same, name), delta_of(one, name))
        assert np.abs(delta_of(both, name) - delta_of(one, name)).max() > 1e-3
        if "ties" not in method:  # where nobody votes, an adapter of weight 0 leaves no trace
            np.testing.assert_allclose(delta_of(alone, name), delta_of(other, name), atol=1e-5)


def test_densities_that_do_not_fit_are_refused():
    adapters = [random_adapter(seed, SHAPES) for seed in range(2)]
    with pytest.raises(FusekitError, match="3 densities for 2 adapters"):
        merge_adapters(adapters, "ties", options=MergeOptions(density=[0.5] * 3))
    with pytest.raises(FusekitError, match=r"density is 1\.5, expected 0 to 1"):
        merge_adapters(adapters, "ties", options=MergeOptions(density=[0.5, 1.5]))


def test_factors_can_be_stored_in_another_type():
    adapters = [random_adapter(seed, SHAPES) for seed in range(2)]
    merged = merge_adapters(adapters, "cat", options=MergeOptions(dtype="bfloat16"))
    assert merged.modules["a.weight"].A.dtype.name == "bfloat16"
    with pytest.raises(FusekitError, match="dtype is 'int8', expected a floating-point type"):
        merge_adapters(adapters, "cat", options=MergeOptions(dtype="int8"))


def test_lego_tells_where_pieces_of_a_cluster_cancel():
    rng = np.random.default_rng(3)
    A, B = rng.standard_normal((1, 6)).astype("f4"), rng.standard_normal((8, 1)).astype("f4")
    options = LegoOptions(canonicalize=False, output_reweighting=False)
    merged = merge_pieces([(A, B, 1.0), (-0.99 * A, -0.99 * B, 1.0)], 1, options)
    assert merged.cancels
    np.testing.assert_allclose(np.abs(merged.A), 0.05 * np.abs(A), rtol=1e-3)
    assert not merge_pieces([(A, B, 1.0), (0.99 * A, 0.99 * B, 1.0)], 1, options).cancels


def opposite_adapters():
    """Two adapters whose module `a.weight` cancels and whose module `b.weight` does not."""
    one = random_adapter(0, {"a.weight": (6, 5), "b.weight": (4, 7)}, rank=1)
    turned = dataclasses.replace(
        one.modules["a.weight"],
        A=-0.99 * one.modules["a.weight"].A,
        B=-0.99 * one.modules["a.weight"].B,
    )
    return [one, dataclasses.replace(one, modules={**one.modules, "a.weight": turned})]


def test_merging_in_python_warns_of_pieces_that_cancel():
    merged = merge_adapters(opposite_adapters(), "lora_lego")
    with pytest.warns(UserWarning, match=r"stays smaller than they are \(tensor 'a.weight'\)"):
        merged.modules["a.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged.modules["b.weight"]


def test_remarks_can_be_collected():
    told = []
    merged = merge_adapters(
        opposite_adapters(), "lora_lego", on_remark=lambda *remark: told.append(remark)
    )
    dict(merged.modules)
    assert [name for _, name in told] == ["a.weight"]
