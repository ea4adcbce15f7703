"""`fusekit soup`: the average of fine-tunings of one model, of those that help."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Accept(StrEnum):
    """When a model joins the soup."""

    KEEPS = ">="
    RISES = ">"


def soup(
    out: Annotated[Path, typer.Argument(help="Folder to create.", show_default=False)],
    models: Annotated[
        list[str], typer.Argument(help="Folders, weight files or hub ids.", show_default=False)
    ],
    evaluate: Annotated[
        str | None,
        typer.Option(
            help="Command that prints a number last, larger is better; {model} in it stands for "
            "the candidate's folder. Left out, all models are averaged.",
            show_default=False,
        ),
    ] = None,
    accept: Annotated[
        Accept, typer.Option(help="A model joins if the score stays the same, or only if it rises.")
    ] = Accept.KEEPS,
    minimum_gain: Annotated[
        float, typer.Option(help="How much the score must rise by for a model to join.")
    ] = 0.0,
    restarts: Annotated[
        int, typer.Option(min=0, help="Further searches, in random order; the best soup is kept.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the random orders.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Worker threads; default all processors.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists, when complete.")
    ] = False,
) -> None:
    """Average MODELS into OUT: all of them, or greedily those that --evaluate scores well."""
    from fusekit.learn import greedy_soup_folder, uniform_soup_folder

    if evaluate is None:
        if accept is not Accept.KEEPS or minimum_gain or restarts:
            raise typer.BadParameter("--accept, --minimum-gain and --restarts need --evaluate")
        uniform_soup_folder(models, out, threads=threads, overwrite=overwrite)
        print(f"{out}: the average of {len(models)} model{'s' * (len(models) > 1)}")
        return

    def show(indices: Sequence[int], value: float) -> None:
        print(f"{value:g}  {' + '.join(models[i] for i in indices)}", file=sys.stderr)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        chosen = greedy_soup_folder(
            models,
            evaluate,
            out,
            accept=accept.value,
            minimum_gain=minimum_gain,
            restarts=restarts,
            seed=seed,
            threads=threads,
            overwrite=overwrite,
            on_score=show,
        )
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    best = max(chosen.scores)
    print(
        f"{out}: {len(chosen.ingredients)} of {len(models)} models, score {chosen.best:g} "
        f"(best single model {best:g})"
    )
    for i in chosen.ingredients:
        print(f"  {models[i]}")
