"""A report is one file: nothing is fetched, names from strangers cannot become markup."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fusekit.inspection.run import inspect
from fusekit.report.inspection import inspection_report
from fusekit.report.page import Note, Plot, Report, Section, Table
from tests.inspection.support import base_model, moved, noise

pytest.importorskip("plotly", reason="needs the [report] extra")

HOSTILE = '</script><img src=x onerror="alert(1)">'


def without_plotly(html: str) -> str:
    from plotly.offline import get_plotlyjs

    return html.replace(get_plotlyjs(), "")


def test_names_are_text_wherever_they_appear() -> None:
    from fusekit.report.figures import heat_map

    figure = heat_map([[1.0]], [HOSTILE], [HOSTILE])
    section = Section(
        HOSTILE,
        [Table([HOSTILE], [[HOSTILE]]), Note("stop", HOSTILE), Plot(HOSTILE, figure), HOSTILE],
    )
    html = without_plotly(Report(HOSTILE, HOSTILE, [section]).to_html())
    assert "<img" not in html
    assert html.count("</script>") == 3


def test_nothing_is_loaded_from_elsewhere() -> None:
    html = without_plotly(Report("t", "l", []).to_html())
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", html)
    assert not re.findall(r"https?://", html)


def test_inspection_report_shows_advice_numbers_and_figures() -> None:
    base = base_model()
    found = inspect([moved(base, noise(base, i)) for i in (1, 2)], base=base)
    report = inspection_report(found)
    assert [section.title for section in report.sections] == [
        "What to do",
        "The models",
        "Between the models",
        "Where the models moved",
    ]
    titles = [plot.title for plot in report.plots]
    assert titles[:4] == [
        "Cosine of the task vectors",
        "Same sign",
        "Overlap of the largest 20 %",
        "Conflict by depth",
    ]
    heat = next(plot for plot in report.plots if plot.title.startswith("model 1: relative norm"))
    trace = heat.figure.data[0]
    row, column = list(trace.y).index("1"), list(trace.x).index("mlp.up_proj")
    name = "model.layers.1.mlp.up_proj.weight"
    delta = moved(base, noise(base, 1))[name] - base[name]
    expected = np.linalg.norm(delta) / np.linalg.norm(base[name])
    assert trace.z[row][column] == pytest.approx(expected, rel=1e-5)
    assert "Start with task arithmetic" in report.to_html()


def test_a_single_model_or_no_base_still_makes_a_report() -> None:
    base = base_model()
    alone = inspection_report(inspect([moved(base, noise(base, 1))], base=base))
    assert "Between the models" not in [section.title for section in alone.sections]
    without = inspection_report(inspect([base, moved(base, noise(base, 1))]))
    assert "Cosine of the models" in [plot.title for plot in without.plots]
