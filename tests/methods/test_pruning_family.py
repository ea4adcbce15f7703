"""Methods that choose entries: by magnitude, rank, variance, overlap, importance or distance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fusekit import kernels, merge_state_dicts
from fusekit.methods.della import keep_probabilities
from tests.vectors import Case, assert_close, read_case

StateDict = dict[str, np.ndarray]


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


# -- golden vectors ----------------------------------------------------------------------------------


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
        found = {name: merged[name] - value for name, value in case.base.items()}
        assert_close(found, expected[i], 1e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_keep_probabilities_are_those_of_the_reference(name: str) -> None:
    case = read_case("della", name)
    for i, expected in enumerate(case.numbered("out/keep_prob")):
        density, epsilon = case.about["density"][i], case.about["epsilon"][i]
        found = {
            name: keep_probabilities(case.models[i][name] - case.base[name], density, epsilon)
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
        found = {name: merged[name] - value for name, value in case.base.items()}
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
        a, b = case.base[tensor], case.models[0][tensor]
        length = a.shape[-1]
        rows, found = np.empty(a.size // length), np.empty(a.size, np.float32)
        kernels.pairs.softmax_divergences(a.ravel(), b.ravel(), length, 1e-8, rows)
        kernels.pairs.importance(a.ravel(), b.ravel(), rows, 0, length, found)
        np.testing.assert_allclose(found.reshape(a.shape), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_nearswap(name: str) -> None:
    case = read_case("nearswap", name)
    assert_close(merge_case(case, "nearswap", t=case.about["t"]), case.merged, 1e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_ram(name: str) -> None:
    case = read_case("ram", name)
    options = {key: case.about[key] for key in ("epsilon", "r", "alpha") if key in case.about}
    merged = merge_state_dicts(
        case.models, method=case.about["method"], base=case.base, parameters=options
    )
    assert_close(merged, case.merged, 1e-6)
