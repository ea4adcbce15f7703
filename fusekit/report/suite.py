"""A suite's result as a report."""

from __future__ import annotations

from fusekit.evaluate.runner import Row, SuiteResult, label
from fusekit.report.figures import bars, cost_against_quality, heat_map
from fusekit.report.page import Note, Plot, Report, Section, Table


def suite_report(result: SuiteResult) -> Report:
    """Which method keeps how much of the experts, how surely, and at what cost."""
    rows = sorted(result.rows, key=lambda row: -row.normalised)
    tasks = ", ".join(result.tasks)
    lead = f"One model for {len(result.tasks)} tasks ({tasks}), merged from their experts."
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
            "are 95 % bootstrap intervals.",
        )
    ]
    if result.forgetting:
        plots.append(
            Plot(
                "What the base could do and the merge still can",
                bars(
                    names,
                    [row.retained or 0.0 for row in rows],
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
                [row.merge_cpu_seconds + row.tuning_seconds for row in rows],
                quality,
                cost_axis="CPU seconds, tuning included",
                quality_axis="normalised score",
            ),
            "Left and up is better.",
        )
    )
    values = [[row.scores[task] for task in (*result.tasks, *result.forgetting)] for row in rows]
    columns = [*result.tasks, *result.forgetting]
    plots.append(
        Plot("Score by task", heat_map(values, names, columns, limits=(0.0, 1.0), as_percent=True))
    )
    return plots


def _table(result: SuiteResult, rows: list[Row]) -> Table:
    tasks = [*result.tasks, *result.forgetting]
    head = ["model", *tasks, "normalised", "vs first", "retained", "CPU s", "MB", "tried"]
    own = [f"{100 * result.experts[task][task]:.1f}" for task in result.tasks]
    blank = ["-"] * 6
    body = [
        ["base", *(f"{100 * result.base[task]:.1f}" for task in tasks), *blank],
        ["expert of the task", *own, *["-"] * len(result.forgetting), *blank],
    ]
    body += [_numbers(row, tasks) for row in rows]
    return Table(head, body)


def _numbers(row: Row, tasks: list[str]) -> list[str]:
    return [
        label(row),
        *(f"{100 * row.scores[task]:.1f}" for task in tasks),
        f"{row.normalised:.3f}",
        "-" if row.difference is None else f"{row.difference:+.3f}",
        "-" if row.retained is None else f"{row.retained:.3f}",
        f"{row.merge_cpu_seconds:.2f}",
        f"{row.merge_peak_bytes / 1e6:.0f}",
        str(row.tried),
    ]


def _explained(result: SuiteResult) -> str:
    return (
        "Scores in %. normalised: mean over tasks of score / expert's score; vs first: its "
        "difference to the first method's; retained: the same on what the base could do, relative "
        f"to the base. Intervals: paired bootstrap, {result.resamples} resamples. Tuned: best of "
        f"at most {result.budget} configurations on validation data. Seed {result.seed}."
    )
