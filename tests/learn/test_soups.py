"""Greedy soups choose what the official search chooses, with functions and with commands."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fusekit.errors import FusekitError
from fusekit.learn import greedy_soup, greedy_soup_folder, select
from fusekit.learn.soups import run_scorer
from tests.vectors import Case, assert_close, read_case


def accuracy(case: Case, soup: Mapping[str, Any]) -> float:
    inputs = case.tensors["in"]
    hidden = np.tanh(inputs["x"] @ soup["fc1.weight"].T + soup["fc1.bias"])
    logits = hidden @ soup["fc2.weight"].T + soup["fc2.bias"]
    return float((logits.argmax(1) == inputs["y"]).mean())


@pytest.mark.parametrize(("accept", "group"), [(">", "greedy"), (">=", "greedy_ge")])
def test_greedy_search_is_the_published_one(accept: Any, group: str) -> None:
    case = read_case("model-soups", "case0")
    made = greedy_soup(case.models, lambda soup: accuracy(case, soup), accept=accept)
    expected = case.tensors[f"out/{group}"]
    found = made.selection
    np.testing.assert_allclose(found.scores, case.tensors["out"]["val_acc"], rtol=1e-6)
    assert list(found.order) == case.tensors["out"]["order"].tolist()
    assert list(found.ingredients) == expected["ingredients"].tolist()
    np.testing.assert_allclose(found.trials, expected["trial_acc"], rtol=1e-6)
    assert found.best == pytest.approx(float(expected["best_acc"]))
    soup = {k.removeprefix("soup/"): v for k, v in expected.items() if k.startswith("soup/")}
    assert_close(made.soup, soup, 1e-6, 1e-5)


def test_the_soup_is_never_worse_than_the_best_model() -> None:
    values = np.random.default_rng(0).normal(size=8)
    selection = select(8, lambda indices: -abs(float(np.mean(values[list(indices)])) - 0.1))
    assert selection.best >= max(selection.scores)


def test_equal_models_all_join_unless_the_score_must_rise() -> None:
    assert len(select(4, lambda indices: 1.0).ingredients) == 4
    assert select(4, lambda indices: 1.0, accept=">").ingredients == (3,)
    assert len(select(4, lambda indices: 1.0, minimum_gain=0.1).ingredients) == 1


def test_nan_is_the_worst_score() -> None:
    with pytest.warns(UserWarning, match="NaN"):
        selection = select(3, lambda indices: float("nan") if 1 in indices else 1.0)
    assert selection.order[-1] == 1
    assert 1 not in selection.ingredients


def test_no_models_are_refused() -> None:
    with pytest.raises(FusekitError, match="at least one model"):
        select(0, lambda indices: 0.0)


SCORER = (
    "import sys, numpy; from safetensors.numpy import load_file; "
    "print('value', -abs(load_file(sys.argv[1] + '/model.safetensors')['w'][0] - 0.5))"
)


def test_soup_of_folders_is_scored_by_a_command(tmp_path: Path) -> None:
    folders = []
    for value in (0.0, 1.0, 5.0):
        folder = tmp_path / f"model{value:g}"
        folder.mkdir()
        save_file({"w": np.full(4, value, np.float32)}, folder / "model.safetensors")
        folders.append(str(folder))
    command = f'{sys.executable} -c "{SCORER}" {{model}}'
    selection = greedy_soup_folder(folders, command, tmp_path / "soup", threads=1)
    assert selection.ingredients == (1, 0)
    assert load_file(tmp_path / "soup" / "model.safetensors")["w"].tolist() == [0.5] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model0",
        "model1",
        "model5",
        "soup",
    ]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f'{sys.executable} -c "print(1, None)"', "printed 'None' last, expected a number"),
        (f"{sys.executable} -c \"raise SystemExit('no data')\"", "status 1: no data"),
        ("/no/such/program", "cannot be run: No such file"),
    ],
)
def test_a_command_that_does_not_score_is_an_error(command: str, message: str) -> None:
    with pytest.raises(FusekitError, match=message):
        run_scorer(command, "folder")
