"""Tables of suites get where the page's markers are, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fusekit.errors import FusekitError
from fusekit.evaluate.runner import run_suite
from fusekit.evaluate.suite import load_suite
from scripts.suite_tables import PAGE, replaced


def test_a_table_replaces_what_is_between_its_markers() -> None:
    page = "a\n<!-- one -->\nold\n<!-- /one -->\nb\n<!-- two -->\nkept\n<!-- /two -->\nc\n"
    new = replaced(page, "one", "| x |\n")
    assert new == (
        "a\n<!-- one -->\n\n| x |\n\n<!-- /one -->\nb\n<!-- two -->\nkept\n<!-- /two -->\nc\n"
    )
    assert replaced(new, "one", "| x |\n") == new


@pytest.mark.parametrize("page", ["", "<!-- one -->\n", "<!-- /one -->\n<!-- one -->\n"])
def test_a_page_without_both_markers_is_refused(page: str) -> None:
    with pytest.raises(FusekitError, match="expected <!-- one --> and <!-- /one --> on the page"):
        replaced(page, "one", "| x |\n")


def test_the_command_writes_the_rows_of_a_run(tmp_path: Path) -> None:
    result = run_suite(load_suite("digits"), ["linear"], tmp_path, budget=1, resamples=50)
    page = tmp_path / "page.md"
    page.write_text("<!-- here -->\n<!-- /here -->\n", encoding="utf-8")
    command = [sys.executable, "-m", "scripts.suite_tables", f"here={tmp_path}"]
    subprocess.run([*command, "--page", str(page)], check=True, cwd=PAGE.parents[1])
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| base",
        "| multitask",
        "| expert of the task",
        "| linear, default",
    ]
    assert f"{result.rows[0].normalised:.3f} [" in rows[-1]
    missing = [sys.executable, "-m", "scripts.suite_tables", f"here={tmp_path / 'no'}"]
    done = subprocess.run(missing, capture_output=True, text=True, cwd=PAGE.parents[1])
    assert done.returncode == 1
    assert "results.json: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
