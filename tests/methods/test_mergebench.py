"""MergeBench's data-free methods as settings of the methods here, against its released code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fusekit import merge_state_dicts
from tests.vectors import Case, assert_close, read_case

State = dict[str, np.ndarray]

ORDER = (
    *(
        f"model.layers.{layer}.{part}.weight"
        for layer in range(2)
        for part in ("q_proj", "up_proj", "input_layernorm")
    ),
    "model.norm.weight",
    "lm_head.weight",
)
"""The tensors of its flat task vector, in the model's order."""


def settings(case: Case) -> dict[str, tuple[str, dict[str, Any]]]:
    about = case.about
    scale = about["scaling_coef"]
    return {
        "task_arithmetic": ("task_arithmetic", {"lambda": scale}),
        "ties": (
            "ties",
            {
                "lambda": scale,
                "density": about["ties_keep"],
                "rule": "threshold",
                "zero": "majority",
                "merge": "sum",
            },
        ),
        "consensus": (
            "consensus",
            {
                "alpha": scale,
                "k": about["consensus_k"],
                "tall_lambda": about["consensus_lambda"],
            },
        ),
        "dare": (
            "dare_linear",
            {"lambda": scale, "rescale": "inverse", "density": 1 - about["dare_p"]},
        ),
    }


def keep_masks(case: Case) -> list[State]:
    """The flat masks of random drops, cut into tensors."""
    assert case.base is not None
    masks = []
    for number in range(len(case.models)):
        flat, at, own = case.group("in")[f"dare_mask{number}"], 0, {}
        for name in ORDER:
            size = case.base[name].size
            own[name] = flat[at : at + size].reshape(case.base[name].shape)
            at += size
        assert at == flat.size
        masks.append(own)
    return masks


@pytest.mark.parametrize("name", ["case0", "case1"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "consensus", "dare"])
def test_released_code_and_settings_here_agree(method: str, name: str) -> None:
    case = read_case("mergebench", name)
    assert case.base is not None
    merger, parameters = settings(case)[method]
    merged = merge_state_dicts(
        [{tensor: model[tensor] for tensor in ORDER} for model in case.models],
        method=merger,
        base={tensor: case.base[tensor] for tensor in ORDER},
        parameters=parameters,
        granularity="model",
        masks=keep_masks(case) if method == "dare" else None,
    )
    expected = case.group(f"out/{method}")
    assert expected
    assert_close({tensor: merged[tensor] for tensor in expected}, expected, 1e-5)
