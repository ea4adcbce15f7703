"""Merging whole matrices in the engine gives the official implementations' results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from fusekit import merge_state_dicts  # noqa: E402
from fusekit.checkpoint.statistics import save_statistics  # noqa: E402
from fusekit.errors import CheckpointError, FusekitError, RecipeError  # noqa: E402
from tests.vectors import Case, assert_close, read_case  # noqa: E402


def merge(case: Case, method: str, each: Any = None, **parameters: Any) -> dict[str, Any]:
    merged: dict[str, Any] = merge_state_dicts(
        case.models,
        method=method,
        base=case.base,
        parameters=parameters,
        model_parameters=each,
        threads=2,
    )
    return merged


@pytest.mark.parametrize("name", ["case0", "case1", "case2"])
def test_tsv(name: str) -> None:
    case = read_case("tsv", name)
    options = {"lambda": case.about["alpha"], "exclude": "|".join(case.about["exclude"])}
    assert_close(merge(case, "tsv", **options), case.merged, 1e-5, 1e-4)


@pytest.mark.parametrize("name", ["case0", "case1", "case2"])
def test_iso(name: str) -> None:
    case = read_case("iso", name)
    options = {"lambda": case.about["alpha"], "exclude": "|".join(case.about["exclude"])}
    if case.about["kind"] == "iso_cts":
        options["common_space_fraction"] = case.about["common_space_fraction"]
    assert_close(merge(case, case.about["kind"], **options), case.merged, 1e-5, 1e-4)


WUDI = {
    "case0": {"solver": "adam"},
    "case2": {"solver": "exponential", "time": 300.0},
    "case3": {"solver": "exponential", "time": 50.0, "ratio": 0.65},
    "case4": {"solver": "adaptive", "adaptive": "participation_sqrt"},
}


@pytest.mark.parametrize(("name", "options"), WUDI.items(), ids=WUDI.keys())
def test_wudi(name: str, options: dict[str, Any]) -> None:
    case = read_case("wudi", name)
    assert_close(merge(case, "wudi", **options), case.merged, 2e-6, 1e-4)


def test_wudi_with_norms_to_the_first_power() -> None:
    case = read_case("wudi", "case1")
    deltas = case.tensors["in"]["task_vectors"]
    merged = merge_state_dicts(
        [{"w": delta} for delta in deltas],
        base={"w": np.zeros_like(deltas[0])},
        method="wudi",
        parameters={"solver": "adam", "norm_power": 1},
    )
    expected = case.tensors["out"]["merged_task_vector"]
    np.testing.assert_allclose(merged["w"], expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["case0", "case1", "case2"])
def test_optmerge(name: str) -> None:
    case = read_case("optmerge", name)
    merged = merge(case, "optmerge", variant=case.about["variant"])
    found = {tensor: merged[tensor] for tensor in case.merged}
    assert_close(found, case.merged, 2e-6, 1e-4)


@pytest.mark.parametrize("name", ["case0", "case1", "case2"])
def test_knots(name: str) -> None:
    case = read_case("knots", name)
    assert case.base is not None
    models = [
        {tensor: case.base[tensor] + update[tensor] for tensor in update} for update in case.models
    ]
    rule = {"ties": "ties", "tv": "sum"}[case.about["merge_method"]]
    share = case.about["topK"]
    options = {
        "rule": rule,
        "density": 1.0 if rule == "sum" else share / 100 if share > 1 else share,
        "lambda": case.about["scaling"],
    }
    merged = merge_state_dicts(
        models, base=case.base, method="knots", parameters=options, granularity="model"
    )
    update = {tensor: merged[tensor] - case.base[tensor] for tensor in case.merged}
    assert_close(update, case.merged, 2e-4)


def coordinates(deltas: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The left basis of the task vectors side by side, and each one's coordinates in it."""
    U, S, Vh = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    rank = int((S > 1e-5).sum())
    return U[:, :rank], np.split(S[:rank, None] * Vh[:rank], len(deltas), axis=1)


@pytest.mark.parametrize("granularity", ["tensor", "layer", "model"])
def test_knots_thresholds_are_those_of_the_granularity(granularity: str) -> None:
    rng = np.random.default_rng(4)
    shapes = {
        "layers.0.a.weight": (6, 9),
        "layers.0.b.weight": (9, 4),
        "layers.1.a.weight": (5, 5),
    }
    sizes = dict(zip(shapes, (1.0, 3.0, 0.5), strict=True))
    base = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    deltas = [
        {name: sizes[name] * rng.normal(size=shape) for name, shape in shapes.items()}
        for _ in range(3)
    ]
    models = [{name: base[name] + delta[name] for name in base} for delta in deltas]
    merged = merge_state_dicts(
        models, base=base, method="knots", parameters={"density": 0.3}, granularity=granularity
    )
    found = {name: coordinates([delta[name] for delta in deltas]) for name in shapes}
    groups = {
        "tensor": [[name] for name in shapes],
        "layer": [list(shapes)[:2], list(shapes)[2:]],
        "model": [list(shapes)],
    }[granularity]
    for group in groups:
        kept: dict[str, list[np.ndarray]] = {name: [] for name in group}
        for i in range(3):
            together = np.abs(np.concatenate([found[name][1][i].ravel() for name in group]))
            limit = np.sort(together)[together.size - int(together.size * 0.3) - 1]
            for name in group:
                x = found[name][1][i]
                kept[name].append(np.where(np.abs(x) >= limit * (1 - 1e-6), x, 0.0))
        for name in group:
            stack = np.stack(kept[name])
            agreeing = np.where(np.sign(stack) == np.sign(stack.sum(0)), stack, 0.0)
            mean = agreeing.sum(0) / np.maximum((agreeing != 0).sum(0), 1)
            expected = base[name] + found[name][0] @ mean
            np.testing.assert_allclose(merged[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("granularity", ["tensor", "model"])
def test_knots_drops_coordinates_at_random(granularity: str) -> None:
    rng = np.random.default_rng(5)
    base = {name: np.zeros((40, 60), "f4") for name in ("a.weight", "b.weight")}
    drawn = [{name: rng.normal(size=(40, 60)).astype("f4") for name in base} for _ in range(2)]

    def merged(**options: Any) -> dict[str, np.ndarray]:
        seed = options.pop("seed", 0)
        done: dict[str, np.ndarray] = merge_state_dicts(
            drawn, base=base, method="knots", parameters=options, granularity=granularity, seed=seed
        )
        return done

    options = {"rule": "sum", "dare_density": 0.25}
    first, again, other = merged(**options), merged(**options), merged(**options, seed=1)
    for name in base:
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.allclose(first[name], other[name])
        U, rows = coordinates([model[name] for model in drawn])
        multipliers = (U.T @ first[name]).ravel()
        both, left, right = (sum(rows).ravel() * 4, rows[0].ravel() * 4, rows[1].ravel() * 4)
        near = [np.isclose(multipliers, x, atol=1e-3) for x in (both, left, right, 0 * left)]
        assert np.any(near, axis=0).all()
        shares = [each.mean() for each in near]
        np.testing.assert_allclose(shares, [1 / 16, 3 / 16, 3 / 16, 9 / 16], atol=0.04)
    pruned = merged(**options, density=0.1)
    assert np.linalg.norm(pruned["a.weight"]) < np.linalg.norm(first["a.weight"])


def test_knots_refuses_densities_that_differ_where_thresholds_are_shared() -> None:
    base, *rest = models()
    base, *rest = [{**m, "b.weight": m["a.weight"]} for m in (base, *rest)]
    density = [{"filter": "a", "value": 0.5}, {"value": 0.2}]
    with pytest.raises(RecipeError, match=r"'a.weight' and 'b.weight' share a threshold"):
        merge_state_dicts(
            rest, base=base, method="knots", parameters={"density": density}, granularity="model"
        )


def saved(folder: Path, groups: list[dict[str, np.ndarray]], kind: str) -> list[dict[str, str]]:
    """Statistics files, as per-model parameters."""
    each = []
    for i, group in enumerate(groups):
        path = folder / f"{kind}{i}.safetensors"
        save_statistics(path, {f"{name}/{kind}": v for name, v in group.items()}, {})
        each.append({"statistics": str(path)})
    return each


def test_fisher(tmp_path: Path) -> None:
    case = read_case("fisher", "case1")
    each = saved(tmp_path, case.numbered("in/fisher"), "fisher")
    each = [{**own, "weight": w} for own, w in zip(each, case.about["coefficients"], strict=True)]
    assert_close(merge(case, "fisher", each), case.merged, 1e-6, 1e-4)


def test_fisher_with_an_additive_floor(tmp_path: Path) -> None:
    case = read_case("fisher", "case2")
    each = saved(tmp_path, case.numbered("out/fisher"), "fisher")
    assert_close(merge(case, "fisher", each, floor_rule="add"), case.merged, 1e-6, 1e-4)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_regmean(name: str, tmp_path: Path) -> None:
    case = read_case("regmean", name)
    each = saved(tmp_path, case.numbered("out/gram"), "gram")
    merged = merge(case, "regmean", each, scale=case.about["reduce_non_diagonal_ratio"])
    assert_close({tensor: merged[tensor] for tensor in case.merged}, case.merged, 1e-4, 1e-3)


# -- the engine around them ---------------------------------------------------------------------


def models(count: int = 3, dtype: Any = np.float32) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            "a.weight": rng.normal(size=(30, 20)).astype(dtype),
            "a.bias": rng.normal(size=30).astype(dtype),
            "steps": np.arange(3),
        }
        for _ in range(count + 1)
    ]


def test_excluded_tensors_get_the_mean_or_keep_the_base() -> None:
    base, *rest = models()
    average = np.mean([model["a.weight"] for model in rest], axis=0)
    options: dict[str, Any] = {"exclude": r"a\.weight"}
    merged = merge_state_dicts(rest, base=base, method="iso_c", parameters=options)
    np.testing.assert_allclose(merged["a.weight"], average, atol=1e-6)
    options["excluded"] = "base"
    merged = merge_state_dicts(rest, base=base, method="iso_c", parameters=options)
    np.testing.assert_array_equal(merged["a.weight"], base["a.weight"])
    assert not np.array_equal(merged["a.bias"], base["a.bias"])
    np.testing.assert_array_equal(merged["steps"], base["steps"])


def test_zero_lambda_keeps_the_base() -> None:
    base, *rest = models()
    merged = merge_state_dicts(rest, base=base, method="tsv", parameters={"lambda": 0.0})
    assert_close(merged, base, 0.0)


def test_layer_scaling_scales_whole_matrices_too(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from fusekit import merge as merge_folders

    base, *rest = [
        {f"layers.{i}.{name}": v for i in range(3) for name, v in model.items() if name != "steps"}
        for model in models()
    ]
    for i, arrays in enumerate([base, *rest]):
        save_file(arrays, tmp_path / f"m{i}.safetensors")
    recipe: dict[str, Any] = {
        "merge_method": "tsv",
        "base_model": str(tmp_path / "m0.safetensors"),
        "models": [{"model": str(tmp_path / f"m{i}.safetensors")} for i in (1, 2, 3)],
    }
    merge_folders(recipe, tmp_path / "plain")
    merge_folders(
        {**recipe, "layer_scaling": {"method": "lines", "alpha": 0.5, "beta": 0.5}},
        tmp_path / "scaled",
    )
    plain, found = (
        load_file(tmp_path / name / "model.safetensors") for name in ("plain", "scaled")
    )
    for i, scale in enumerate((0.5, 0.75, 1.0)):
        for name in (f"layers.{i}.a.weight", f"layers.{i}.a.bias"):
            expected = base[name] + scale * (plain[name] - base[name])
            np.testing.assert_allclose(found[name], expected, atol=1e-5)
    auto = {**recipe, "layer_scaling": {"method": "lines", "alpha": "auto", "beta": 0.5}}
    with pytest.raises(RecipeError, match="alpha: 'auto' measures the merged update in blocks"):
        merge_folders(auto, tmp_path / "auto")


def test_nan_is_refused_with_its_tensor_and_count() -> None:
    base, *rest = models()
    rest[1]["a.weight"][3, 4:6] = np.nan
    with pytest.raises(CheckpointError, match=r"model 1: tensor 'a.weight' has 2 NaN or infinite"):
        merge_state_dicts(rest, base=base, method="tsv")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("xyz", r"found 'xyz', expected cpu, cuda or cuda:<number>"),
        ("cuda:99", r"'cuda:99' cannot be used by PyTorch \S+: (it has|no CUDA device)"),
        ("mps", r"'mps' cannot be used: .{10,120}$"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device: str, message: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    import fusekit

    for i, arrays in enumerate(models()):
        save_file(arrays, tmp_path / f"m{i}.safetensors")
    recipe: dict[str, Any] = {
        "merge_method": "tsv",
        "base_model": str(tmp_path / "m0.safetensors"),
        "models": [{"model": str(tmp_path / f"m{i}.safetensors")} for i in (1, 2)],
    }
    with pytest.raises(FusekitError, match=message):
        fusekit.merge(recipe, tmp_path / "out", device=device)
    assert not list(tmp_path.glob("out*"))


def test_methods_in_blocks_have_no_use_for_a_device() -> None:
    base, *rest = models()
    with pytest.raises(FusekitError, match="task_arithmetic merges in blocks on the CPU"):
        merge_state_dicts(rest, base=base, method="task_arithmetic", device="cuda")


def test_missing_statistics_name_the_module(tmp_path: Path) -> None:
    case = read_case("regmean", "case0")
    grams = [{k: v for k, v in gram.items() if k != "fc2"} for gram in case.numbered("out/gram")]
    with pytest.raises(CheckpointError, match=r"gram0.*no gram of 'fc2'.*'fc2.weight' of model 0"):
        merge(case, "regmean", saved(tmp_path, grams, "gram"))
    other = tmp_path / "other.safetensors"
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(1)}, other)
    with pytest.raises(CheckpointError, match="not a file of statistics"):
        merge(case, "regmean", [{"statistics": str(other)}] * 2)


def test_malformed_exclusion_is_refused() -> None:
    base, *rest = models()
    with pytest.raises(RecipeError, match=r"exclude: found '\(', expected a regular expression"):
        merge_state_dicts(rest, base=base, method="tsv", parameters={"exclude": "("})


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("elbow", "'participation_sqrt' or .* or 'cumvar_<share>'"),
        ("cumvar_", r"cumvar_ and a share in \(0, 1\]"),
        ("cumvar_<share>", "cumvar_ and a share"),
        ("cumvar_2", "cumvar_ and a share"),
        ("cumvar_nan", "cumvar_ and a share"),
        (0.95, "'participation_sqrt' or"),
    ],
)
def test_unknown_rank_rules_are_refused_while_planning(rule: Any, expected: str) -> None:
    base, *rest = models()
    with pytest.raises(RecipeError, match=rf"parameters.adaptive: found '?{rule}'?, .*{expected}"):
        merge_state_dicts(rest, base=base, method="wudi", parameters={"adaptive": rule})


def test_a_share_of_the_spectrum_is_a_rank_rule() -> None:
    base, *rest = models()
    options = {"solver": "adaptive", "adaptive": "cumvar_1"}
    merged = merge_state_dicts(rest, base=base, method="wudi", parameters=options)
    exact = merge_state_dicts(rest, base=base, method="wudi", parameters={"solver": "none"})
    np.testing.assert_allclose(merged["a.weight"], exact["a.weight"], atol=1e-5)
