"""Results equal those of the official implementations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fusekit import merge_state_dicts
from tests.vectors import Case, assert_close, read_case


def merge(case: Case, method: str, weights: list[float] | None = None, **options: Any) -> Any:
    each = options.pop("each", [{} for _ in case.models])
    if weights is not None:
        each = [{**own, "weight": w} for own, w in zip(each, weights, strict=True)]
    return merge_state_dicts(
        case.models,
        method=method,
        base=options.pop("base", case.base),
        model_parameters=each,
        granularity=options.pop("granularity", "tensor"),
        masks=options.pop("masks", None),
        parameters=options,
    )


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_linear(name: str) -> None:
    case = read_case("linear", name)
    merged = merge(case, "linear", case.about["weights"], normalize=case.about["normalize"])
    assert_close(merged, case.merged, 1e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_slerp(name: str) -> None:
    case = read_case("slerp", name)
    assert_close(merge(case, "slerp", t=case.about["t"]), case.merged, 2e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_nuslerp(name: str) -> None:
    case = read_case("nuslerp", name)
    merged = merge(
        case,
        "nuslerp",
        case.about["weights"],
        nuslerp_flatten=case.about["flatten"],
        nuslerp_row_wise=case.about["row_wise"],
    )
    assert (case.base is not None) == case.about["base"]
    assert_close(merged, case.merged, 3e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_multislerp(name: str) -> None:
    case = read_case("multislerp", name)
    options = {"normalize_weights": case.about["normalize_weights"], "eps": case.about["eps"]}
    assert_close(merge(case, "multislerp", case.about["weights"], **options), case.merged, 2e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_karcher(name: str) -> None:
    case = read_case("karcher", name)
    options = {"max_iter": case.about["max_iter"], "tol": case.about["tol"]}
    assert_close(merge(case, "karcher", **options), case.merged, 3e-6)


def test_task_arithmetic_adds() -> None:
    case = read_case("task-arithmetic", "case0")
    options = {"lambda": case.about["lam"]}
    assert_close(merge(case, "task_arithmetic", **options), case.merged, 1e-6)


def test_task_arithmetic_negates() -> None:
    case = read_case("task-arithmetic", "case1")
    options = {"lambda": case.about["lam"]}
    assert_close(merge(case, "task_arithmetic", [-1.0], **options), case.merged, 1e-6)


def test_task_arithmetic_normalises_weights() -> None:
    case = read_case("task-arithmetic", "case2")
    options = {"lambda": case.about["lam"], "normalize": True}
    merged = merge(case, "task_arithmetic", case.about["weights"], **options)
    assert_close(merged, case.merged, 1e-6)


@pytest.mark.parametrize("name", ["case0", "case3"])
def test_ties_over_the_whole_model(name: str) -> None:
    case = read_case("ties", name)
    options = {
        "density": case.about["density"],
        "rule": "threshold",
        "zero": "majority",
        "lambda": case.about["lam"],
    }
    merged = merge(case, "ties", granularity="model", **options)
    assert_close(merged, case.merged, 1e-6)


def test_ties_with_a_mask_rate_per_tensor() -> None:
    case = read_case("ties", "case1")
    options = {"zero": "majority", "lambda": case.about["lam"]}
    each = [{"mask_rate": case.about["mask_rate"]}] * 3
    assert_close(merge(case, "ties", each=each, **options), case.merged, 1e-6)


def test_ties_exact_rule_with_weights() -> None:
    case = read_case("ties", "case2")
    each = [{"density": density} for density in case.about["density"]]
    options = {"rule": "exact", "zero": "positive", "lambda": case.about["lam"]}
    merged = merge(case, "ties", case.about["weights"], each=each, **options)
    assert_close(merged, case.merged, 1e-6)


def masks_of(case: Case) -> list[dict[str, np.ndarray]]:
    return case.numbered("in/keep_mask")


def test_dare_on_one_model() -> None:
    case = read_case("dare", "case0")
    options = {"density": 1 - case.about["drop_rate"], "rescale": "inverse"}
    merged = merge(case, "dare_linear", masks=masks_of(case), **options)
    assert_close(merged, case.merged, 2e-6)


def test_dare_with_task_arithmetic() -> None:
    case = read_case("dare", "case1")
    options = {
        "density": 1 - case.about["drop_rate"],
        "rescale": "inverse",
        "lambda": case.about["lam"],
    }
    merged = merge(case, "dare_linear", masks=masks_of(case), **options)
    assert_close(merged, case.merged, 2e-6)


def test_dare_then_trimmed_ties_over_the_whole_model() -> None:
    case = read_case("dare", "case2")
    options = {
        "density": 1 - case.about["drop_rate"],
        "rescale": "inverse",
        "lambda": case.about["lam"],
        "normalize": True,
        "zero": "majority",
        "mask_rate": case.about["ties_mask_rate"],
    }
    merged = merge(case, "dare_ties", granularity="model", masks=masks_of(case), **options)
    assert_close(merged, case.merged, 2e-6)


def test_dare_with_l1_rescaling() -> None:
    case = read_case("dare", "case3")
    each = [{"density": density} for density in case.about["density"]]
    options = {"rescale": "l1", "normalize": False, "lambda": case.about["lam"]}
    merged = merge(
        case, "dare_linear", case.about["weights"], each=each, masks=masks_of(case), **options
    )
    assert_close(merged, case.merged, 2e-6)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_passthrough(name: str) -> None:
    case = read_case("passthrough", name)
    options = {} if case.about["scale"] is None else {"scale": case.about["scale"]}
    assert_close(merge(case, "passthrough", **options), case.merged, 0.0)
