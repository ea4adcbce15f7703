"""`fusekit inspect` as users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.inspection.support import base_model, moved, noise, save


def fusekit(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fusekit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, base = tmp_path_factory.mktemp("family"), base_model()
    save(folder / "base", base)
    for i, name in enumerate(("maths", "code"), 1):
        save(folder / name, moved(base, noise(base, i)))
    broken = moved(base, noise(base, 3))
    broken["lm_head.weight"] = np.full_like(broken["lm_head.weight"], np.nan)
    save(folder / "broken", broken)
    return folder


@pytest.mark.parametrize(
    ("option", "path", "message"),
    [
        ("--json", "gone/numbers.json", "gone: not a writable folder"),
        ("--html", ".", "is a folder, expected a file"),
        ("--figures", "file", "is a file, expected a folder"),
    ],
)
def test_results_that_cannot_be_written_are_refused_before_anything_is_measured(
    family: Path, tmp_path: Path, option: str, path: str, message: str
) -> None:
    pytest.importorskip("plotly", reason="needs the [report] extra")
    (tmp_path / "file").touch()
    refused = fusekit("inspect", family / "maths", family / "code", option, tmp_path / path)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert refused.stdout == ""


def test_summary_and_numbers(family: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="needs the [report] extra")
    numbers, html = tmp_path / "numbers.json", tmp_path / "report.html"
    done = fusekit(
        "inspect", family / "maths", family / "code", "--base", family / "base",
        "--json", numbers, "--html", html,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 models against base: ")
    assert "-> Start with task arithmetic" in done.stdout
    saved = json.loads(numbers.read_text(encoding="utf-8"))
    assert saved["models"] == ["maths", "code"]
    assert saved["advice"][0]["recipe"]["merge_method"] == "task_arithmetic"
    assert "maths" in html.read_text(encoding="utf-8")


def test_json_alone_on_standard_output(family: Path) -> None:
    done = fusekit("inspect", family / "maths", "--base", family / "base", "--json", "-")
    assert json.loads(done.stdout)["schema"] == "fusekit-inspection/1"


def test_what_stops_a_merge_is_in_the_exit_status(family: Path) -> None:
    done = fusekit("inspect", family / "maths", family / "broken", "--base", family / "base")
    assert done.returncode == 1
    assert "stop: broken: 28800 NaN or infinite values in 1 tensor" in done.stdout
    assert "-> Repair or replace broken first." in done.stdout


def test_a_missing_model_is_one_sentence_and_status_2(family: Path) -> None:
    done = fusekit("inspect", family / "nowhere", "--base", family / "base")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no such file or folder" in done.stderr


def test_help_imports_no_numerical_library() -> None:
    code = "import fusekit.cli, sys; print({'numpy', 'numba', 'plotly'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
