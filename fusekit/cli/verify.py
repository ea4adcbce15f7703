"""`fusekit verify`: check a merged folder against its manifest."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fusekit.cli.format import size


def verify(
    out: Annotated[
        str, typer.Argument(help="A folder that fusekit wrote, or its URL.", show_default=False)
    ],
) -> None:
    """Check OUT against its manifest; exit status 1 if a tensor or file differs."""
    from fusekit.engine.manifest import verify as check

    result = check(out)
    if result.ok:
        print(f"{out}: {result.tensors} tensors, {size(result.nbytes)}, all as written")
        return
    for problem in result.problems:
        print(f"{out}: {problem}", file=sys.stderr)
    raise typer.Exit(1)
