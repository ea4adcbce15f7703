"""`fusekit moe`: dense models in, a mixture of experts out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def moe(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to create.", show_default=False)],
    threads: Annotated[
        int | None, typer.Option(min=1, help="Worker threads; default all processors.")
    ] = None,
    out_shard_size: Annotated[
        str, typer.Option(help="Largest size of a weight file, such as 5GB or 500MB.")
    ] = "5GB",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Continue an interrupted run, or start over.",
        ),
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists, when complete.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="Where the base model reads prompts: cpu, cuda.")
    ] = "cpu",
) -> None:
    """Make the MLPs of dense models the experts of one mixture, as RECIPE says."""
    from fusekit.checkpoint.layout import parse_size
    from fusekit.structure.upcycle import upcycle

    made = upcycle(
        recipe,
        out,
        threads=threads,
        out_shard_size=parse_size(out_shard_size),
        resume=resume,
        overwrite=overwrite,
        device=device,
    )
    for warning in made.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{out}: {made.layout}, {made.report.tensors} tensors")
