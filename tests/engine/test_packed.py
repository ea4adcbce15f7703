"""Kernels that decode for themselves give what decoded rows give, entry for entry."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusekit
from fusekit.engine import blocks
from fusekit.errors import CheckpointError
from fusekit.methods import find

Array = np.ndarray[Any, np.dtype[Any]]

SHAPE = (150, 401)
"""Not a multiple of a tile, more than a few granules."""

EXACT = [
    ("linear", {}, {"weight": 0.4}),
    ("task_arithmetic", {"lambda": 0.4}, {}),
    ("slerp", {"t": 0.3}, {}),
    ("nuslerp", {}, {"weight": 0.4}),
    ("multislerp", {}, {"weight": 0.4}),
    ("karcher", {}, {}),
    ("model_stock", {}, {}),
    ("dare_linear", {"density": 0.5, "rescale": "inverse"}, {}),
    ("dare_linear", {"density": 0.4, "rescale": "inverse", "strategy": "magnitude"}, {}),
    ("dare_linear", {"density": 0.5, "weight_format": "finetuned"}, {}),
    ("breadcrumbs", {"density": 0.3, "gamma": 0.02}, {}),
    ("arcee_fusion", {}, {}),
]
ROUNDED = [
    ("ties", {"density": 0.2}, {}),
    ("ties", {"density": 0.3, "rule": "threshold", "zero": "majority"}, {}),
    ("ties", {"density": 0.3, "election": "normmass", "merge": "max"}, {}),
    ("dare_ties", {"density": 0.5, "mask_rate": 0.7}, {}),
    ("dare_linear", {"density": 0.5}, {}),
    ("breadcrumbs_ties", {"density": 0.3, "gamma": 0.02}, {}),
    ("della", {"density": 0.5, "epsilon": 0.1}, {}),
    ("emr", {}, {}),
    ("consensus", {}, {}),
    ("tall_masks", {}, {}),
    ("sce", {"select_topk": 0.3}, {}),
    ("sce", {"select_topk": 0.3, "variant": "fuseai"}, {}),
]
TYPES = [ml_dtypes.bfloat16, np.float16]


def family(dtype: Any) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    """A base and three fine-tunes with many equal magnitudes among their updates."""
    rng = np.random.default_rng(7)
    base = (rng.standard_normal(SHAPE) * 0.05).astype(dtype)
    tuned = [
        {"w": (base.astype(np.float32) + rng.standard_normal(SHAPE) * 0.003).astype(dtype)}
        for _ in range(3)
    ]
    return {"w": base}, tuned


def merged(name: str, parameters: Any, own: Any, dtype: Any, **options: Any) -> Array:
    base, models = family(dtype)
    method = find(name)
    models = models[: {"slerp": 1, "nuslerp": 2, "arcee_fusion": 1}.get(name, 3)]
    result = fusekit.merge_state_dicts(
        models,
        method=name,
        base=None if method.base is None else base,
        parameters=parameters,
        model_parameters=[own] * len(models),
        **options,
    )
    return result["w"].view(np.uint16).astype(np.int64)


@pytest.mark.parametrize("granularity", ["tensor", "model"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("name", "parameters", "own"), EXACT)
def test_sums_are_the_same(
    name: str,
    parameters: Any,
    own: Any,
    dtype: Any,
    granularity: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = merged(name, parameters, own, dtype, granularity=granularity)
    monkeypatch.setattr(blocks, "KINDS", {})
    decoded = merged(name, parameters, own, dtype, granularity=granularity)
    np.testing.assert_array_equal(packed, decoded)


@pytest.mark.parametrize("granularity", ["tensor", "model"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("name", "parameters", "own"), ROUNDED)
def test_elections_and_scales_are_the_same_to_one_rounding(
    name: str,
    parameters: Any,
    own: Any,
    dtype: Any,
    granularity: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = merged(name, parameters, own, dtype, granularity=granularity)
    monkeypatch.setattr(blocks, "KINDS", {})
    decoded = merged(name, parameters, own, dtype, granularity=granularity)
    assert np.abs(packed - decoded).max() <= 1
    assert np.count_nonzero(packed != decoded) <= 1e-3 * packed.size


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "name", ["linear", "task_arithmetic", "dare_linear", "ties", "slerp", "arcee_fusion"]
)
@pytest.mark.parametrize("operand", ["base", 0])
def test_nan_and_infinity_are_counted_once(name: str, operand: Any, dtype: Any) -> None:
    base, models = family(dtype)
    if find(name).base is None:
        if operand == "base":
            pytest.skip("no base")
        base = {}
    spoilt = (base if operand == "base" else models[operand])["w"]
    spoilt.reshape(-1)[[5, 30_000, 60_000]] = [np.nan, np.inf, -np.inf]
    with pytest.raises(CheckpointError, match="'w' has 3 NaN or infinite"):
        fusekit.merge_state_dicts(
            models[:1] if name in {"slerp", "arcee_fusion"} else models,
            method=name,
            base=base or None,
            model_parameters=[{"weight": 0.5}] * 3 if name == "linear" else None,
            parameters={"t": 0.5} if name == "slerp" else {},
        )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("operand", ["base", 0, 2])
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ties", {"density": 1.0}),
        ("dare_linear", {"density": 0.1, "rescale": "inverse"}),
        ("dare_linear", {"density": 0.1, "rescale": "none"}),
        ("dare_ties", {"density": 0.1, "rescale": "inverse"}),
    ],
)
def test_nan_is_counted_where_nothing_is_scanned_first_and_it_would_be_dropped(
    name: str, parameters: Any, operand: Any, dtype: Any
) -> None:
    base, models = family(dtype)
    spoilt = (base if operand == "base" else models[operand])["w"]
    spoilt.reshape(-1)[[5, 1500, 30_000, 60_000]] = np.nan
    with pytest.raises(CheckpointError, match="'w' has 4 NaN or infinite"):
        fusekit.merge_state_dicts(models, method=name, base=base, parameters=parameters)


def test_mixed_and_wider_types_are_decoded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = family(np.float16)
    wide = [{"w": model["w"].astype(np.float32)} for model in models]
    mixed = [wide[0], *models[1:]]
    arguments: dict[str, Any] = {"method": "task_arithmetic", "out_dtype": "float16"}
    expected = fusekit.merge_state_dicts(models, base=base, **arguments)["w"]
    for given in (wide, mixed):
        found = fusekit.merge_state_dicts(given, base=base, **arguments)["w"]
        np.testing.assert_array_equal(found, expected)
