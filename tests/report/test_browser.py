"""Reports in a real browser: figures drawn, no errors, readable narrow and wide, dark and light."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusekit.evaluate import digits
from fusekit.evaluate.runner import run_suite
from fusekit.evaluate.study import run_study
from fusekit.evaluate.suite import load_suite
from fusekit.inspection.run import inspect
from fusekit.report.adapters import adapter_report
from fusekit.report.inspection import inspection_report
from fusekit.report.study import study_report
from fusekit.report.suite import suite_report
from tests.report.test_adapters import described_adapters

pytest.importorskip("plotly", reason="needs the [report] extra")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium from the system")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int]]:
    """File and number of figures of every kind of report."""
    folder = tmp_path_factory.mktemp("reports")
    found = inspect(list(digits.experts().values()), base=digits.base())
    methods = ["linear", "task_arithmetic", "ties"]
    result = run_suite(load_suite("digits"), methods, folder / "suite", budget=1, resamples=100)
    study = run_study([load_suite("digits")], ["linear"], [2, 6], folder / "study", subsets=1)
    made = {}
    for name, report in (
        ("inspection", inspection_report(found)),
        ("suite", suite_report(result)),
        ("study", study_report(study)),
        ("adapters", adapter_report(*described_adapters())),
    ):
        path = folder / f"{name}.html"
        path.write_text(report.to_html(), encoding="utf-8")
        made[name] = path, len(report.plots)
    return made


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["inspection", "suite", "study", "adapters"])
def test_report_is_drawn_without_errors(
    browser: Any, reports: dict[str, tuple[Path, int]], kind: str, width: int, scheme: str
) -> None:
    path, count = reports[kind]
    assert count == {"inspection": 11, "suite": 5, "study": 2, "adapters": 9}[kind]
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems: list[str] = []
    requests: list[str] = []
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("document.documentElement.dataset.drawn !== undefined")
    plots = page.locator(".plot")
    assert plots.count() == count
    assert page.locator(".plot .main-svg").count() >= count
    for i in range(plots.count()):
        box = plots.nth(i).bounding_box()
        assert box["height"] > 150 and box["width"] > 250
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert _contrast(page) > 7
    page.close()


def test_switching_the_theme_redraws_the_figures(
    browser: Any, reports: dict[str, tuple[Path, int]]
) -> None:
    page = browser.new_page(color_scheme="light")
    page.goto(reports["inspection"][0].as_uri())
    page.wait_for_function("document.documentElement.dataset.drawn !== undefined")
    ink = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    before = page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{ink} !== '{before}'")
    page.close()


def _contrast(page: Any) -> float:
    """WCAG contrast between the page's ground and the tick labels of its figures."""
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = page.evaluate("getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    light, dark = sorted((_luminance(ground), _luminance(ink)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(x) / 255 for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
