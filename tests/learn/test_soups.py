"""Greedy soups choose what the official search chooses, with functions and with commands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fusekit.errors import CheckpointError, FusekitError
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


def test_restarts_find_what_the_first_order_misses() -> None:
    """Model 1 spoils the soup for model 3, which would have been better."""
    table = {(0,): 5.0, (1,): 4.0, (2,): 3.0, (3,): 2.0, (0, 1): 5.5, (0, 3): 7.0}

    def score(indices: Any) -> float:
        return table.get(tuple(sorted(indices)), 0.0)

    plain = select(4, score)
    assert plain.ingredients == (0, 1)
    better = select(4, score, restarts=8, seed=1)
    assert better.ingredients == (0, 3)
    assert better.order[0] == 0
    assert better.best == 7.0
    assert better == select(4, score, restarts=8, seed=1)
    assert select(4, lambda indices: 1.0, restarts=3).order == (3, 2, 1, 0)
    with pytest.raises(FusekitError, match="restarts: found -1"):
        select(4, score, restarts=-1)


def test_integers_come_from_the_best_model() -> None:
    models = [{"w": np.full(2, v, "f4"), "batches": np.array(i)} for i, v in enumerate((0, 1, 5))]
    made = greedy_soup(models, lambda soup: -abs(float(soup["w"][0]) - 0.6))
    assert made.selection.ingredients == (1, 0)
    assert made.soup["batches"] == 1


@pytest.mark.parametrize("gain", [-0.1, float("nan")])
def test_gains_that_cannot_be_are_refused(gain: float) -> None:
    with pytest.raises(FusekitError, match=f"minimum_gain: found {gain}, expected 0 or more"):
        select(2, lambda indices: 1.0, minimum_gain=gain)


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


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Models whose only tensor is 0, 1 and 5."""
    made = []
    for value in (0.0, 1.0, 5.0):
        folder = tmp_path / f"model{value:g}"
        folder.mkdir()
        save_file({"w": np.full(4, value, np.float32)}, folder / "model.safetensors")
        made.append(str(folder))
    return made


COMMAND = f'{sys.executable} -c "{SCORER}" {{model}}'


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fusekit", "soup", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_soup_of_folders_is_scored_by_a_command(tmp_path: Path, folders: list[str]) -> None:
    seen: list[tuple[int, ...]] = []
    selection = greedy_soup_folder(
        folders,
        COMMAND,
        tmp_path / "soup",
        threads=1,
        on_score=lambda indices, value: seen.append(tuple(indices)),
    )
    assert selection.ingredients == (1, 0)
    assert seen == [(0,), (1,), (2,), (1, 0), (1, 0, 2)]
    assert load_file(tmp_path / "soup" / "model.safetensors")["w"].tolist() == [0.5] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model0",
        "model1",
        "model5",
        "soup",
    ]


def test_the_command_makes_greedy_soups(tmp_path: Path, folders: list[str]) -> None:
    out = tmp_path / "soup"
    done = run_cli(str(out), *folders, "--evaluate", COMMAND)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 models, score -0 (best single model -0.5)" in done.stdout
    assert done.stdout.splitlines()[1:] == [f"  {folders[1]}", f"  {folders[0]}"]
    assert len(done.stderr.splitlines()) == 5
    assert load_file(out / "model.safetensors")["w"].tolist() == [0.5] * 4
    again = run_cli(str(out), *folders, "--evaluate", COMMAND)
    assert again.returncode == 2
    assert str(out) in again.stderr


def test_the_command_makes_uniform_soups(tmp_path: Path, folders: list[str]) -> None:
    done = run_cli(str(tmp_path / "soup"), *folders)
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "soup" / "model.safetensors")["w"].tolist() == [2.0] * 4
    odd = run_cli(str(tmp_path / "other"), *folders, "--accept", ">")
    assert odd.returncode == 2
    assert "need --evaluate" in odd.stderr


def test_models_that_do_not_match_are_refused_before_any_evaluation(
    tmp_path: Path, folders: list[str]
) -> None:
    save_file({"w": np.zeros(3, np.float32)}, Path(folders[2]) / "model.safetensors")
    command = f"{sys.executable} -c \"raise SystemExit('evaluated')\""
    with pytest.raises(CheckpointError, match="tensor 'w'"):
        greedy_soup_folder(folders, command, tmp_path / "soup")


def test_models_of_different_origin_are_pointed_out() -> None:
    scores = {1: 0.9, 2: 0.1, 3: 0.1}
    with pytest.warns(UserWarning, match="every average scored below the worst single model"):
        select(3, lambda indices: scores[len(indices)])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f'{sys.executable} -c "print(1, None)"', "printed 'None' last, expected a number"),
        (f"{sys.executable} -c \"raise SystemExit('no data')\"", "status 1: no data"),
        ("/no/such/program", "cannot be run: No such file"),
        ("python 'score.py", "scoring command .*: No closing quotation"),
        (" ", "scoring command: found nothing, expected a program"),
    ],
)
def test_a_command_that_does_not_score_is_an_error(command: str, message: str) -> None:
    with pytest.raises(FusekitError, match=message):
        run_scorer(command, "folder")
