"""A suite's result as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fusekit.evaluate.bootstrap import Interval
from fusekit.evaluate.result import Row, SuiteResult

_HEAD = (
    "normalised [95 %]",
    "vs first [95 %]",
    "retained [95 %]",
    "merge CPU s",
    "data CPU s",
    "tuning CPU s",
    "peak MB",
    "tried",
)


def markdown(result: SuiteResult) -> str:
    """Three tables: scores and costs, every task's relative score, every expert on every task."""
    return "\n".join([_scores(result), _by_task(result), _experts(result), _notes(result)])


def summary(result: SuiteResult) -> str:
    """The comparison without single tasks, in columns that fit a terminal, and what they mean."""
    head = ["model", "mean %", "normalised [95 %]", "vs first [95 %]", "retained [95 %]", "CPU s"]
    lines = [head]
    for name, reference in result.references.items():
        mean, relative = _mean_percent(result, reference.scores), f"{reference.normalised:.3f}"
        lines.append([name, mean, relative, "-", with_interval(reference.retained, None), "-"])
    own = _mean_percent(result, result.own_scores())
    lines.append(["expert of the task", own, "1.000", "-", "-", "-"])
    for row in result.rows:
        relative = with_interval(row.normalised, row.normalised_interval)
        difference = with_interval(row.difference, row.difference_interval, "+.3f")
        retained = with_interval(row.retained, row.retained_interval)
        mean, seconds = _mean_percent(result, row.scores), f"{row.total_seconds:.1f}"
        lines.append([label(row), mean, relative, difference, retained, seconds])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]
    return "\n".join([*table, "", f"CPU s: data, tuning and merge. {_notes(result)}"])


def comparison(result: SuiteResult) -> str:
    """The comparison without single tasks as Markdown, with what every row cost."""
    first = result.rows[0].method if result.rows else "first"
    head = ["model", "mean %", "normalised [95 %]", f"vs {first} [95 %]", "retained [95 %]"]
    head += ["data CPU s", "merge CPU s", "tuning CPU s", "peak MB"]
    lines = [_line(head), _ruler(len(head))]
    for name, reference in result.references.items():
        relative = [f"{reference.normalised:.3f}", "-", with_interval(reference.retained, None)]
        mean = _mean_percent(result, reference.scores)
        lines.append(_line([name, mean, *relative, *["-"] * 4]))
    own = _mean_percent(result, result.own_scores())
    lines.append(_line(["expert of the task", own, "1.000", *["-"] * 6]))
    for row in result.rows:
        cells = [label(row), _mean_percent(result, row.scores)]
        cells.append(with_interval(row.normalised, row.normalised_interval))
        cells.append(with_interval(row.difference, row.difference_interval, "+.3f"))
        cells.append(with_interval(row.retained, row.retained_interval))
        cells.append(f"{row.measuring_seconds:.1f}" if row.measuring_seconds else "-")
        cells.append(f"{row.merge_cpu_seconds:.2f}")
        cells.append(f"{row.tuning_seconds:.1f}" if row.tried > 1 else "-")
        cells.append(f"{row.merge_peak_bytes / 1e6:.0f}")
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _mean_percent(result: SuiteResult, scores: Mapping[str, float]) -> str:
    """Mean over tasks of the mean over a task's datasets, in %."""
    tasks = [sum(scores[n] for n in names) / len(names) for names in result.groups.values()]
    return f"{100 * sum(tasks) / len(tasks):.1f}"


def label(row: Row) -> str:
    """`ties, tuned (density 0.3, lambda 1)`."""
    values = ", ".join(f"{name} {value:g}" for name, value in row.parameters.items())
    if row.variant == "default":
        return f"{row.method}, default"
    return f"{row.method}, tuned ({values or 'to the default'})"


def with_interval(value: float | None, bounds: Interval | None, form: str = ".3f") -> str:
    """`0.803 [0.787, 0.819]`, or `-` for no value."""
    if value is None:
        return "-"
    if bounds is None:
        return f"{value:{form}}"
    return f"{value:{form}} [{bounds[0]:{form}}, {bounds[1]:{form}}]"


def explained(result: SuiteResult) -> str:
    """What the columns mean, in a few sentences."""
    forgetting = ", ".join(result.forgetting)
    retained = f"the same over {forgetting}, relative to the base" if forgetting else "not measured"
    return (
        "normalised: mean over tasks of the mean over a task's datasets of score / expert's score; "
        f"vs first: its difference to the first method's; retained: {retained}. Intervals: paired "
        f"bootstrap over examples, {result.resamples} resamples. Tuned: best of at most "
        f"{result.budget} configurations on validation data. Seed {result.seed}. Merge: CPU time, "
        "and memory above that of the loaded libraries, of a merge in a process of its own; data: "
        "running models on training examples; tuning: merging and scoring all that was tried."
    )


def _scores(result: SuiteResult) -> str:
    shown = [*result.datasets, *result.forgetting]
    lines = [_line(["model", *shown, *_HEAD]), _ruler(1 + len(shown) + len(_HEAD))]
    own = result.own_scores()
    for name, reference in result.references.items():
        relative = [f"{reference.normalised:.3f}", "-", with_interval(reference.retained, None)]
        lines.append(_line([name, *_percents(reference.scores, shown), *relative, *["-"] * 5]))
    experts = ["expert of the task", *_percents(own, shown), "1.000", *["-"] * 7]
    lines.append(_line(experts))
    for row in result.rows:
        cells = [label(row), *_percents(row.scores, shown)]
        cells.append(with_interval(row.normalised, row.normalised_interval))
        cells.append(with_interval(row.difference, row.difference_interval, "+.3f"))
        cells.append(with_interval(row.retained, row.retained_interval))
        cells += [f"{row.merge_cpu_seconds:.2f}", f"{row.measuring_seconds:.1f}"]
        cells += [f"{row.tuning_seconds:.1f}", f"{row.merge_peak_bytes / 1e6:.0f}", str(row.tried)]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _by_task(result: SuiteResult) -> str:
    tasks = list(result.groups)
    lines = [_line(["relative to the expert", *tasks]), _ruler(1 + len(tasks))]
    for row in result.rows:
        cells = [f"{row.by_task[task]:.3f}" if task in row.by_task else "-" for task in tasks]
        lines.append(_line([label(row), *cells]))
    return "\n".join(lines) + "\n"


def _experts(result: SuiteResult) -> str:
    shown = [*result.datasets, *result.forgetting]
    lines = [_line(["expert", *shown]), _ruler(1 + len(shown))]
    lines += [_line([task, *_percents(each, shown)]) for task, each in result.experts.items()]
    return "\n".join(lines) + "\n"


def _notes(result: SuiteResult) -> str:
    count = len(result.groups)
    notes = [f"Suite {result.suite}: one model for all {count} tasks; scores in %."]
    notes.append(explained(result))
    notes += [f"No ratio counts {name}: nothing is scored there." for name in result.dropped]
    notes += [f"Left out: {skip.method} ({skip.reason})." for skip in result.skipped]
    notes += [f"Failed: {method} ({reason})." for method, reason in result.failed.items()]
    return "\n".join(notes) + "\n"


def _percents(scores: Mapping[str, float], names: Iterable[str]) -> list[str]:
    return [f"{100 * scores[name]:.1f}" if name in scores else "-" for name in names]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ruler(columns: int) -> str:
    return _line(["---", *["---:"] * (columns - 1)])
