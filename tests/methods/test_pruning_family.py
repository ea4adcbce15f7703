"""Methods that choose entries: by magnitude, rank, variance, overlap, importance or distance."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit import kernels, merge_state_dicts
from fusekit.engine.planner import random_key
from fusekit.errors import RecipeError
from fusekit.methods.della import keep_probabilities
from fusekit.methods.model_stock import interpolation_ratio, mean_cosine
from fusekit.methods.sce import energy_weights
from tests.engine.support import assert_same_bytes, execute, random_models
from tests.vectors import Case, assert_close, read_case

StateDict = dict[str, np.ndarray]


def base_of(case: Case) -> StateDict:
    assert case.base is not None
    return case.base


def merge_case(case: Case, method: str, **options: Any) -> StateDict:
    """Merge a case; lists in the metadata are per-model values."""
    about = case.about
    each: list[dict[str, Any]] = [{} for _ in case.models]
    for key, name in (("weights", "weight"), ("density", "density"), ("epsilon", "epsilon")):
        for own, value in zip(each, about.get(key) or [], strict=False):
            own[name] = value
    for own, value in zip(each, about.get("gamma") or [], strict=False):
        own["gamma"] = value
    masks = options.pop("masks", None)
    return merge_state_dicts(
        case.models,
        method=method,
        base=case.base,
        model_parameters=each,
        parameters=options,
        masks=masks,
    )


# -- golden vectors --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_della_merges_as_the_reference(name: str) -> None:
    case = read_case("della", name)
    about = case.about
    options = {"normalize": about["normalize"], "rescale": "l1", "lambda": about["lambda"]}
    masks = case.numbered("in/mask")
    assert about["rescale"] is True
    assert_close(merge_case(case, about["method"], masks=masks, **options), case.merged, 1e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_della_prunes_as_the_reference(name: str) -> None:
    case = read_case("della", name)
    expected = case.numbered("out/pruned")
    for i, model in enumerate(case.models):
        merged = merge_state_dicts(
            [model],
            method="della_linear",
            base=case.base,
            parameters={"density": case.about["density"][i], "epsilon": case.about["epsilon"][i]},
            masks=[case.numbered("in/mask")[i]],
            out_dtype="float64",
        )
        found = {name: merged[name] - value for name, value in base_of(case).items()}
        assert_close(found, expected[i], 1e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_keep_probabilities_are_those_of_the_reference(name: str) -> None:
    case = read_case("della", name)
    for i, expected in enumerate(case.numbered("out/keep_prob")):
        density, epsilon = case.about["density"][i], case.about["epsilon"][i]
        found = {
            name: keep_probabilities(case.models[i][name] - base_of(case)[name], density, epsilon)
            for name in expected
        }
        assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_breadcrumbs_merges_as_the_reference(name: str) -> None:
    case = read_case("breadcrumbs", name)
    about = case.about
    options = {"normalize": about["normalize"], "lambda": about["lambda"]}
    assert_close(merge_case(case, about["method"], **options), case.merged, 1e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_breadcrumbs_prunes_as_the_reference(name: str) -> None:
    case = read_case("breadcrumbs", name)
    expected = case.numbered("out/pruned")
    for i, model in enumerate(case.models):
        merged = merge_state_dicts(
            [model],
            method="breadcrumbs",
            base=case.base,
            parameters={"density": case.about["density"][i], "gamma": case.about["gamma"][i]},
        )
        found = {name: merged[name] - value for name, value in base_of(case).items()}
        assert_close(found, expected[i], 1e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_sce(name: str) -> None:
    case = read_case("sce", name)
    merged = merge_case(case, "sce", select_topk=case.about["select_topk"])
    assert_close(merged, case.merged, 1e-6)


@pytest.mark.parametrize("variant", ["paper", "fuseai"])
@pytest.mark.parametrize("name", ["case1", "case2"])
def test_both_variants_of_sce(name: str, variant: str) -> None:
    case = read_case("sce-variants", name)
    merged = merge_case(case, "sce", select_topk=case.about["select_topk"], variant=variant)
    assert_close(merged, case.group(f"out/{variant}"), 1e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_model_stock(name: str) -> None:
    case = read_case("model-stock", name)
    merged = merge_case(case, "model_stock", filter_wise=case.about["filter_wise"])
    assert_close(merged, case.merged, 2e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_arcee_fusion(name: str) -> None:
    case = read_case("arcee-fusion", name)
    assert_close(merge_case(case, "arcee_fusion"), case.merged, 1e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_importance_of_arcee_fusion(name: str) -> None:
    case = read_case("arcee-fusion", name)
    for tensor, expected in case.group("out/importance").items():
        a, b = base_of(case)[tensor], case.models[0][tensor]
        length = a.shape[-1]
        rows, found = np.full(a.size // length, np.nan), np.empty(a.size, np.float32)
        kernels.divergence.softmax(a.ravel(), b.ravel(), length, 1e-8, rows)
        kernels.pairs.importance(a.ravel(), b.ravel(), rows, 0, length, found)
        np.testing.assert_allclose(found.reshape(a.shape), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_nearswap(name: str) -> None:
    case = read_case("nearswap", name)
    assert_close(merge_case(case, "nearswap", t=case.about["t"]), case.merged, 1e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_ram(name: str) -> None:
    case = read_case("ram", name)
    options: dict[str, Any] = {
        k: v for k, v in case.about.items() if k in {"epsilon", "r", "alpha"}
    }
    merged = merge_state_dicts(
        case.models, method=case.about["method"], base=case.base, parameters=options
    )
    assert_close(merged, case.merged, 1e-6)


# -- one engine ------------------------------------------------------------------------------------

SHAPES = {"w": (70, 601), "conv": (6, 40, 3, 5), "long": (30_000,), "column": (300, 1), "s": ()}

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("della", {"density": 0.4, "epsilon": 0.2}),
    ("della", {"density": 0.4, "rescale": "inverse", "election": "normmass"}),
    ("della_linear", {"density": 0.6, "rank_over": "slice", "rescale": "none"}),
    ("breadcrumbs", {"density": 0.3, "gamma": 0.1, "rescale": "l1"}),
    ("breadcrumbs_ties", {"density": 0.3, "gamma": 0.1, "zero": "majority"}),
    ("sce", {"select_topk": 0.3}),
    ("sce", {"select_topk": 0.3, "variant": "fuseai"}),
    ("task_vectors", {"prune": "variance", "select_topk": 0.2, "rescale": "l1"}),
    ("model_stock", {"filter_wise": True}),
    ("ramplus", {"epsilon": 0.05}),
]


def with_ties(state: StateDict) -> StateDict:
    """Few distinct values: many equal magnitudes and zeros."""
    return {name: np.round(values * 8).astype(np.float32) / 8 for name, values in state.items()}


@pytest.mark.parametrize("granularity", ["tensor", "model"])
@pytest.mark.parametrize(("method", "parameters"), SETTINGS)
def test_blocks_threads_and_residency_change_nothing(
    method: str, parameters: dict[str, Any], granularity: str
) -> None:
    base, models = random_models(SHAPES, 3)
    base, models = with_ties(base), [with_ties(model) for model in models]
    engines = (
        {"threads": 1, "block_elements": 1 << 20},
        {"threads": 3, "block_elements": 8192, "resident_bytes": 0},
    )
    first, second = (
        execute(models, method, base, engine, parameters=parameters, granularity=granularity)[0]
        for engine in engines
    )
    assert_same_bytes(second, first)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("sce", {"select_topk": 0.9}),
        ("ties", {"density": 0.9, "rescale": "l1"}),
        ("ties", {"density": 0.9, "election": "normmass"}),
        ("dare_ties", {"density": 0.5}),
        ("dare_linear", {"density": 0.5}),
        ("della", {"density": 0.5}),
        ("emr", {}),
        ("slerp", {"t": 0.5}),
    ],
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20])
def test_values_without_a_square_do_not_make_blocks_matter(
    method: str, parameters: dict[str, Any], bad: float
) -> None:
    size, kind = 5 * 8192 + 100, ml_dtypes.bfloat16
    rng = np.random.default_rng(0)
    updates = 10.0 ** rng.uniform(-20, 0, (4, size)) * rng.choice([-1, 1], (4, size))
    updates[2, ::3], updates[3] = -updates[0, ::3], 0.0
    updates[1, 20_000] = bad
    *models, base = ({"w": row.astype(kind)} for row in updates)
    count, origin = (2, None) if method == "slerp" else (3, base)
    engines = (
        {"threads": 1, "block_elements": 1 << 20, "allow_nonfinite": True},
        {"threads": 2, "block_elements": 8192, "resident_bytes": 0, "allow_nonfinite": True},
    )
    for dtype in ("float32", "bfloat16"):
        settings = {"parameters": parameters, "out_dtype": dtype}
        first, second = (
            execute(models[:count], method, origin, engine, **settings)[0] for engine in engines
        )
        assert_same_bytes(second, first)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_an_infinite_entry_scales_nothing_else(method: str) -> None:
    base, (model,) = random_models({"w": (50, 40)}, 1)
    model["w"][3, 7] = np.inf
    options = {"method": method, "base": base, "parameters": {"density": 0.5}}
    with pytest.warns(UserWarning, match="infinite"):
        merged = merge_state_dicts([model], **options, allow_nonfinite=True)["w"]
    assert np.count_nonzero(~np.isfinite(merged)) <= 1


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
def test_sce_keeps_nothing_where_the_share_is_less_than_one_position(kind: Any) -> None:
    updates = (np.random.default_rng(0).standard_normal((3, 2000)) * 1e30).astype(kind)
    base = {"w": np.ones(2000, kind)}  # variances of such updates are infinite
    models = [{"w": update} for update in updates]
    merged = merge_state_dicts(models, method="sce", base=base, parameters={"select_topk": 1e-4})
    assert_same_bytes(merged, base)


def test_arcee_fusion_does_not_depend_on_blocks() -> None:
    base, models = random_models(SHAPES, 1)
    engines = ({"threads": 1}, {"threads": 3, "block_elements": 8192, "resident_bytes": 0})
    for granularity in ("tensor", "model"):
        first, second = (
            execute([base, *models], "arcee_fusion", None, engine, granularity=granularity)[0]
            for engine in engines
        )
        assert_same_bytes(second, first)


# -- one pipeline ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters", "settings_of_the_pipeline"),
    [
        ("task_arithmetic", {}, {}),
        (
            "ties",
            {"density": 0.3, "rule": "threshold", "zero": "majority"},
            {"prune": "magnitude", "election": "mass", "normalize": True},
        ),
        ("ties", {"density": 0.3}, {"prune": "magnitude", "election": "mass", "normalize": True}),
        ("dare_linear", {"density": 0.4, "rescale": "l1"}, {"prune": "random"}),
        (
            "dare_ties",
            {"density": 0.4, "rescale": "inverse"},
            {"prune": "random", "election": "mass"},
        ),
        (
            "della",
            {"density": 0.4, "epsilon": 0.2, "rescale": "l1"},
            {"prune": "rank", "election": "mass", "normalize": True},
        ),
        ("della_linear", {"density": 0.4, "rescale": "inverse"}, {"prune": "rank"}),
        ("breadcrumbs", {"density": 0.3, "gamma": 0.05}, {"prune": "two_sided"}),
        (
            "breadcrumbs_ties",
            {"density": 0.3, "gamma": 0.05, "election": "count"},
            {"prune": "two_sided"},
        ),
        (
            "sce",
            {"select_topk": 0.2},
            {
                "prune": "variance",
                "weighting": "energy",
                "election": "mass",
                "weights_in_election": False,
                "normalize": True,
            },
        ),
    ],
)
def test_settings_of_the_pipeline_are_the_named_methods(
    method: str, parameters: dict[str, Any], settings_of_the_pipeline: dict[str, Any]
) -> None:
    base, models = random_models(SHAPES, 3)
    each = [{} if method == "sce" else {"weight": w} for w in (0.5, 1.0, -0.3)]
    named, _, _ = execute(models, method, base, parameters=parameters, model_parameters=each)
    pipeline, _, _ = execute(
        models,
        "task_vectors",
        base,
        parameters={**parameters, **settings_of_the_pipeline},
        model_parameters=each,
    )
    assert_same_bytes(pipeline, named)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"gamma": 0.2}, "gamma has no effect with prune: none"),
        ({"prune": "rank", "density": 0.5, "rule": "threshold"}, "rule has no effect with prune"),
        ({"zero": "majority"}, "zero has no effect with election: none"),
        ({"weight": 2.0, "weighting": "energy"}, "weight has no effect with weighting: energy"),
    ],
)
def test_settings_without_effect_are_refused(parameters: dict[str, Any], message: str) -> None:
    base, models = random_models({"w": (4, 4)}, 2)
    with pytest.raises(RecipeError, match=message):
        merge_state_dicts(models, method="task_vectors", base=base, parameters=parameters)


# -- DELLA -----------------------------------------------------------------------------------------


def drawn_by_rivals(
    delta: np.ndarray, density: float, epsilon: float, key: int, length: int, stride: int
) -> np.ndarray:
    """Which entries are kept, by the engine's random numbers: each meets one rival of its row."""
    numbers = np.empty(delta.size, np.uint32)
    kernels.random.uniform_bits(np.uint64(key), 0, numbers)
    spread = epsilon if length > 1 else 0.0
    first = int((density - spread) * 2.0**32)
    tickets = int((density + spread - (density - spread)) * 2.0**32)
    share, shift = kernels.lottery.rivals_per_ticket(length - 1, np.uint32(tickets))
    sizes = np.abs(delta).reshape(-1, length, stride)
    ticket = numbers.astype(np.int64).reshape(sizes.shape) - first
    plays = (ticket >= 0) & (ticket < tickets)
    here = np.arange(length)[:, None]
    rival = (np.where(plays, ticket, 0).astype(np.uint64) * share >> shift).astype(np.int64)
    before = rival < here
    other = np.take_along_axis(sizes, np.minimum(rival + ~before, length - 1), axis=1)
    wins = (other < sizes) | ((other == sizes) & before)
    keep: np.ndarray = ((ticket < 0) | (plays & wins)).reshape(delta.shape)
    return keep


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 700),
    distinct=st.sampled_from([0, 1, 2, 5, 40]),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    density=st.floats(0.25, 0.75),
    epsilon=st.floats(0.0, 0.24),
    seed=st.integers(0, 1000),
    wide=st.booleans(),
)
def test_entries_are_kept_if_they_beat_the_rival_drawn_for_them(
    rows: int,
    columns: int,
    distinct: int,
    spread: float,
    density: float,
    epsilon: float,
    seed: int,
    wide: bool,
) -> None:
    rng = np.random.default_rng(seed)
    octaves = np.clip(spread * rng.standard_normal((rows, columns)), -120, 120)
    delta = rng.standard_normal((rows, columns)) * 2.0**octaves
    if distinct:
        delta = rng.integers(-distinct, distinct + 1, delta.shape) / 4.0
    delta = delta.astype(np.float64 if wide else np.float32)
    merged = merge_state_dicts(
        [{"w": delta}],
        method="della_linear",
        base={"w": np.zeros_like(delta)},
        parameters={"density": density, "epsilon": epsilon, "rescale": "none"},
        seed=seed,
    )
    keep = drawn_by_rivals(delta, density, epsilon, random_key(seed, 0, "w"), columns, 1)
    np.testing.assert_array_equal(merged["w"], delta * keep)


@pytest.mark.parametrize(
    ("rank_over", "length", "stride"), [("axis1", 30, 15), ("slice", 450, 1), ("last", 5, 1)]
)
def test_rows_of_a_convolution(rank_over: str, length: int, stride: int) -> None:
    delta = np.random.default_rng(0).standard_normal((7, 30, 3, 5)).astype(np.float32)
    options = {"density": 0.5, "epsilon": 0.4, "rescale": "none", "rank_over": rank_over}
    merged = merge_state_dicts(
        [{"w": delta}],
        method="della_linear",
        base={"w": np.zeros_like(delta)},
        parameters=options,
    )
    keep = drawn_by_rivals(delta, 0.5, 0.4, random_key(0, 0, "w"), length, stride)
    np.testing.assert_array_equal(merged["w"], delta * keep)


def test_many_equal_magnitudes_are_ranked_by_position() -> None:
    delta = np.where(np.arange(4096) % 3 == 0, 1.0, 1.0 + 2**-23).astype(np.float32)
    merged = merge_state_dicts(
        [{"w": delta}],
        method="della_linear",
        base={"w": np.zeros_like(delta)},
        parameters={"density": 0.5, "epsilon": 0.4, "rescale": "none"},
    )
    keep = drawn_by_rivals(delta, 0.5, 0.4, random_key(0, 0, "w"), 4096, 1)
    np.testing.assert_array_equal(merged["w"], delta * keep)
    early, late = keep[:200].mean(), keep[-200:].mean()
    assert late > early + 0.2


def test_a_single_column_is_kept_with_the_density() -> None:
    ones = np.ones((20_000, 1), np.float32)
    assert (keep_probabilities(ones, 0.3, 0.2) == 0.3).all()
    merged = merge_state_dicts(
        [{"w": ones}],
        method="della_linear",
        base={"w": 0 * ones},
        parameters={"density": 0.3, "epsilon": 0.2, "rescale": "none"},
    )
    assert abs(merged["w"].mean() - 0.3) < 5 * (0.3 * 0.7 / ones.size) ** 0.5


def test_the_kept_share_is_the_density_and_grows_with_the_rank() -> None:
    delta = np.random.default_rng(1).standard_normal((200, 500)).astype(np.float32)
    merged = merge_state_dicts(
        [{"w": delta}],
        method="della_linear",
        base={"w": 0 * delta},
        parameters={"density": 0.4, "epsilon": 0.3, "rescale": "none"},
    )
    kept = merged["w"] != 0
    assert abs(kept.mean() - 0.4) < 5 * (0.4 * 0.6 / delta.size) ** 0.5
    ranks = np.argsort(np.argsort(np.abs(delta), axis=1), axis=1)
    shares = [kept[(ranks >= a) & (ranks < a + 100)].mean() for a in range(0, 500, 100)]
    assert shares == sorted(shares)
    assert abs(shares[0] - 0.16) < 0.02
    assert abs(shares[4] - 0.64) < 0.02


def test_inverse_rescaling_divides_by_each_entrys_probability() -> None:
    delta = np.random.default_rng(2).standard_normal((30, 64)).astype(np.float32)
    options = {"density": 0.5, "epsilon": 0.3}
    plain, scaled = (
        merge_state_dicts(
            [{"w": delta}],
            method="della_linear",
            base={"w": 0 * delta},
            parameters={**options, "rescale": rescale},
        )["w"]
        for rescale in ("none", "inverse")
    )
    expected = plain / keep_probabilities(delta, 0.5, 0.3)
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)


def test_l1_rescaling_keeps_the_sum_of_magnitudes() -> None:
    delta = np.random.default_rng(3).standard_normal((30, 64)).astype(np.float32)
    merged = merge_state_dicts(
        [{"w": delta}],
        method="della_linear",
        base={"w": 0 * delta},
        parameters={"density": 0.3},
    )
    assert (merged["w"] == 0).any()
    np.testing.assert_allclose(np.abs(merged["w"]).sum(), np.abs(delta).sum(), rtol=1e-5)


def test_della_loses_less_than_dare_at_the_same_density() -> None:
    base, models = random_models({"w": (64, 256)}, 3)
    exact = sum(m["w"] - base["w"] for m in models)

    def error(method: str, **options: Any) -> float:
        merged = merge_state_dicts(
            models, method=method, base=base, parameters={"density": 0.3, **options}
        )
        return float(np.linalg.norm(merged["w"] - base["w"] - exact))

    assert error("della_linear", epsilon=0.25) < error("dare_linear")


def test_the_same_model_twice_is_two_models_with_masks_of_their_own() -> None:
    base, (model,) = random_models({"w": (40, 300)}, 1)
    each = [{"weight": 1.0}, {"weight": 3.0}]
    merged = merge_state_dicts(
        [model, model],
        method="della_linear",
        base=base,
        model_parameters=each,
        parameters={"density": 0.5, "rescale": "none"},
    )
    factors = np.round((merged["w"] - base["w"]) / (model["w"] - base["w"]), 2)
    assert set(np.unique(factors)) == {0.0, 1.0, 3.0, 4.0}


def test_density_one_and_zero_keep_everything_and_nothing() -> None:
    base, models = random_models({"w": (9, 30)}, 2)
    for method in ("della_linear", "breadcrumbs"):
        merged = merge_state_dicts(
            models,
            method=method,
            base=base,
            model_parameters=[{"density": 1.0}, {"density": 0.0}],
        )
        np.testing.assert_allclose(merged["w"], models[0]["w"], rtol=1e-6)


def test_density_and_epsilon_that_do_not_fit_are_refused() -> None:
    base, models = random_models({"w": (4, 4)}, 1)
    with pytest.raises(RecipeError, match=r"density 0.9 and epsilon 0.15 .* from 0.75 to 1.05"):
        merge_state_dicts(models, method="della", base=base, parameters={"density": 0.9})
    with pytest.raises(RecipeError, match=r"density 0.1 and epsilon 0.1"):
        keep_probabilities(np.ones(3), 0.1, 0.1)


# -- Breadcrumbs -----------------------------------------------------------------------------------


def pruned(
    delta: np.ndarray, method: str = "breadcrumbs", granularity: Any = "tensor", **options: Any
) -> np.ndarray:
    """What a method leaves of a single task vector."""
    merged = merge_state_dicts(
        [{"w": delta}],
        method=method,
        base={"w": np.zeros_like(delta)},
        parameters=options,
        granularity=granularity,
    )
    left: np.ndarray = merged["w"]
    return left


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(1, 3000),
    density=st.floats(0.01, 0.99),
    gamma=st.floats(0.0, 0.9),
    distinct=st.sampled_from([0, 3, 50]),
    seed=st.integers(0, 100),
)
def test_breadcrumbs_keeps_exactly_the_entries_behind_the_largest(
    size: int, density: float, gamma: float, distinct: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    delta = rng.standard_normal(size).astype(np.float32)
    if distinct:
        delta = rng.integers(1, distinct + 1, size).astype(np.float32)
    found = pruned(delta, density=density, gamma=gamma)
    target = max(1, int(density * size))
    top = min(int(gamma * size), size - target)
    order = np.argsort(-np.abs(delta), kind="stable")
    expected = np.zeros_like(delta)
    expected[order[top : top + target]] = delta[order[top : top + target]]
    np.testing.assert_array_equal(found, expected)


def test_ties_at_both_cuts_are_split_by_position_across_granules() -> None:
    delta = np.ones(40_000, np.float32)
    found = pruned(delta, density=0.5, gamma=0.25)
    np.testing.assert_array_equal(np.flatnonzero(found), np.arange(10_000, 30_000))


def test_small_tensors_keep_their_entries_when_gamma_rounds_to_nothing() -> None:
    delta = np.arange(1, 65, dtype=np.float32)
    found = pruned(delta, density=0.5, gamma=0.01)
    np.testing.assert_array_equal(np.flatnonzero(found), np.arange(32, 64))
    np.testing.assert_array_equal(pruned(delta[:3], density=0.1), [0, 0, 3])


def test_without_gamma_breadcrumbs_trims_as_ties_does() -> None:
    rng = np.random.default_rng(0)
    delta = rng.integers(-5, 6, 20_000).astype(np.float32)
    for granularity in ("tensor", "model"):
        found = pruned(delta, granularity=granularity, density=0.3, gamma=0.0)
        expected = pruned(delta, "ties", granularity, density=0.3)
        np.testing.assert_array_equal(found, expected)


def test_outliers_of_one_model_do_not_reach_the_merge() -> None:
    base, models = random_models({"w": (50, 50)}, 2)
    spoilt = {"w": models[0]["w"].copy()}
    spoilt["w"].reshape(-1)[::250] += 1000.0
    merged = merge_state_dicts(
        [spoilt, models[1]],
        method="breadcrumbs",
        base=base,
        parameters={"density": 0.9, "gamma": 0.01},
    )
    assert np.abs(merged["w"] - base["w"]).max() < 1.0


# -- SCE -------------------------------------------------------------------------------------------


def test_energy_weights_are_shares_whatever_the_scale() -> None:
    assert energy_weights([1.0, 3.0], 10) == (0.25, 0.75)
    assert energy_weights([2.0**-70, 3 * 2.0**-70], 10) == (0.25, 0.75)
    assert energy_weights([0.0, 0.0], 10) == (0.5, 0.5)
    assert energy_weights([1e-8, 3e-8], 10, floor=1e-6) == (0.5, 0.5)


@pytest.mark.parametrize("select_topk", [0.3, 1.0])
def test_sce_scales_with_small_updates(select_topk: float) -> None:
    base, models = random_models({"w": (60, 50)}, 3)
    zero = {"w": np.zeros_like(base["w"])}
    deltas = [m["w"] - base["w"] for m in models]
    first, second = (
        merge_state_dicts(
            [{"w": scale * d} for d in deltas],
            method="sce",
            base=zero,
            parameters={"select_topk": select_topk},
        )["w"]
        for scale in (np.float32(1.0), np.float32(2.0**-20))
    )
    np.testing.assert_array_equal(second, first * np.float32(2.0**-20))
    assert (first != 0).any()


def test_sce_selects_from_the_positions_that_vary() -> None:
    base = {"w": np.zeros(100, np.float32)}
    models = [{"w": np.full(100, 1.0, np.float32)} for _ in range(2)]
    models[0]["w"][:10] += np.arange(1, 11, dtype=np.float32)
    merged = merge_state_dicts(models, method="sce", base=base, parameters={"select_topk": 0.35})
    np.testing.assert_array_equal(np.flatnonzero(merged["w"]), [7, 8, 9])


@pytest.mark.parametrize("variant", ["paper", "fuseai"])
def test_identical_models_give_sce_nothing_to_select(variant: str) -> None:
    base, (model,) = random_models({"w": (20, 20)}, 1)
    options: dict[str, Any] = {"select_topk": 0.5, "variant": variant}
    merged = merge_state_dicts([model] * 3, method="sce", base=base, parameters=options)
    np.testing.assert_array_equal(merged["w"], base["w"])
    options["select_topk"] = 1.0
    merged = merge_state_dicts([model] * 3, method="sce", base=base, parameters=options)
    np.testing.assert_allclose(merged["w"], model["w"], rtol=1e-6)


# -- Model Stock -----------------------------------------------------------------------------------


def test_ratio_for_known_angles() -> None:
    assert interpolation_ratio(1.0, 2, clip=False) == 1.0
    assert interpolation_ratio(0.0, 3, clip=False) == 0.0
    assert interpolation_ratio(0.5, 2, clip=False) == pytest.approx(2 / 3)
    assert interpolation_ratio(-0.2, 2, clip=False) == pytest.approx(-0.5)
    assert interpolation_ratio(-0.2, 2, clip=True) == 0.0
    assert interpolation_ratio(-1.0, 2, clip=False) == 0.0


def test_angles_do_not_depend_on_the_scale_of_the_updates() -> None:
    gram = [[1e-24, 5e-25], [5e-25, 1e-24]]
    assert mean_cosine(gram) == pytest.approx(0.5)
    assert mean_cosine([[0.0, 0.0], [0.0, 1.0]]) == 0.0


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_of_special_models(filter_wise: bool) -> None:
    base = {"w": np.zeros((3, 4), np.float32)}
    a, b = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    a[:, 0], b[:, 1] = 1.0, 2.0
    options = {"filter_wise": filter_wise}

    def stock(*models: np.ndarray) -> np.ndarray:
        states = [{"w": m} for m in models]
        merged = merge_state_dicts(states, method="model_stock", base=base, parameters=options)
        result: np.ndarray = merged["w"]
        return result

    np.testing.assert_array_equal(stock(a, b), base["w"])
    np.testing.assert_allclose(stock(a, a, a), a, rtol=1e-6)
    np.testing.assert_array_equal(stock(a, -a), base["w"])
    np.testing.assert_array_equal(stock(0 * a, 0 * a), base["w"])
    for seed in range(20):  # the cosines of some are not quite -1
        update = np.random.default_rng(seed).standard_normal((3, 4))
        np.testing.assert_array_equal(stock(update, -3 * update), base["w"])


@pytest.mark.parametrize("filter_wise", [False, True])
def test_clipping_stays_at_the_base_where_fine_tunes_point_apart(filter_wise: bool) -> None:
    base = {"w": np.zeros((2, 2))}
    models = [
        {"w": np.array([[4.0, 3.0], [4.0, 3.0]])},
        {"w": np.array([[-4.0, 3.0], [-4.0, 3.0]])},
    ]

    def stock(clip: bool) -> np.ndarray:
        options = {"filter_wise": filter_wise, "clip": clip}
        merged = merge_state_dicts(models, method="model_stock", base=base, parameters=options)
        result: np.ndarray = merged["w"]
        return result

    ratio = 2 * -0.28 / (1 - 0.28)  # the cosine is (9 - 16) / 25
    np.testing.assert_allclose(stock(clip=False), ratio * np.array([[0.0, 3.0], [0.0, 3.0]]))
    np.testing.assert_array_equal(stock(clip=True), base["w"])


def test_model_stock_scales_with_the_updates() -> None:
    base, models = random_models({"w": (30, 40)}, 3)
    zero = {"w": 0 * base["w"]}
    shared = np.random.default_rng(9).standard_normal((30, 40)).astype(np.float32)
    deltas = [shared + m["w"] - base["w"] for m in models]
    first, second = (
        merge_state_dicts([{"w": scale * d} for d in deltas], method="model_stock", base=zero)["w"]
        for scale in (np.float32(1.0), np.float32(2.0**-30))
    )
    assert np.abs(first).max() > 0.5
    np.testing.assert_array_equal(second, first * np.float32(2.0**-30))


def test_model_stock_needs_two_models() -> None:
    base, models = random_models({"w": (2, 2)}, 1)
    with pytest.raises(RecipeError, match="model_stock merges at least 2"):
        merge_state_dicts(models, method="model_stock", base=base)


# -- Arcee Fusion ----------------------------------------------------------------------------------


def fused_by_definition(a: np.ndarray, b: np.ndarray, factor: float) -> np.ndarray:
    """Float64, with a sort."""

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        shares: np.ndarray = e / e.sum(axis=-1, keepdims=True) + 1e-8
        return shares

    p, q = softmax(b.astype(np.float64)), softmax(a.astype(np.float64))
    divergence = (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    score = (np.abs(b.astype(np.float64) - a) * divergence).astype(np.float32)
    ordered = np.sort(score, axis=None).astype(np.float64)
    first, median, third = (ordered[int(z * (score.size - 1))] for z in (0.25, 0.5, 0.75))
    chosen: np.ndarray = np.where(score >= median + factor * (third - first), b, a)
    return chosen


@pytest.mark.parametrize("scale", [0.02, 1.0, 200.0])
@pytest.mark.parametrize("factor", [0.0, 1.5])
def test_arcee_fusion_takes_what_the_definition_takes(scale: float, factor: float) -> None:
    rng = np.random.default_rng(4)
    a = (scale * rng.standard_normal((50, 333))).astype(np.float32)
    b = (a + 0.1 * scale * rng.standard_normal(a.shape)).astype(np.float32)
    merged = merge_state_dicts(
        [{"w": b}], method="arcee_fusion", base={"w": a}, parameters={"factor": factor}
    )["w"]
    expected = fused_by_definition(a, b, factor)
    assert (merged != expected).mean() < 2e-4  # roundings of scores at the threshold
    taken = merged == b
    assert 0.02 < taken.mean() < 0.6
    assert np.abs(b - a)[taken].mean() > np.abs(b - a)[~taken].mean()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float64])
def test_arcee_fusion_of_tensors_whose_importances_are_counted(dtype: Any) -> None:
    rng = np.random.default_rng(6)
    a = (0.05 * rng.standard_normal((500, 401))).astype(dtype)
    b = (a.astype(np.float32) + 0.005 * rng.standard_normal(a.shape)).astype(dtype)
    b[0] = a[0]
    b[1, 3] = 4.0
    first, second = (
        merge_state_dicts([{"w": b}], method="arcee_fusion", base={"w": a}, threads=threads)["w"]
        for threads in (1, 3)
    )
    np.testing.assert_array_equal(first, second)
    expected = fused_by_definition(a.astype(np.float64), b.astype(np.float64), 1.5)
    assert (first != expected).mean() < 2e-5


def test_arcee_fusion_of_a_model_with_itself_changes_nothing() -> None:
    base, _ = random_models({"w": (9, 30), "v": (5,)}, 1)
    merged = merge_state_dicts(
        [{k: v.copy() for k, v in base.items()}], method="arcee_fusion", base=base
    )
    assert_same_bytes(merged, base)


def test_arcee_fusion_needs_exactly_two_models() -> None:
    base, models = random_models({"w": (2, 2)}, 2)
    with pytest.raises(RecipeError, match=r"arcee_fusion merges 2 model\(s\), found 3"):
        merge_state_dicts(models, method="arcee_fusion", base=base)


# -- NearSwap --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(t=st.one_of(st.floats(0, 2e-6), st.floats(0, 1)), seed=st.integers(0, 100))
def test_nearswap_is_its_definition(t: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal(200)
    b = a + rng.standard_normal(200) * 10.0 ** rng.integers(-8, 1, 200)
    merged = merge_state_dicts([{"w": b}], method="nearswap", base={"w": a}, parameters={"t": t})[
        "w"
    ]
    weight = np.clip(t / np.maximum(np.abs(a - b), 1e-6), 0.0, 1.0)
    np.testing.assert_allclose(merged, weight * b + (1 - weight) * a, rtol=0, atol=1e-14)
    assert (np.abs(merged - a) <= t + 1e-15).all()


def test_nearswap_at_its_ends() -> None:
    base, (model,) = random_models({"w": (20, 20)}, 1)
    for t, expected in ((0.0, base), (-1.0, base), (1e3, model)):
        merged = merge_state_dicts([model], method="nearswap", base=base, parameters={"t": t})
        assert_same_bytes(merged, expected)


# -- RAM -------------------------------------------------------------------------------------------


def sparse_models(overlap: bool) -> tuple[StateDict, list[StateDict]]:
    base, _ = random_models({"w": (30, 40)}, 1)
    models = []
    for i in range(3):
        changed = base["w"].copy().reshape(-1)
        changed[slice(None) if overlap else slice(i, None, 3)] += np.float32(0.25 * (i + 1))
        models.append({"w": changed.reshape(30, 40)})
    return base, models


def test_disjoint_updates_are_all_kept_in_full() -> None:
    base, models = sparse_models(overlap=False)
    expected = base["w"] + sum(m["w"] - base["w"] for m in models)
    for method in ("ram", "ramplus_tl", "ramplus"):
        merged = merge_state_dicts(models, method=method, base=base)
        np.testing.assert_allclose(merged["w"], expected, rtol=1e-6)


def test_shared_updates_are_averaged() -> None:
    base, models = sparse_models(overlap=True)
    expected = base["w"] + np.mean([m["w"] - base["w"] for m in models], axis=0)
    for method in ("ram", "ramplus_tl", "ramplus"):
        merged = merge_state_dicts(models, method=method, base=base)
        np.testing.assert_allclose(merged["w"], expected, rtol=1e-6)


def test_updates_up_to_epsilon_count_as_none() -> None:
    base = {"w": np.zeros(4, np.float32)}
    models = [{"w": np.array([1, 2, 3, 0], np.float32)}, {"w": np.array([0, 1, 4, 1], np.float32)}]
    merged = merge_state_dicts(models, method="ram", base=base, parameters={"epsilon": 1.0})
    np.testing.assert_array_equal(merged["w"], [0, 2, 3.5, 0])


def test_overlap_is_counted_over_the_whole_model_or_a_tensor() -> None:
    zeros = np.zeros(100, np.float32)
    base = {"a": zeros, "b": zeros}
    ones = np.ones(100, np.float32)
    half = np.where(np.arange(100) < 10, 1, 0).astype(np.float32)
    models = [{"a": ones, "b": ones}, {"a": half, "b": zeros}]
    # Model 0 shares 10 of 100 entries in `a` (10 / 90), none in `b`, 10 / 190 over both.
    for method, scope, share in (
        ("ramplus_tl", None, {"a": 10 / 90, "b": 0.0}),
        ("ramplus", "tensor", {"a": 10 / 90, "b": 0.0}),
        ("ramplus", None, {"a": 10 / 190, "b": 10 / 190}),
    ):
        options: dict[str, Any] = {"r": 1.0, "alpha": 0.5}
        if scope:
            options["scope"] = scope
        merged = merge_state_dicts(models, method=method, base=base, parameters=options)
        for name, expected in share.items():
            assert merged[name][50] == pytest.approx(1 + expected)
            assert merged[name][5] == pytest.approx(1.0 if name == "a" else 1 + expected)


def test_a_model_that_shares_everything_is_amplified_up_to_alpha() -> None:
    base = {"w": np.zeros(3, np.float32)}
    models = [{"w": np.array([1, 1, 0], np.float32)}, {"w": np.array([1, 1, 1], np.float32)}]
    options = {"r": 0.5, "alpha": 0.2, "epsilon": 0.0}
    merged = merge_state_dicts(models, method="ramplus_tl", base=base, parameters=options)
    np.testing.assert_allclose(merged["w"], [1, 1, 1 + 0.5 * 0.2], rtol=1e-6)


# -- the order of models ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("breadcrumbs", {"density": 0.3, "gamma": 0.1}),
        ("breadcrumbs_ties", {"density": 0.3, "gamma": 0.1}),
        ("sce", {"select_topk": 0.3}),
        ("model_stock", {}),
        ("ram", {"epsilon": 0.1}),
        ("ramplus", {"epsilon": 0.1}),
    ],
)
def test_the_order_of_the_models_has_no_meaning(method: str, parameters: dict[str, Any]) -> None:
    base, models = random_models({"w": (40, 50), "v": (7,)}, 4)
    first = merge_state_dicts(models, method=method, base=base, parameters=parameters)
    second = merge_state_dicts(models[::-1], method=method, base=base, parameters=parameters)
    assert_close(second, first, 1e-6)
