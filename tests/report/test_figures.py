"""Figures carry the numbers they were given, and nothing that depends on a theme."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fusekit.errors import MissingExtraError
from fusekit.report import figures
from fusekit.report.figures import pareto_front

pytest.importorskip("plotly", reason="needs the [report] extra")


def test_heat_map_puts_the_first_row_on_top_and_leaves_gaps_blank() -> None:
    figure = figures.heat_map([[0.1, None], [0.3, 0.4]], ["0", "1"], ["q", "up"], limits=(0, 1))
    content = json.loads(figure.to_json())
    assert content["data"][0]["z"] == [[0.1, None], [0.3, 0.4]]
    assert content["layout"]["yaxis"]["autorange"] == "reversed"
    assert content["layout"]["yaxis"]["type"] == "category"
    assert content["layout"]["meta"] == {"scale": "sequential"}
    assert (content["layout"]["coloraxis"]["cmin"], content["layout"]["coloraxis"]["cmax"]) == (
        0,
        1,
    )


def test_bars_show_their_intervals_around_the_value() -> None:
    figure = figures.bars(["a"], [0.5], [(0.4, 0.7)], axis="score", reference=1.0)
    bar = figure.data[0]
    assert bar.error_x.array[0] == pytest.approx(0.2)
    assert bar.error_x.arrayminus[0] == pytest.approx(0.1)
    assert figure.layout.shapes[0].x0 == 1.0


def test_lines_keep_every_series_under_its_name() -> None:
    figure = figures.lines({"a": [1.0, None], "b": [2.0, 3.0]}, ["0", "1"], axis="norm")
    assert [trace.name for trace in figure.data] == ["a", "b"]
    assert list(figure.data[0].y) == [1.0, None]


def test_pareto_front_holds_what_nothing_cheaper_beats() -> None:
    costs, qualities = [3.0, 1.0, 2.0, 4.0, 1.0], [0.9, 0.5, 0.4, 0.9, 0.6]
    assert pareto_front(costs, qualities) == [4, 0]
    figure = figures.cost_against_quality(
        list("abcde"), costs, qualities, cost_axis="cost", quality_axis="quality"
    )
    assert list(figure.data[0].x) == [1.0, 3.0]
    assert list(figure.data[1].text) == ["a", "", "", "", "e"]


def test_labels_that_would_cover_one_another_are_left_to_hovering() -> None:
    costs, qualities = [1.0, 1.1, 10.0], [0.50, 0.51, 0.9]
    figure = figures.cost_against_quality(
        list("abc"), costs, qualities, cost_axis="cost", quality_axis="quality"
    )
    assert list(figure.data[1].text) == ["", "b", "c"]
    assert list(figure.data[1].customdata) == ["a", "b", "c"]


def test_missing_plotly_is_said_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(MissingExtraError, match=r"fusekit\[report\]"):
        figures.require_plotly()


def test_missing_kaleido_is_said_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fusekit.report.page import Report

    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(MissingExtraError, match="writing figures as svg files"):
        Report("t", "l", ()).save_figures(tmp_path)
    assert list(tmp_path.iterdir()) == []
