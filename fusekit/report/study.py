"""A study as a report."""

from __future__ import annotations

from fusekit.evaluate.study import Study, curves
from fusekit.evaluate.study_table import EXPLAINED, RULE, curve_rows, finding_rows
from fusekit.report.figures import lines
from fusekit.report.page import Note, Plot, Report, Section, Table


def study_report(study: Study) -> Report:
    """How held-in and held-out scores go with the number of experts, by suite and method."""
    methods = list(dict.fromkeys(cell.method for cell in study.cells))
    suites = list(dict.fromkeys(cell.suite for cell in study.cells))
    sections = [
        Section("Held-in", [_plot(study, method, "held_in") for method in methods]),
    ]
    if any(cell.held_out is not None for cell in study.cells):
        plots = [_plot(study, method, "held_out") for method in methods]
        sections.append(Section("Held-out", plots))
    verdicts = finding_rows(study)
    if verdicts:
        head = ["finding", "verdict", "holds in", "mean effect"]
        sections.append(Section("Findings", [Table(head, verdicts), RULE]))
    sections.append(
        Section("Numbers", [Table(*curve_rows(study)), f"{EXPLAINED} Seed {study.seed}."])
    )
    if study.failed:
        reasons = [f"{what}: {reason}" for what, reason in study.failed.items()]
        sections.append(Section("Left out", [Note("warning", "Not computed:", reasons)]))
    lead = f"{len(study.cells)} merges of {len(suites)} suites by {', '.join(methods)}."
    return Report("Merging more experts", lead, sections)


def _plot(study: Study, method: str, score: str) -> Plot:
    points = {
        (c.suite, c.count): getattr(c, score) for c in curves(study.cells) if c.method == method
    }
    counts = sorted({count for _, count in points})
    series = {
        suite: [points.get((suite, count)) for count in counts]
        for suite in dict.fromkeys(suite for suite, _ in points)
    }
    reference = "the experts' scores" if score == "held_in" else "the base's score"
    figure = lines(series, [str(count) for count in counts], axis=f"share of {reference}")
    return Plot(
        f"{method}, {score.replace('_', '-')}", figure, "Over the number of experts merged."
    )
