"""Every recipe and script of examples/ runs, and every one is mentioned in the documentation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fusekit
from fusekit.errors import MissingExtraError
from fusekit.evaluate import digits
from fusekit.methods import available
from tests.docs.markdown import ROOT

EXAMPLES = ROOT / "examples"
RECIPES = sorted((EXAMPLES / "recipes").rglob("*.yml"))
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.name != "run_all.py")
MEASURE = EXAMPLES / "measure_statistics.py"
PAGE = (ROOT / "docs" / "examples.md").read_text()


def named(path: Path) -> str:
    return str(path.relative_to(EXAMPLES).with_suffix(""))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the statistics that some recipes need have been measured."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("measured")
    run(MEASURE, folder)
    return folder


def run(script: Path, folder: Path, *arguments: str) -> str:
    """What a script prints when run in a folder."""
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("recipe", RECIPES, ids=named)
def test_recipe_gives_a_verified_model(
    recipe: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "statistics:" in recipe.read_text():
        monkeypatch.chdir(request.getfixturevalue("measured"))
    try:
        fusekit.merge(recipe, tmp_path / "merged", threads=2)
    except MissingExtraError as missing:
        pytest.skip(str(missing))
    assert fusekit.verify(tmp_path / "merged").ok
    if "/digits/" not in recipe.read_text():
        return
    images = digits.examples("validation").images[:8]
    assert np.isfinite(digits.features(tmp_path / "merged", images)).all()


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s != MEASURE], ids=named)
def test_script_runs(script: Path, tmp_path: Path) -> None:
    assert run(script, tmp_path)


def test_statistics_are_measured_for_every_expert(measured: Path) -> None:
    files = {path.stem for path in (measured / "statistics").glob("*.safetensors")}
    assert files == set(digits.experts())


def test_run_all_scores_the_chosen_recipes(tmp_path: Path) -> None:
    printed = run(EXAMPLES / "run_all.py", tmp_path, "features/gradient")
    assert "features/gradient" in printed
    assert (tmp_path / "examples-out" / "features" / "gradient" / "manifest.json").is_file()


@pytest.mark.parametrize(
    "example", [*SCRIPTS, *(r for r in RECIPES if r.parent.name == "features")], ids=named
)
def test_example_is_on_its_page(example: Path) -> None:
    assert f"`{example.name}`" in PAGE


def test_every_method_has_a_recipe_that_uses_it() -> None:
    for name in available():
        text = (EXAMPLES / "recipes" / "methods" / f"{name}.yml").read_text()
        assert f"merge_method: {name}\n" in text
