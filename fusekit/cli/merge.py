"""`fusekit merge`: a recipe in, a checkpoint out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusekit.cli import plan as plan_command
from fusekit.cli.format import size

if TYPE_CHECKING:
    from fusekit.engine.run import MergeReport
    from fusekit.progress import Progress

PLAIN_SECONDS = 10.0
"""How often progress is printed where there is no terminal."""


def merge(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.", show_default=False)],
    out: Annotated[
        str | None,
        typer.Argument(help="Folder to create, or a URL (s3://bucket/model).", show_default=False),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            help="Instead of OUT: a checkpoint made with merge_method opcm to add the models to.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Worker threads; default all processors.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(metavar="DEVICE", help="Where whole matrices are merged: cpu, cuda, cuda:1."),
    ] = "cpu",
    out_shard_size: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Largest size of a weight file, such as 5GB or 500MB."),
    ] = "5GB",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop: nothing is written.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Continue an interrupted merge, or start over.",
        ),
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists, when complete.")
    ] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Let NaN and Inf through, with a warning.")
    ] = False,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Working folder of an output to a URL; default in ~/.cache/fusekit.",
            show_default=False,
        ),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read hub models where they are, without storing them.")
    ] = False,
) -> None:
    """Merge models as RECIPE says into the folder (or to the URL) OUT."""
    from fusekit.checkpoint.layout import parse_size
    from fusekit.engine.run import merge as run

    shard_bytes = parse_size(out_shard_size)
    if dry_run:
        plan_command.show(recipe, shard_bytes, stream=stream)
        return
    if out is None and into is None:
        raise typer.BadParameter(
            "OUT is missing: the folder to create (or use --into or --dry-run)"
        )
    with progress() as on_progress:
        report = run(
            recipe,
            out,
            into=into,
            threads=threads,
            device=device,
            out_shard_size=shard_bytes,
            resume=resume,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            on_progress=on_progress,
            on_compile=_say_compiling,
            on_upload=_say_uploading,
            work=work,
            stream=stream,
        )
    _print_report(report)


def _say_compiling() -> None:
    from fusekit import kernels

    kept = "first use only, cached for all later runs."
    lost = "there is no place to keep them for later runs; NUMBA_CACHE_DIR can name one."
    print(f"Compiling kernels: {kept if kernels.are_kept() else lost}", file=sys.stderr)


def _say_uploading(name: str) -> None:
    print(f"uploading {name}", file=sys.stderr)


@contextmanager
def progress() -> Iterator[Callable[[Progress], None]]:
    """A bar with GB/s and time left on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield _plain_progress()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import (
        Progress as Bar,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("merging", total=None)
        yield lambda at: bar.update(task, completed=at.written, total=at.total)


def _plain_progress() -> Callable[[Progress], None]:
    last = 0.0

    def show(at: Progress) -> None:
        nonlocal last
        if at.seconds - last >= PLAIN_SECONDS:
            last = at.seconds
            share = 100.0 * at.written / max(at.total, 1)
            speed = at.written / at.seconds / 1e9
            print(f"{share:3.0f} %  {size(at.written)}  {speed:.2f} GB/s", file=sys.stderr)

    return show


def _print_report(report: MergeReport) -> None:
    from fusekit.engine.run import value_remarks

    ratio = (report.bytes_read + report.bytes_written) / max(report.bytes_written, 1)
    again = f", {report.resumed} of them by an earlier run" if report.resumed else ""
    print(f"{report.out}: {report.tensors} tensors{again}")
    print(
        f"read {size(report.bytes_read)}, wrote {size(report.bytes_written)} "
        f"({ratio:.1f} bytes moved per byte written)"
    )
    print(
        f"{report.seconds:.1f} s, {report.cpu_seconds:.1f} s CPU, "
        f"peak memory {size(report.peak_rss)}"
    )
    for warning in (*report.warnings, *value_remarks(report.nonfinite, report.overflows)):
        print(f"warning: {warning}", file=sys.stderr)
