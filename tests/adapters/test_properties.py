"""What must hold for any adapters: merging, clustering, packing, extracting, splitting."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.adapters import MergeOptions, extract_adapter, load_adapter, merge_adapters
from fusekit.adapters.extract import ExtractOptions, decompose, low_rank_residual, twin_rank
from fusekit.adapters.lego import LegoOptions, merge_pieces
from fusekit.adapters.linalg import randomized_svd
from fusekit.adapters.merge import METHODS
from fusekit.adapters.reversible import align_gauges, fit_side
from fusekit.checkpoint.memory import MemorySource

from .support import make_adapter, make_module, random_adapter

ONE = {"m.weight": (8, 6)}
seeds = st.integers(0, 1000)
quick = settings(max_examples=10, deadline=None)


def delta_of(adapter, name="m.weight"):
    return adapter.modules[name].delta()


def with_factors(adapter, **changed):
    module = adapter.modules["m.weight"]
    return make_adapter(dataclasses.replace(module, **changed))


# Combinations of factors and of updates.


@quick
@given(seed=seeds, weights=st.lists(st.floats(0.1, 2), min_size=2, max_size=4))
def test_linear_is_exact_where_all_adapters_share_their_a(seed, weights):
    shared = random_adapter(seed, ONE).modules["m.weight"].A
    adapters = [with_factors(random_adapter(seed + i, ONE), A=shared) for i in range(len(weights))]
    merged = merge_adapters(adapters, "linear", weights)
    expected = sum(w * delta_of(adapter) for w, adapter in zip(weights, adapters, strict=True))
    np.testing.assert_allclose(delta_of(merged), expected, atol=1e-4)


@quick
@given(seed=seeds, count=st.integers(1, 5))
def test_copies_of_one_adapter_are_multiplied_by_pefts_linear_alone(seed, count):
    adapters = [random_adapter(seed, ONE, scaling=0.7)] * count
    weights = [1 / count] * count
    one = delta_of(adapters[0])
    for method in ("cat", "svd", "linear"):
        np.testing.assert_allclose(
            delta_of(merge_adapters(adapters, method, weights)), one, atol=1e-4
        )
    peft = MergeOptions(convention="peft")
    found = delta_of(merge_adapters(adapters, "linear", weights, peft))
    np.testing.assert_allclose(found, count * one, atol=1e-4 * count)


@quick
@given(seed=seeds, density=st.sampled_from([0.5, 1.0]))
def test_ties_of_adapters_that_agree_in_every_sign_is_a_mean_of_factors(seed, density):
    adapters = [random_adapter(seed, ONE)]
    module = adapters[0].modules["m.weight"]
    for factor in (2.0, 3.0):
        grown = {"A": module.A * np.float32(factor), "B": module.B * np.float32(factor)}
        adapters.append(with_factors(adapters[0], **grown))
    merged = merge_adapters(adapters, "ties", options=MergeOptions(density=density))
    alone = merge_adapters(
        [adapters[0]] * 2, "magnitude_prune", [0.5, 0.5], MergeOptions(density=density)
    )
    np.testing.assert_allclose(delta_of(merged), 4 * delta_of(alone), atol=1e-4)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lora_lego"])
@quick
@given(seed=seeds, scale=st.floats(0.1, 5))
def test_scaling_every_adapter_scales_the_merge(method, seed, scale):
    fields = {"density": 0.6} if "density" in _needs(method) else {}
    adapters = [random_adapter(seed + i, ONE, rank=3) for i in range(2)]
    scaled = [with_factors(a, alpha=a.modules["m.weight"].alpha * scale) for a in adapters]
    options = MergeOptions(**fields)
    plain = merge_adapters(adapters, method, [0.5, 1.0], options)
    other = merge_adapters(scaled, method, [0.5, 1.0], options)
    np.testing.assert_allclose(delta_of(other), scale * delta_of(plain), atol=1e-3)


def _needs(method):
    return ("density",) if any(w in method for w in ("ties", "dare", "prune")) else ()


# KnOTS.


@pytest.mark.parametrize("method", ["knots_ties", "knots_linear", "knots_dare_ties"])
@quick
@given(seed=seeds, weight=st.floats(-2, 2), density=st.floats(0.1, 1.0))
def test_knots_of_one_adapter_is_that_adapter(method, seed, weight, density):
    adapter = random_adapter(seed, ONE, scaling=0.5)
    merged = merge_adapters([adapter], method, [weight], MergeOptions(density=density))
    np.testing.assert_allclose(delta_of(merged), weight * delta_of(adapter), atol=1e-4)


def dense_knots(deltas, weights, density):
    """The published algorithm on dense matrices of one layer, in float64 throughout."""
    u, s, vt = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    kept = s > 1e-5
    blocks = np.split(s[kept, None] * vt[kept], len(deltas), axis=1)
    pruned = []
    for block in blocks:
        values = np.sort(np.abs(block).ravel())
        threshold = values[max(0, values.size - int(values.size * density) - 1)]
        pruned.append(np.where(np.abs(block) >= threshold, block, 0))
    elected = np.sign(sum(pruned))
    agreeing = [p * (np.sign(p) == elected) * w for p, w in zip(pruned, weights, strict=True)]
    count = np.maximum(1, sum(a != 0 for a in agreeing))
    return u[:, kept] @ (sum(agreeing) / count)


@quick
@given(seed=seeds, density=st.floats(0.1, 0.9))
def test_knots_from_factors_is_knots_of_dense_updates(seed, density):
    adapters = [random_adapter(seed + i, ONE, rank=2, scaling=0.5) for i in range(3)]
    weights = [1.0, 0.5, 2.0]
    merged = merge_adapters(adapters, "knots_ties", weights, MergeOptions(density=density))
    expected = dense_knots([delta_of(a).astype(np.float64) for a in adapters], weights, density)
    np.testing.assert_allclose(delta_of(merged), expected, atol=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_no_adapter_changes_stays_unchanged(method):
    untrained = random_adapter(1, {"m.weight": (8, 6), "n.weight": (5, 4)})
    modules = dict(untrained.modules)
    modules["n.weight"] = dataclasses.replace(
        modules["n.weight"], B=np.zeros_like(modules["n.weight"].B)
    )
    adapter = dataclasses.replace(untrained, modules=modules)
    options = MergeOptions(density=0.5)
    merged = merge_adapters([adapter, adapter], method, options=options)
    assert np.all(delta_of(merged, "n.weight") == 0)
    assert np.isfinite(delta_of(merged)).all() and np.abs(delta_of(merged)).max() > 0


# LoRA-LEGO.


@quick
@given(seed=seeds, order=st.permutations(range(8)))
def test_lego_sees_a_set_of_pieces_whatever_their_order(seed, order):
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((8, 6)).astype("f4"), rng.standard_normal((9, 8)).astype("f4")
    start = np.array([0, 3, 5])
    order = np.asarray(order)
    plain = merge_pieces([(A, B, 1.0)], 3, LegoOptions(), initial=start)
    moved = np.array([int(np.flatnonzero(order == i)[0]) for i in start])
    other = merge_pieces([(A[order], B[:, order], 1.0)], 3, LegoOptions(), initial=moved)
    np.testing.assert_array_equal(plain.labels[order], other.labels)
    np.testing.assert_allclose(plain.B @ plain.A, other.B @ other.A, atol=1e-4)


@quick
@given(seed=seeds, scale=st.floats(0.1, 10), rank=st.integers(1, 8))
def test_lego_scales_with_its_pieces_and_keeps_to_the_rank(seed, scale, rank):
    adapters = [random_adapter(seed + i, ONE, rank=3) for i in range(2)]
    parts = [(m.A, m.B, 1.0) for a in adapters for m in a.modules.values()]
    plain = merge_pieces(parts, rank, LegoOptions(), seed)
    scaled = merge_pieces([(a, b, scale) for a, b, _ in parts], rank, LegoOptions(), seed)
    assert plain.A.shape[0] == plain.B.shape[1] <= rank
    np.testing.assert_allclose(
        scaled.B @ scaled.A, scale * (plain.B @ plain.A), rtol=1e-3, atol=1e-3
    )


def test_lego_cuts_pieces_that_an_adapter_holds_twice():
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((4, 20)).astype("f4"), rng.standard_normal((30, 4)).astype("f4")
    doubled = make_adapter(
        make_module("m.weight", np.concatenate([A, A]), np.concatenate([B, B], axis=1) / 2)
    )
    lego = LegoOptions(restarts=30, output_reweighting=False)
    cut = merge_adapters([doubled], "lora_lego", [2.0], MergeOptions(rank=4, lego=lego))
    assert cut.modules["m.weight"].rank == 4
    np.testing.assert_allclose(delta_of(cut), B @ A, atol=1e-3)


# Reversible merging.


@quick
@given(seed=seeds, directions=st.integers(0, 3))
def test_packing_loses_the_discarded_energy_of_every_position(seed, directions):
    vectors = np.random.default_rng(seed).standard_normal((4, 5, 6))
    side, coefficients = fit_side(vectors, directions)
    rebuilt = np.stack([side.rebuild(c) for c in coefficients])
    centred = vectors - vectors.mean(axis=0)
    for position in range(5):
        values = np.linalg.svd(centred[:, position], compute_uv=False)
        lost = np.square(vectors[:, position] - rebuilt[:, position]).sum()
        assert lost == pytest.approx(np.square(values[directions:]).sum(), abs=1e-5)


@quick
@given(seed=seeds, factor=st.floats(0.01, 100))
def test_aligning_undoes_any_gauge(seed, factor):
    module = random_adapter(seed, ONE, rank=3).modules["m.weight"]
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))[0].astype("f4")
    gauge = turn * np.float32(factor)
    moved = (np.linalg.inv(gauge) @ module.A, module.B @ gauge)
    (one_a, one_b), (other_a, other_b) = align_gauges([(module.A, module.B), moved])
    np.testing.assert_allclose(one_a, other_a, atol=1e-3)
    np.testing.assert_allclose(one_b, other_b, atol=1e-3)


# Extraction.


@quick
@given(seed=seeds, svd=st.sampled_from(["exact", "randomized"]), rank=st.integers(1, 5))
def test_the_transposed_difference_has_the_transposed_adapter(seed, svd, rank):
    delta = np.random.default_rng(seed).standard_normal((12, 7)).astype("f4")
    options = ExtractOptions(rank=rank, svd=svd)
    A, B = decompose(delta, options).factors()
    turned_a, turned_b = decompose(np.ascontiguousarray(delta.T), options).factors()
    np.testing.assert_allclose(turned_b @ turned_a, (B @ A).T, atol=1e-4)
    assert np.linalg.norm(A) == pytest.approx(np.linalg.norm(B), rel=1e-5)


@quick
@given(seed=seeds, rank=st.integers(1, 5))
def test_no_other_adapter_of_its_rank_is_nearer(seed, rank):
    rng = np.random.default_rng(seed)
    delta = rng.standard_normal((12, 7)).astype("f4")
    found = decompose(delta, ExtractOptions(rank=rank, svd="exact"))
    least = np.linalg.norm(delta - (found.U * found.S) @ found.Vt)
    for _ in range(5):
        # The nearest update with a random row space.
        basis = np.linalg.qr(rng.standard_normal((7, rank)))[0]
        assert np.linalg.norm(delta - delta @ basis @ basis.T) >= least - 1e-5


def test_a_rank_4_fine_tune_is_extracted_whole_at_4_and_misses_its_tail_at_2(tmp_path):
    rng = np.random.default_rng(0)
    base = {"m.weight": rng.standard_normal((30, 20)).astype("f4")}
    update = rng.standard_normal((30, 4)) @ rng.standard_normal((4, 20))
    tuned = {"m.weight": (base["m.weight"] + update).astype("f4")}
    values = np.linalg.svd(update, compute_uv=False)
    for rank, missed in ((4, 0.0), (2, np.linalg.norm(values[2:]))):
        report = extract_adapter(
            MemorySource(base), MemorySource(tuned), tmp_path / str(rank), ExtractOptions(rank=rank)
        )
        adapted = load_adapter(tmp_path / str(rank)).apply("m.weight", base["m.weight"])
        error = np.linalg.norm(tuned["m.weight"] - adapted)
        assert error == pytest.approx(missed, abs=1e-3)
        assert report.residual * np.linalg.norm(update) == pytest.approx(missed, abs=1e-3)


@pytest.mark.parametrize("rank", [8, 32])
def test_a_flat_spectrum_cut_in_half_costs_the_randomized_svd_little(rank):
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.standard_normal((200, 2 * rank)))[0]
    v = np.linalg.qr(rng.standard_normal((150, 2 * rank)))[0]
    matrix = (u @ v.T).astype("f4")
    found = randomized_svd(matrix, rank)
    error = np.linalg.norm(matrix - (found.U * found.S) @ found.Vt)
    assert error <= 1.05 * np.sqrt(rank)


# A shared model and its low-rank companions.


@quick
@given(seed=seeds, rank=st.integers(0, 9))
def test_a_residual_of_any_rank_misses_its_tail_and_a_full_one_nothing(seed, rank):
    rng = np.random.default_rng(seed)
    target, shared = (rng.standard_normal((9, 7)).astype("f4") for _ in range(2))
    A, B = low_rank_residual(target, shared, rank) if rank else (np.zeros((0, 7)), np.zeros((9, 0)))
    values = np.linalg.svd((target - shared).astype(np.float64), compute_uv=False)
    error = np.linalg.norm(target - shared - B @ A)
    assert error == pytest.approx(np.linalg.norm(values[rank:]), abs=1e-4)


def test_layers_that_are_alike_have_no_residual():
    layer = np.random.default_rng(0).standard_normal((6, 5)).astype("f4")
    mean = np.mean([layer, layer], axis=0)
    A, B = low_rank_residual(layer, mean, 3)
    assert A.shape[1:] == (5,) and B.shape[0] == 6
    assert np.all(B @ A == 0)


@quick
@given(seed=seeds, scale=st.floats(0, 1))
def test_experts_are_restored_by_their_whole_residuals_whatever_they_share(seed, scale):
    rng = np.random.default_rng(seed)
    base, *experts = (rng.standard_normal((6, 5)).astype("f4") for _ in range(4))
    shared = base + np.float32(scale) * sum(expert - base for expert in experts)
    rank = twin_rank(base.shape, 0.0)
    residuals = [low_rank_residual(expert, shared, rank) for expert in experts]
    for expert, (A, B) in zip(experts, residuals, strict=True):
        np.testing.assert_allclose(shared + B @ A, expert, atol=1e-4)
    mean = shared + sum(B @ A for A, B in residuals) / 3
    np.testing.assert_allclose(mean, np.mean(experts, axis=0), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "rate", "rank"), [((10, 20), 0.9, 0), ((64, 20), 0.5, 10), ((7, 7), 1.0, 0)]
)
def test_twins_are_cut_to_the_published_rank(shape, rate, rank):
    assert twin_rank(shape, rate) == rank
