"""Reports on adapters: numbers of single adapters, figures by depth, and comparisons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fusekit.adapters import Adapter, LoraModule, write_adapter
from fusekit.adapters.info import AdapterInfo, Overlap, compare_adapters, describe_adapter
from fusekit.report.adapters import adapter_report

pytest.importorskip("plotly", reason="needs the [report] extra")


def adapter(seed: int, kinds: tuple[str, ...] = ("q_proj", "up_proj"), layers: int = 4) -> Adapter:
    rng = np.random.default_rng(seed)
    modules = {}
    for layer in range(layers):
        for kind in kinds:
            name = f"model.layers.{layer}.{kind}.weight"
            A = rng.standard_normal((2, 6)).astype(np.float32)
            B = (layer + 1) * rng.standard_normal((5, 2)).astype(np.float32)
            modules[name] = LoraModule(name, A, B, alpha=2.0)
    return Adapter(f"adapters/task{seed}", modules, {}, {})


def described_adapters() -> tuple[list[AdapterInfo], Overlap]:
    adapters = [adapter(0), adapter(1), adapter(2, ("q_proj",))]
    return [describe_adapter(each) for each in adapters], compare_adapters(adapters)


def test_a_report_compares_adapters_and_shows_where_they_act() -> None:
    infos, overlap = described_adapters()
    report = adapter_report(infos, overlap)
    assert [plot.title for plot in report.plots] == [
        "task0: norm by layer and module",
        "task1: norm by layer and module",
        "task2: norm by layer and module",
        "Norm by depth",
        "Stable rank by depth",
        "Cosine of the updates",
        "Overlap of output spaces",
        "Overlap of input spaces",
        "Overlap by depth",
    ]
    norms = np.array(report.plots[0].figure.data[0].z)
    expected = [[m.norm for m in infos[0].modules[i : i + 2]] for i in range(0, 8, 2)]
    np.testing.assert_allclose(norms, expected)
    absent = report.plots[2].figure.data[0].z
    assert all(row[1] is None for row in absent)
    depth = report.plots[3].figure.data[0].y
    np.testing.assert_allclose(depth, np.linalg.norm(expected, axis=1))
    cosine = np.array(report.plots[5].figure.data[0].z)
    np.testing.assert_allclose(cosine, overlap.cosine)


def test_overlaps_of_modules_average_to_those_of_adapters() -> None:
    _, overlap = described_adapters()
    up = overlap.modules["model.layers.0.up_proj.weight"]
    assert np.isnan(up.cosine[0, 2]) and not np.isnan(up.cosine[0, 1])
    mean = np.nanmean([each.output[0, 2] for each in overlap.modules.values()])
    assert overlap.output[0, 2] == pytest.approx(mean)
    assert overlap.shared[0, 2] == 4


def test_one_adapter_without_numbered_layers_has_one_figure() -> None:
    name = "head.weight"
    module = LoraModule(name, np.ones((1, 3), "f4"), np.ones((2, 1), "f4"), alpha=1.0)
    report = adapter_report([describe_adapter(Adapter("x", {name: module}, {}, {}))], None)
    assert report.title == "What is in x"
    (plot,) = report.plots
    assert list(plot.figure.data[0].y) == ["other"]
    assert [section.title for section in report.sections] == [
        "The adapters",
        "Where the adapters act",
    ]


def test_adapters_of_one_name_go_by_their_paths() -> None:
    infos = [describe_adapter(replace(adapter(0), label=f"run{i}/adapter")) for i in range(2)]
    assert "run0/adapter, run1/adapter" in adapter_report(infos, None).lead


def test_the_command_writes_the_report(tmp_path: Path) -> None:
    from fusekit.cli.adapter import app

    for seed in range(2):
        write_adapter(adapter(seed), tmp_path / f"task{seed}")
    arguments = [str(tmp_path / "task0"), str(tmp_path / "task1"), "--html"]
    done = CliRunner().invoke(app, ["info", *arguments, str(tmp_path / "report.html")])
    assert done.exit_code == 0, done.output
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Overlap by depth" in html and "task1: norm by layer" in html
