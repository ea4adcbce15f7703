"""A suite's result as a report."""

from __future__ import annotations

from collections.abc import Mapping

from fusekit.evaluate.result import Row, SuiteResult
from fusekit.evaluate.table import explained, label, with_interval
from fusekit.report.figures import bars, cost_against_quality, heat_map
from fusekit.report.page import Note, Plot, Report, Section, Table


def suite_report(result: SuiteResult) -> Report:
    """Which method keeps how much of the experts, how surely, and at what cost."""
    rows = sorted(result.rows, key=lambda row: -row.normalised)
    tasks = ", ".join(result.groups)
    lead = f"One model for {len(result.groups)} tasks ({tasks}), merged from their experts."
    sections = [
        Section("Methods", [*_best(rows), *_figures(result, _one_per_method(rows))]),
        Section("Numbers", [_table(result, rows), _explained(result)]),
    ]
    left_out = [f"{skip.method}: {skip.reason}" for skip in result.skipped]
    failed = [f"{method}: {reason}" for method, reason in result.failed.items()]
    notes = []
    if failed:
        notes.append(Note("warning", "These methods failed:", failed))
    if left_out:
        notes.append(Note("note", "These methods were left out:", left_out))
    if notes:
        sections.append(Section("Left out", notes))
    return Report(f"Merging methods on the suite {result.suite}", lead, sections)


def _best(rows: list[Row]) -> list[Note]:
    if not rows:
        return []
    best = rows[0]
    low, high = best.normalised_interval
    close = [label(row) for row in rows[1:] if row.normalised_interval[1] >= low]
    text = f"{label(best)} keeps most: {best.normalised:.1%} of the experts ({low:.1%}-{high:.1%})."
    details = [f"within its interval: {', '.join(close)}"] if close else []
    return [Note("note", text, details)]


def _one_per_method(rows: list[Row]) -> list[Row]:
    """The tuned configuration where there is one, else the default."""
    tuned = {row.method for row in rows if row.variant == "tuned"}
    return [row for row in rows if row.variant == "tuned" or row.method not in tuned]


def _figures(result: SuiteResult, rows: list[Row]) -> list[Plot]:
    names = [row.method for row in rows]
    quality = [row.normalised for row in rows]
    plots = [
        Plot(
            "Share of the experts' scores that a merge keeps",
            bars(
                names,
                quality,
                [row.normalised_interval for row in rows],
                axis="normalised score",
                reference=1.0,
            ),
            "Tuned where there is something to tune. 1 is every expert on its own task; whiskers "
            f"are 95 % bootstrap intervals. {_references(result)}",
        )
    ]
    if result.forgetting:
        plots.append(
            Plot(
                "What the base could do and the merge still can",
                bars(
                    names,
                    [row.retained or 0.0 for row in rows],
                    [row.retained_interval or (0.0, 0.0) for row in rows],
                    axis="share of the base's score",
                    reference=1.0,
                ),
                f"On {', '.join(result.forgetting)}; 1 is nothing forgotten.",
            )
        )
    plots.append(
        Plot(
            "Cost against quality",
            cost_against_quality(
                names,
                [row.total_seconds for row in rows],
                quality,
                cost_axis="CPU seconds, data and tuning included",
                quality_axis="normalised score",
            ),
            "Left and up is better.",
        )
    )
    columns = [*result.datasets, *result.forgetting]
    values = [[row.scores[name] for name in columns] for row in rows]
    plots.append(
        Plot("Score by task", heat_map(values, names, columns, limits=(0.0, 1.0), as_percent=True))
    )
    own = [[scores[name] for name in columns] for scores in result.experts.values()]
    plots.append(
        Plot(
            "Every expert on every task",
            heat_map(own, list(result.experts), columns, limits=(0.0, 1.0), as_percent=True),
            "Rows are experts: what one task's training does to the others.",
        )
    )
    return plots


def _references(result: SuiteResult) -> str:
    """What is not merged: `For comparison: base 0.312, multitask 1.004.`"""
    scored = ", ".join(f"{name} {each.normalised:.3f}" for name, each in result.references.items())
    return f"For comparison: {scored}."


def _table(result: SuiteResult, rows: list[Row]) -> Table:
    names = [*result.datasets, *result.forgetting]
    head = ["model", *names, "normalised", "vs first", "retained"]
    head += ["merge CPU s", "data CPU s", "tuning CPU s", "MB", "tried"]
    body = []
    for name, reference in result.references.items():
        relative = [f"{reference.normalised:.3f}", "-", with_interval(reference.retained, None)]
        body.append([name, *_percents(reference.scores, names), *relative, *["-"] * 5])
    own = result.own_scores()
    body.append(["expert of the task", *_percents(own, names), "1.000", *["-"] * 7])
    return Table(head, body + [_numbers(row, names) for row in rows])


def _numbers(row: Row, names: list[str]) -> list[str]:
    return [
        label(row),
        *_percents(row.scores, names),
        with_interval(row.normalised, row.normalised_interval),
        with_interval(row.difference, row.difference_interval, "+.3f"),
        with_interval(row.retained, row.retained_interval),
        f"{row.merge_cpu_seconds:.2f}",
        f"{row.measuring_seconds:.1f}",
        f"{row.tuning_seconds:.1f}",
        f"{row.merge_peak_bytes / 1e6:.0f}",
        str(row.tried),
    ]


def _percents(scores: Mapping[str, float], names: list[str]) -> list[str]:
    return [f"{100 * scores[name]:.1f}" if name in scores else "-" for name in names]


def _explained(result: SuiteResult) -> str:
    return f"Scores in %. {explained(result)}"
