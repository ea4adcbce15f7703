"""`fusekit suite`: compare merging methods on a suite of tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Compare merging methods on a base, its experts and their tasks.")


@app.command("run")
def run(
    suite: Annotated[
        str, typer.Argument(help="A built-in suite (digits) or a YAML file.", show_default=False)
    ],
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated names; mergebench and scale are sets; all that need no data."
        ),
    ] = "all",
    out: Annotated[
        Path, typer.Option(help="Folder for results; what is there is not computed again.")
    ] = Path("suite-out"),
    budget: Annotated[
        int, typer.Option(min=1, help="Configurations per method on validation data; 1: no tuning.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of random methods, tuning and bootstrap.")] = 0,
    threads: Annotated[
        int, typer.Option(min=1, help="Of every merge; on one, CPU seconds are seconds.")
    ] = 1,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a report with figures to this file.")
    ] = None,
) -> None:
    """Merge SUITE's experts by every method, score every merge, print and save the table."""
    from fusekit.evaluate.runner import run_suite
    from fusekit.evaluate.suite import load_suite
    from fusekit.evaluate.table import summary

    if html is not None:
        from fusekit.checkpoint.writer import check_file
        from fusekit.report.figures import require_plotly

        require_plotly()
        check_file(html)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    result = run_suite(
        load_suite(suite),
        names,
        out,
        budget=budget,
        seed=seed,
        threads=threads,
        on_progress=lambda name: print(name, file=sys.stderr),
    )
    print(summary(result), end="")
    print(f"table: {out / 'results.md'}, {out / 'results.json'}", file=sys.stderr)
    if html is not None:
        from fusekit.report.suite import suite_report

        html.write_text(suite_report(result).to_html(), encoding="utf-8")
        print(f"report: {html}", file=sys.stderr)


@app.command("build")
def build(
    name: Annotated[str, typer.Argument(help="digits, vision, text or lm.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder for the suite.", show_default=False)],
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data, for suites that need some.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the data's split and the training.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, a setting of the suite.")
    ] = None,
) -> None:
    """Train the base and experts of suite NAME; what is there is not trained again."""
    import yaml

    from fusekit.evaluate.building import build_suite

    given = {}
    for item in settings or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise typer.BadParameter(f"--set: found {item!r}, expected key=value")
        given[key.strip()] = yaml.safe_load(value)
    path = build_suite(
        name,
        out,
        data=data,
        seed=seed,
        settings=given,
        on_progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(f"suite: {path} (next: fusekit suite run {path})")


@app.command("study")
def study(
    suites: Annotated[
        list[str],
        typer.Argument(help="Built-in suites (digits) or YAML files.", show_default=False),
    ],
    methods: Annotated[
        str, typer.Option(help="Comma-separated names; scale and mergebench are sets.")
    ] = "scale",
    counts: Annotated[str, typer.Option(help="Comma-separated numbers of experts.")] = "2,4,6",
    subsets: Annotated[int, typer.Option(min=1, help="Random subsets per number.")] = 3,
    out: Annotated[
        Path, typer.Option(help="Folder for results; what is there is not computed again.")
    ] = Path("study-out"),
    seed: Annotated[int, typer.Option(min=0, help="Of subsets and random methods.")] = 0,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a report with figures to this file.")
    ] = None,
) -> None:
    """Merge random subsets of SUITES' experts: what every further expert costs the others.

    Suites that differ in size or base quality (built with other settings) are compared.
    """
    from fusekit.evaluate.study import run_study
    from fusekit.evaluate.study_table import markdown
    from fusekit.evaluate.suite import load_suite

    if html is not None:
        from fusekit.checkpoint.writer import check_file
        from fusekit.report.figures import require_plotly

        require_plotly()
        check_file(html)
    if not all(count.strip().isdecimal() for count in counts.split(",")):
        raise typer.BadParameter(f"--counts: found {counts!r}, expected numbers such as 2,4,6")
    result = run_study(
        [load_suite(suite) for suite in suites],
        [name.strip() for name in methods.split(",") if name.strip()],
        [int(count) for count in counts.split(",")],
        out,
        subsets=subsets,
        seed=seed,
        on_progress=lambda name: print(name, file=sys.stderr),
    )
    print(markdown(result), end="")
    print(f"cells: {out / 'study.json'}", file=sys.stderr)
    if html is not None:
        from fusekit.report.study import study_report

        html.write_text(study_report(result).to_html(), encoding="utf-8")
        print(f"report: {html}", file=sys.stderr)
