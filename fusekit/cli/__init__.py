"""The command line: one file per command; each parses, calls the API and prints."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from fusekit import __version__
from fusekit.cli import (
    adapter,
    calibrate,
    demo,
    inspect,
    merge,
    methods,
    moe,
    plan,
    reconstruct,
    soup,
    suite,
    tokens,
    verify,
)
from fusekit.errors import FusekitError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

app = typer.Typer(
    name="fusekit",
    help="Fuse trained neural networks: merge checkpoints from a recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("merge")(merge.merge)
app.command("moe")(moe.moe)
app.command("plan")(plan.plan)
app.command("inspect")(inspect.inspect)
app.command("methods")(methods.methods)
app.command("reconstruct")(reconstruct.reconstruct)
app.command("soup")(soup.soup)
app.command("verify")(verify.verify)
app.command("calibrate")(calibrate.calibrate)
app.command("demo")(demo.demo)
app.add_typer(adapter.app, name="adapter")
app.add_typer(suite.app, name="suite")
app.add_typer(tokens.app, name="tokens")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fusekit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options before any command."""


def main() -> None:
    """Entry point: refusals are one sentence on standard error and exit status 2."""
    _open_standard_streams()
    try:
        _run()
    except FusekitError as error:
        print(f"fusekit: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # nobody reads on, as in `fusekit methods | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.strerror is None:
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        print(f"fusekit: {place}{error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fusekit: interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _run() -> None:
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer has swallowed what told it so
            raise KeyboardInterrupt from None
        raise
    finally:
        sys.stdout.flush()


def _open_standard_streams() -> None:
    """Let no weight file take the number of a standard stream that the caller has closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")
