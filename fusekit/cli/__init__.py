"""The command line: one file per command; each parses, calls the API and prints."""

from __future__ import annotations

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
    try:
        app()
    except FusekitError as error:
        print(f"fusekit: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        print(f"fusekit: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fusekit: interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
