"""What every data-free method does with what a recipe leaves out."""

from __future__ import annotations

from typing import Any

import pytest

from fusekit.methods import available

REQUIRED = {
    "linear": {"weight"},
    "slerp": {"t"},
    "nuslerp": {"weight"},
    "multislerp": {"weight"},
    "nearswap": {"t"},
}

_ELECTION = {"election": "mass", "weights_in_election": True, "zero": "positive", "merge": None}
_TASK_VECTORS = {"weight": 1.0, "lambda": 1.0, "int8_mask": False, "normalize": False}
_DARE = {
    **_TASK_VECTORS,
    "density": 1.0,
    "rescale": "l1",
    "strategy": "random",
    "weight_format": "delta",
    "only_2d": False,
}
_CRUMBS = {**_TASK_VECTORS, "density": 1.0, "gamma": 0.01, "rescale": "none"}
_DELLA = {
    **_TASK_VECTORS,
    "density": 1.0,
    "epsilon": 0.15,
    "rescale": "l1",
    "rank_over": "axis1",
}
_RAM = {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}
_TALL = {"tall_lambda": 0.4, "vector": "ta", "density": 0.2}

DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {"normalize": True},
    "slerp": {},
    "nuslerp": {"nuslerp_flatten": True, "nuslerp_row_wise": False},
    "multislerp": {"normalize_weights": True, "eps": 1e-8},
    "karcher": {"weight": 1.0, "max_iter": 10, "tol": 1e-5},
    "task_arithmetic": _TASK_VECTORS,
    "ties": {
        **_TASK_VECTORS,
        **_ELECTION,
        "density": 0.2,
        "rule": "exact",
        "mask_rate": None,
        "rescale": "none",
        "normalize": True,
    },
    "dare_linear": _DARE,
    "dare_ties": {**_DARE, **_ELECTION, "mask_rate": None},
    "breadcrumbs": _CRUMBS,
    "breadcrumbs_ties": {**_CRUMBS, **_ELECTION},
    "della": {**_DELLA, **_ELECTION, "normalize": True},
    "della_linear": _DELLA,
    "sce": {"select_topk": 1.0, "variant": "paper", "uniform_below": 0.0, "int8_mask": False},
    "model_stock": {"filter_wise": False, "clip": False},
    "arcee_fusion": {"factor": 1.5},
    "nearswap": {},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": _RAM,
    "ramplus": {**_RAM, "scope": "model"},
    "passthrough": {"scale": None},
    "pcb": {
        "ratio": 0.1,
        "weight": 1.0,
        "lambda": 1.0,
        "variant": "nlp",
        "clamp": None,
        "edges": "exact",
    },
    "widen": {"t": 1.0, "s": 1.0, "exclude": None, "ties": "average"},
    "varm": {"measure": "square", "temperature": None, "elementwise": False},
    "model_soups": {"weight": 1.0, "normalize": True},
    "unival": {"weight": None, "skip_keys": None},
    "emr": {"rescale": "code", "equalize": False, "task": None},
    "tall_masks": {**_TALL, "task": None},
    "consensus": {**_TALL, "alpha": 0.4, "k": 2},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_left_out_stands_for(name: str) -> None:
    parameters = available()[name].parameters
    assert {p.name for p in parameters if p.required} == REQUIRED.get(name, set())
    assert {p.name: p.default for p in parameters if not p.required} == DEFAULTS[name]
