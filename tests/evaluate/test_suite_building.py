"""Building suites: resumable, whole or not at all, refusing what does not fit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fusekit.errors import FusekitError
from fusekit.evaluate import building, digits
from fusekit.evaluate.building import build_suite, once, suite_name, write_suite
from fusekit.evaluate.suite import Settings, load_suite, only_known


def build_copies(
    out: Path,
    *,
    data: Path | None,
    seed: int,
    settings: Settings,
    on_progress: Callable[[str], None],
) -> None:
    """The digits suite again, by copying; settings: limit, how many experts before it stops."""
    only_known(settings, ("limit",))
    models = {"base": digits.base(), **digits.experts()}
    for number, (name, path) in enumerate(models.items()):
        if number == settings.get("limit"):
            raise KeyboardInterrupt

        def copy(folder: Path, path: Path = path) -> None:
            shutil.copytree(path, folder, dirs_exist_ok=True)

        if once(out / name, {"seed": seed}, copy):
            on_progress(name)
    experts = {task: task for task in digits.TASKS}
    write_suite(out, {"name": "copies", "evaluator": "digits", "base": "base", "experts": experts})


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "BUILDERS", {"copies": f"{__name__}:build_copies"})


def test_an_interrupted_build_makes_only_what_is_missing(tmp_path: Path) -> None:
    made: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        build_suite("copies", tmp_path, settings={"limit": 3}, on_progress=made.append)
    (tmp_path / f"{digits.TASKS[2]}.partial").mkdir()
    assert not (tmp_path / "suite.yml").exists()
    path = build_suite("copies", tmp_path, on_progress=made.append)
    assert made == ["base", *digits.TASKS]
    assert load_suite(path).tasks == digits.TASKS


def test_names_of_suites_tell_what_is_not_the_default_and_differ_by_seed() -> None:
    assert suite_name("digits", 0, {}) == "digits"
    assert suite_name("digits", 2, {"width": 24}) == "digits-seed_2-width_24"
    assert suite_name("digits", 0, {"width": 24, "layers": 4}) == "digits-layers_4-width_24"


def test_models_made_otherwise_are_not_taken(tmp_path: Path) -> None:
    build_suite("copies", tmp_path)
    with pytest.raises(FusekitError, match=r"base: exists and was made with {'seed': 0}, expected"):
        build_suite("copies", tmp_path, seed=1)


def test_unknown_suites_and_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FusekitError, match="'copy' cannot be built \\(did you mean 'copies'"):
        build_suite("copy", tmp_path)
    with pytest.raises(FusekitError, match="unknown setting 'limits' \\(did you mean 'limit'"):
        build_suite("copies", tmp_path, settings={"limits": 1})


def test_the_command_names_a_malformed_setting(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fusekit", "suite", "build", "x", str(tmp_path / "out")]
    done = subprocess.run([*command, "--set", "size"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected key=value" in done.stderr
    assert not (tmp_path / "out").exists()
