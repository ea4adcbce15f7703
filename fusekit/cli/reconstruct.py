"""`fusekit reconstruct`: one expert back from a merge that kept its mask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusekit.cli.format import size


def reconstruct(
    merged: Annotated[
        Path,
        typer.Argument(help="A folder that emr or tall_masks wrote.", show_default=False),
    ],
    task: Annotated[str, typer.Option(help="The expert's task.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to create; default MERGED-TASK.", show_default=False),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model, if it is not where it was.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Worker threads; default all processors.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder if it exists.")
    ] = False,
) -> None:
    """Rebuild the expert of one TASK from the folder MERGED."""
    from fusekit.engine.reconstruct import reconstruct as run

    report = run(merged, task, out, base=base, threads=threads, overwrite=overwrite)
    print(f"{report.out}: {report.tensors} tensors, {size(report.bytes_written)}")
