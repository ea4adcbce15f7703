"""What methods have to say of the models reaches the user, with the tensors it is about."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import fusekit

Array = np.ndarray[Any, np.dtype[Any]]

RNG = np.random.default_rng(3)
BASE = {"w": RNG.standard_normal((40, 30)).astype("f4") * 0.1}


def tuned(*updates: Array | float) -> list[dict[str, Array]]:
    return [{"w": BASE["w"] + np.float32(update)} for update in updates]


def noise(size: float = 0.001) -> Array:
    return (RNG.standard_normal((40, 30)) * size).astype("f4")


SMALL = noise()


@pytest.mark.parametrize(
    ("method", "parameters", "models", "said"),
    [
        ("dare_linear", {"density": 0.9}, tuned(noise(0.2)), "suffer from random drops"),
        ("ties", {"weight": [1.0, -1.0]}, tuned(noise(), noise()), "weights of both signs"),
        ("breadcrumbs", {"density": 0.9, "gamma": 0.5}, tuned(noise()), "gamma gives way"),
        ("sce", {"select_topk": 0.5}, tuned(SMALL, SMALL), "no variance to select by"),
        ("emr", {}, tuned(1.0, 1.0, -0.1), "task 3 is lost"),
        ("widen", {}, tuned(*(noise() for _ in range(4))), "more than 3 models"),
        ("model_stock", {}, tuned(SMALL, noise() - SMALL), "away from each other"),
        ("consensus", {"k": 3}, tuned(noise(), noise()), "k 3 exceeds the 2 models"),
        ("unival", {"weight": 1.0}, tuned(noise(), noise()), "sum to 2, not to 1"),
    ],
)
def test_a_merge_in_memory_warns(
    method: str, parameters: dict[str, Any], models: list[dict[str, Array]], said: str
) -> None:
    own = parameters.pop("weight", None)
    weights = own if isinstance(own, list) else [own] * len(models)
    has_base = fusekit.methods.find(method).base is not None
    with pytest.warns(UserWarning, match=f"{said}.*tensor 'w'"):
        fusekit.merge_state_dicts(
            models,
            method=method,
            base=BASE if has_base else None,
            parameters=parameters,
            model_parameters=None if own is None else [{"weight": w} for w in weights],
        )


def test_ordinary_models_are_merged_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("ties", "dare_linear", "breadcrumbs", "sce", "emr", "model_stock"):
            fusekit.merge_state_dicts(
                tuned(noise(), noise()),
                method=method,
                base=BASE,
                parameters={"density": 0.5} if method in {"ties", "dare_linear"} else {},
            )


def test_opposite_directions_have_no_karcher_mean() -> None:
    models = [{"w": SMALL}, {"w": -SMALL}, {"v": SMALL}]
    with pytest.warns(UserWarning, match="opposite directions have no mean"):
        fusekit.merge_state_dicts(models[:2], method="karcher")


@pytest.mark.torch
@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_updates_of_low_rank_are_flattened_where_they_have_strength(method: str) -> None:
    pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    low = [(rng.normal(size=(40, 3)) @ rng.normal(size=(3, 30)) * 0.01) for _ in range(2)]

    def merged(rank: str | None, models: list[dict[str, Array]]) -> Array:
        parameters = {} if rank is None else {"rank": rank}
        done = fusekit.merge_state_dicts(models, method=method, base=BASE, parameters=parameters)
        return np.asarray(done["w"] - BASE["w"])

    with pytest.warns(UserWarning, match=r"updates of low rank.*rank: full.*\(tensor 'w'\)"):
        found = merged(None, tuned(*low))
    assert np.linalg.matrix_rank(found, tol=1e-4) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(merged("numerical", tuned(*low)), found)
        assert np.linalg.matrix_rank(merged("full", tuned(*low)), tol=1e-4) == 30
        merged(None, tuned(noise(), noise()))
        assert not merged(None, tuned(0.0, 0.0)).any()


@pytest.mark.torch
def test_remarks_reach_the_user_through_layer_scaling() -> None:
    pytest.importorskip("torch")
    base, *models = (
        {f"layers.{i}.weight": own["w"] for i in range(2)} for own in (BASE, *tuned(0.5, 0.25))
    )
    with pytest.warns(UserWarning, match=r"updates of low rank.*'layers.0.weight' and 1 more"):
        fusekit.merge_state_dicts(
            models, method="iso_c", base=base, layer_scaling={"alpha": 0.5, "beta": 1.0}
        )


def test_the_command_line_names_each_remark_once(tmp_path: Path) -> None:
    for name, update in {"base": 0.0, "a": 0.5, "b": 0.25}.items():
        (tmp_path / name).mkdir()
        tensors = {key: np.full((8, 8), update, "f4") for key in ("x", "y", "z")}
        save_file(tensors, tmp_path / name / "model.safetensors")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(
        json.dumps(
            {
                "merge_method": "consensus",
                "base_model": str(tmp_path / "base"),
                "models": [{"model": str(tmp_path / name)} for name in ("a", "b")],
                "parameters": {"k": 5},
            }
        )
    )
    command = [sys.executable, "-m", "fusekit", "merge", str(recipe), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = "warning: consensus: k 5 exceeds the 2 models: the base stays (tensor 'x' and 2 more)"
    assert done.stderr.count("warning:") == 1
    assert said in done.stderr
