"""Parameter competition balancing against the authors' results and its own properties."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from fusekit import merge_state_dicts
from fusekit.engine import blocks
from fusekit.errors import CheckpointError, RecipeError
from fusekit.kernels import compete
from tests.vectors import assert_close, read_case

State = dict[str, np.ndarray]


def pcb(models: list[State], base: State, **options: Any) -> State:
    granularity = options.pop("granularity", "model")
    threads = options.pop("threads", None)
    return merge_state_dicts(
        models,
        method="pcb",
        base=base,
        parameters=options,
        granularity=granularity,
        threads=threads,
    )


def random_models(seed: int, count: int, size: int = 400) -> tuple[list[State], State]:
    rng = np.random.default_rng(seed)
    base = {"a": rng.normal(size=(size // 20, 20)), "b": rng.normal(size=20)}
    models = [
        {k: v + 0.02 * rng.normal(size=v.shape) for k, v in base.items()} for _ in range(count)
    ]
    return models, base


@pytest.mark.parametrize("name", ["case0", "case1", "case2"])
def test_merges_as_the_authors_programs(name: str) -> None:
    case = read_case("pcb-merging", name)
    merged = merge_state_dicts(
        case.models,
        method="pcb",
        base=case.base,
        model_parameters=[{"weight": lam} for lam in case.about["lams"]],
        parameters={"variant": case.about["variant"], "ratio": case.about["pcb_ratio"]},
        granularity="model",
    )
    assert_close(merged, case.merged, 2e-6)


@pytest.mark.parametrize("name", ["case0", "case1", "case2"])
def test_scales_are_those_of_the_authors_and_keep_the_share_ratio(name: str) -> None:
    case = read_case("pcb-merging", name)
    names, about = sorted(case.base), case.about

    def flat(state: State) -> np.ndarray:
        return np.concatenate([state[key].ravel() for key in names])

    deltas = np.stack([flat(model) - flat(case.base) for model in case.models])
    size, clamp = deltas.shape[1], about["clamp"]
    ascending = np.sort(np.abs(deltas), axis=1)
    low, high = ascending[:, int(size * clamp)], ascending[:, int(size * (1 - clamp) - 1)]
    score = np.empty_like(deltas)
    comparison = {"root": 0, "nlp": 0, "vision": 1}[about["variant"]]
    compete.scores(deltas, low.copy(), high.copy(), comparison, score)
    cut = np.sort(score, axis=1)[:, [int(size * (1 - about["pcb_ratio"]))]]
    scale = np.maximum(score - cut, 0) / (score.max(axis=1, keepdims=True) - cut)
    for found, expected in zip(scale, case.numbered("out/score_scale"), strict=True):
        np.testing.assert_allclose(found, flat(expected), rtol=1e-4, atol=1e-6)
        assert abs(np.count_nonzero(found) - about["pcb_ratio"] * size) <= 1


def reference(deltas: np.ndarray, ratio: float, variant: str, clamp: float) -> np.ndarray:
    """The update in float64 over flat task vectors (n, D)."""
    n, size = deltas.shape
    ascending = np.sort(np.abs(deltas), axis=1)
    low = ascending[:, [int(size * clamp)]]
    high = ascending[:, [int(size * (1 - clamp) - 1)]]
    sizes = np.clip(np.abs(deltas), low, high)
    normal = np.sign(deltas) * (sizes - low) / (high - low)
    if variant == "vision_es":
        agreement = np.tanh(normal[:, None] * normal[None]).sum(axis=1)
    else:
        agreement = np.tanh(deltas * (normal if variant == "vision" else deltas).sum(axis=0))
    score = np.exp(n * normal**2) * agreement
    cut = np.sort(score, axis=1)[:, [int(size * (1 - ratio))]]
    scale = np.maximum(score - cut, 0) / (score.max(axis=1, keepdims=True) - cut)
    return (np.sign(deltas) * sizes * scale).sum(axis=0) / np.maximum(scale.sum(axis=0), 1e-12)


@pytest.mark.parametrize("variant", ["root", "nlp", "vision", "vision_es"])
@pytest.mark.parametrize("magnitude", [0.01, 1.0, 30.0])
def test_every_variant_follows_its_formula(variant: str, magnitude: float) -> None:
    rng = np.random.default_rng(5)
    base = {"w": rng.normal(size=(30, 40)).astype(np.float32)}
    models = [{"w": base["w"] + magnitude * rng.normal(size=(30, 40)).astype("f4")} for _ in "abcd"]
    deltas = np.stack([(m["w"] - base["w"]).ravel() for m in models]).astype(np.float64)
    clamp = 1e-4 if variant == "root" else 0.01
    merged = pcb(models, base, variant=variant, ratio=0.2, **{"lambda": 1.5})
    expected = base["w"].ravel() + 1.5 * reference(deltas, 0.2, variant, clamp)
    # A product that underflows the tie between the largest scores may fall either way.
    close = np.isclose(merged["w"].ravel(), expected, atol=2e-4 * magnitude)
    assert close.mean() > 0.99


@given(st.integers(0, 1000), st.integers(2, 4))
@settings(max_examples=15, deadline=None)
def test_order_of_models_does_not_matter(seed: int, count: int) -> None:
    models, base = random_models(seed, count)
    merged = pcb(models, base)
    again = pcb(models[::-1], base)
    for name in merged:
        np.testing.assert_allclose(merged[name], again[name], atol=1e-7)


def test_small_updates_scale_with_their_models() -> None:
    models, base = random_models(3, 3)
    scaled = [{k: base[k] + 0.1 * (m[k] - base[k]) for k in base} for m in models]
    one, tenth = pcb(models, base), pcb(scaled, base)
    for name in base:
        update = one[name] - base[name]
        np.testing.assert_allclose(
            10 * (tenth[name] - base[name]), update, atol=2e-3 * np.abs(update).max()
        )


def test_untouched_entries_stay() -> None:
    models, base = random_models(4, 3)
    for model in models:
        model["a"][:, :5] = base["a"][:, :5]
    merged = pcb(models, base, ratio=0.5)
    np.testing.assert_array_equal(merged["a"][:, :5], base["a"][:, :5])


def test_an_unchanged_model_takes_no_part() -> None:
    models, base = random_models(6, 3)
    with_base = pcb([*models, {k: v.copy() for k, v in base.items()}], base, ratio=1.0)
    assert all(np.isfinite(values).all() for values in with_base.values())
    assert any((with_base[name] != base[name]).any() for name in base)
    alone = pcb([{k: v.copy() for k, v in base.items()}], base)
    for name in base:
        np.testing.assert_array_equal(alone[name], base[name])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_updates_so_rare_that_they_are_clipped_to_nothing_still_count(dtype: Any) -> None:
    rng = np.random.default_rng(4)
    base = {"w": np.zeros(1000, dtype)}
    dense = rng.normal(size=1000).astype(dtype)
    rare = np.where(np.arange(1000) < 5, np.float32(2) * dense, 0).astype(dtype)
    merged = pcb([{"w": dense}, {"w": rare}], base, ratio=1.0)["w"].astype(np.float64)
    alone = pcb([{"w": dense}], base, ratio=1.0)["w"].astype(np.float64)
    assert (np.abs(merged[:5]) < 0.75 * np.abs(alone[:5])).all()


def test_one_model_is_copied_with_clipped_sizes() -> None:
    (model,), base = random_models(7, 1)
    merged = pcb([model], base, ratio=1.0, clamp=0.0)
    changed = merged["a"] != base["a"]
    assert changed.mean() > 0.95
    np.testing.assert_allclose(merged["a"][changed], model["a"][changed], rtol=1e-6)


def test_tensors_of_one_element_and_ties_stay_finite() -> None:
    base = {"a": np.zeros(1, "f4"), "b": np.zeros(6, "f4")}
    models = [{"a": np.ones(1, "f4"), "b": np.full(6, 0.5, "f4")} for _ in range(2)]
    merged = pcb(models, base, granularity="tensor")
    np.testing.assert_allclose(merged["a"], 1.0)
    np.testing.assert_allclose(merged["b"], 0.5)


@pytest.mark.parametrize("variant", ["root", "nlp", "vision", "vision_es"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_updates_at_the_end_of_the_range_stay_finite(dtype: Any, variant: str) -> None:
    rng = np.random.default_rng(6)
    base = {"w": np.zeros(500, dtype)}
    models = [{"w": (1e-39 * rng.normal(size=500)).astype(dtype)} for _ in "ab"]
    merged = pcb(models, base, variant=variant)["w"].astype(np.float64)
    assert np.abs(merged).max() < 1e-38


def test_many_models_do_not_overflow() -> None:
    models, base = random_models(8, 95, size=60)
    merged = pcb([{k: v.astype("f4") for k, v in m.items()} for m in models], base)
    assert all(np.isfinite(values).all() for values in merged.values())


@pytest.mark.parametrize("granularity", ["tensor", "model"])
def test_threads_do_not_change_the_result(granularity: str) -> None:
    rng = np.random.default_rng(9)
    base = {"a": rng.normal(size=300_000).astype("f4"), "b": rng.normal(size=70_001).astype("f4")}
    models = [{k: v + 0.1 * rng.normal(size=v.shape).astype("f4") for k, v in base.items()}] * 2
    one = pcb(models, base, granularity=granularity, threads=1)
    four = pcb(models, base, granularity=granularity, threads=4)
    for name in base:
        np.testing.assert_array_equal(one[name], four[name])


@pytest.mark.parametrize("ratio", [0.0, 1.5])
def test_refuses_a_ratio_outside_its_range(ratio: float) -> None:
    models, base = random_models(1, 2)
    with pytest.raises(RecipeError, match=r"parameters\.ratio: found .*, expected a number in"):
        pcb(models, base, ratio=ratio)


@njit
def _exponentials(x: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = compete.exponential(x[i])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_polynomials_are_accurate(dtype: Any) -> None:
    x = np.concatenate([-np.geomspace(1e-12, 80, 4000), [0.0]]).astype(dtype)
    found = np.empty_like(x)
    _exponentials(x, found)
    np.testing.assert_allclose(found, np.exp(x.astype(np.float64)), rtol=1e-6)
    for values in (x, -x, x[np.abs(x) < 0.2]):
        found = values.copy()
        compete.tangent(found)
        np.testing.assert_allclose(found, np.tanh(values.astype(np.float64)), rtol=1e-6)


def test_sampled_edges_are_close_to_the_exact_ones() -> None:
    models, base = random_models(11, 3, size=3_000_000)
    wide = [{k: v.astype("f4") for k, v in state.items()} for state in [base, *models]]
    exact, sampled = (
        pcb(wide[1:], wide[0], edges=edges)["a"] - wide[0]["a"] for edges in ("exact", "sampled")
    )
    assert (exact != sampled).any()
    assert np.abs(exact - sampled).mean() < 2e-3 * np.abs(exact).mean()


def test_edges_of_small_models_are_exact_either_way() -> None:
    models, base = random_models(12, 2)
    exact, sampled = (pcb(models, base, edges=edges) for edges in ("exact", "sampled"))
    assert_close(sampled, exact, 0.0)


def bfloat16_models(seed: int, shape: tuple[int, ...]) -> tuple[list[State], State]:
    rng = np.random.default_rng(seed)
    base = (0.05 * rng.normal(size=shape)).astype(ml_dtypes.bfloat16)
    models = [
        {"a": (base.astype("f4") + 0.004 * rng.normal(size=shape)).astype(base.dtype)}
        for _ in range(3)
    ]
    return models, {"a": base}


@pytest.mark.parametrize("variant", ["nlp", "vision", "vision_es"])
def test_bfloat16_models_give_what_decoded_ones_give(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, base = bfloat16_models(13, (450, 401))
    packed, threaded = (pcb(models, base, variant=variant, threads=threads) for threads in (1, 3))
    monkeypatch.setattr(blocks, "KINDS", {})
    decoded = pcb(models, base, variant=variant)
    bits, others = (state["a"].view(np.uint16).astype(np.int64) for state in (packed, decoded))
    assert np.abs(bits - others).max() <= 1
    assert np.count_nonzero(bits != others) <= 1e-3 * bits.size
    assert np.count_nonzero(packed["a"] != base["a"]) > 0.05 * bits.size
    assert_close(threaded, packed, 0.0)


def test_a_single_winner_of_bfloat16_models_is_taken_whole() -> None:
    models, base = bfloat16_models(14, (40, 30))
    merged = pcb(models[:1], base, ratio=1e-6)["a"]
    changed = np.flatnonzero(merged != base["a"])
    assert changed.size == 1
    delta = models[0]["a"].astype("f4") - base["a"].astype("f4")
    high = np.sort(np.abs(delta), axis=None)[int(0.99 * delta.size - 1)]
    update = merged.astype("f4") - base["a"].astype("f4")
    np.testing.assert_allclose(np.abs(update.flat[changed]), high, rtol=0.02)


@pytest.mark.parametrize("edges", ["exact", "sampled"])
def test_nan_is_refused_however_edges_are_found(edges: str) -> None:
    models, base = bfloat16_models(15, (1200, 1000))
    models[1]["a"][700, [3, 5]] = np.nan
    with pytest.raises(CheckpointError, match="'a' has 2 NaN or infinite"):
        pcb(models, base, edges=edges, granularity="tensor")
