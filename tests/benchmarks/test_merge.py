"""The merge benchmark refuses early what it cannot run, and keeps what it has measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import merge
from benchmarks.merge import Cost, Row

ROW = Row(
    "linear",
    models=3,
    merge=Cost(wall=3.0, user=2.5, system=0.75, peak_rss=200_000_000),
    start_up=Cost(wall=1.0, user=1.5, system=0.25, peak_rss=100_000_000),
    copy=Cost(wall=0.5, user=0.25, system=0.5, peak_rss=100_000_000),
)


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *methods: str) -> None:
    arguments = ["merge", "--out", str(out), "--parameters", "1e6", "--methods", *methods]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(merge, "write_family", write_tiny)
    monkeypatch.setattr(merge.shutil, "which", lambda name: None)
    merge.main()


def write_tiny(folder: Path, parameters: float, models: int) -> None:
    from benchmarks.checkpoints import write_family

    write_family(folder, 0, models)


def never(*_: object) -> Row:
    raise AssertionError("measured although another benchmark cannot run")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("linaer", "unknown benchmark 'linaer' (did you mean 'linear'?)"),
        ("ties@modle", "unknown benchmark 'ties@modle' (did you mean 'ties@model'?)"),
        ("fisher", "benchmark 'fisher': "),
    ],
)
def test_benchmarks_that_cannot_run_are_refused_before_any_is_measured(
    name: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(merge, "measure", never)
    with pytest.raises(SystemExit) as refusal:
        run(monkeypatch, tmp_path, "linear", name)
    assert refusal.value.code == 2
    assert reason in capsys.readouterr().err


def test_finished_rows_survive_the_failure_of_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(name: str, *_: object) -> Row:
        if name != "linear":
            raise SystemExit("failed with status 9")
        return ROW

    monkeypatch.setattr(merge, "measure", measure)
    with pytest.raises(SystemExit, match="status 9"):
        run(monkeypatch, tmp_path, "linear", "ties")
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in content["rows"]] == ["linear"]
    assert "| linear | 3 |" in (tmp_path / "results.md").read_text()


def test_rows_show_user_and_system_seconds_without_start_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(merge, "measure", lambda *_: ROW)
    run(monkeypatch, tmp_path, "linear")
    assert "| linear | 3 | 0.75 | 1.50 | 1.00 | 0.50 | 2.00 | 3.00 |" in capsys.readouterr().out
    row = json.loads((tmp_path / "results.json").read_text())["rows"][0]
    assert {key: row[key] for key in ("cpu", "user", "system", "ratio")} == {
        "cpu": 1.5,
        "user": 1.0,
        "system": 0.5,
        "ratio": 2.0,
    }


def test_interrupted_checkpoints_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path, parameters: float, models: int) -> None:
        (folder / "base").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merge, "write_family", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge.checkpoints(tmp_path, 0, models=2)
    assert (merge.checkpoints(tmp_path, 0, models=2) / "model1" / "model.safetensors").is_file()
