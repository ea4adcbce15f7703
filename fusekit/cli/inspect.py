"""`fusekit inspect`: measure models before merging them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer


def inspect(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoint folders or files.", show_default=False)
    ],
    base: Annotated[str | None, typer.Option(help="What the models were fine-tuned from.")] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write every number to this file (- prints it).")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a report with figures to this file.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Write the figures as SVG files to this folder.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Worker threads; default all processors.")
    ] = None,
) -> None:
    """Compare MODELS with their base and each other, and advise on merging them."""
    from fusekit.checkpoint.writer import check_file
    from fusekit.errors import FusekitError
    from fusekit.inspection.run import inspect as run
    from fusekit.inspection.text import summary

    if html is not None or figures is not None:
        from fusekit.report.figures import require_plotly

        require_plotly()
    prints = json is not None and str(json) == "-"
    for path in (None if prints else json, html):
        if path is not None:
            check_file(path)
    if figures is not None and figures.exists() and not figures.is_dir():
        raise FusekitError(f"{figures}: is a file, expected a folder or nothing")
    found = run(models, base, threads=threads)
    if prints:
        print(found.to_json())
    else:
        print(summary(found, min(shutil.get_terminal_size().columns, 110)))
    if json is not None and not prints:
        json.write_text(found.to_json() + "\n", encoding="utf-8")
        print(f"numbers: {json}", file=sys.stderr)
    if html is not None or figures is not None:
        from fusekit.report.inspection import inspection_report

        report = inspection_report(found)
        if html is not None:
            html.write_text(report.to_html(), encoding="utf-8")
            print(f"report: {html}", file=sys.stderr)
        if figures is not None:
            report.save_figures(figures)
            print(f"figures: {figures}", file=sys.stderr)
    if any(finding.severity == "stop" for finding in found.findings):
        raise typer.Exit(1)
