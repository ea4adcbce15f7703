"""A study as Markdown: curves over the number of experts, and the findings."""

from __future__ import annotations

from fusekit.evaluate.findings import findings
from fusekit.evaluate.study import Curve, Study, curves, slopes

EXPLAINED = (
    "held-in: share of the experts' scores on the merged tasks, mean ± standard deviation over "
    "subsets; after the slash, held-out: share of the base's score on what no expert was trained "
    "on; slope: what one more expert does to held-in."
)
RULE = (
    "Verdict: pass where the sign holds in 80 % of the pairs and the mean effect exceeds two "
    "standard errors, fail where the opposite does."
)


def markdown(study: Study) -> str:
    """Means by suite, method and number of experts, and the verdicts."""
    parts = ["\n".join(_curves(study)), f"{EXPLAINED} Seed {study.seed}."]
    verdicts = finding_rows(study)
    if verdicts:
        head = ["| finding | verdict | holds in | mean effect |", "|---|---|---:|---:|"]
        parts += ["\n".join([*head, *(f"| {' | '.join(row)} |" for row in verdicts)]), RULE]
    parts += [f"Not computed: {what} ({reason})." for what, reason in study.failed.items()]
    return "\n\n".join(parts) + "\n"


def finding_rows(study: Study) -> list[list[str]]:
    """Statement, verdict, in how many pairs it holds, mean effect and its standard error."""
    return [
        [
            each.statement,
            each.verdict,
            f"{each.holding} of {each.pairs}",
            f"{each.effect:+.3f} ± {each.standard_error:.3f}",
        ]
        for each in findings(study.cells)
    ]


def curve_rows(study: Study) -> tuple[list[str], list[list[str]]]:
    """Head and rows: suite, method, a cell per number of experts, slope."""
    points = {(c.suite, c.method, c.count): c for c in curves(study.cells)}
    counts = sorted({count for _, _, count in points})
    head = ["suite", "method", *(f"{count} experts" for count in counts), "slope"]
    rows = [
        [
            suite,
            method,
            *(_point(points.get((suite, method, count))) for count in counts),
            f"{slope:+.3f}",
        ]
        for (suite, method), slope in slopes(study.cells).items()
    ]
    return head, rows


def _curves(study: Study) -> list[str]:
    head, rows = curve_rows(study)
    ruler = ["---", "---", *["---:"] * (len(head) - 2)]
    return [f"| {' | '.join(row)} |" for row in (head, ruler, *rows)]


def _point(curve: Curve | None) -> str:
    if curve is None:
        return "-"
    outside = "" if curve.held_out is None else f" / {curve.held_out:.3f}"
    return f"{curve.held_in:.3f} ± {curve.held_in_std:.3f}{outside}"
