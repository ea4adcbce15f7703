"""`fusekit calibrate`: what data says about a model, as a file that merging methods take."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusekit.calibrate.run import Progress

PLAIN_SECONDS = 10.0
"""How often progress is printed."""


class Statistic(StrEnum):
    """What can be measured."""

    FISHER = "fisher"
    GRAM = "gram"
    MEAN = "mean"
    NORM = "norm"


class Estimator(StrEnum):
    """Over which labels the Fisher information is taken."""

    EXACT = "exact"
    SAMPLED = "sampled"
    EMPIRICAL = "empirical"
    BATCH_SQRT = "batch_sqrt"


def calibrate(
    model: Annotated[Path, typer.Argument(help="Folder of a transformers model.")],
    data: Annotated[
        Path,
        typer.Argument(
            help="Documents (.txt, .jsonl, .parquet, .arrow, .feather) or token ids (.safetensors)."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="File of statistics to write (.safetensors).")],
    statistic: Annotated[
        Statistic,
        typer.Option(help="gram, mean or norm of the linear layers' inputs, or fisher."),
    ] = Statistic.GRAM,
    modules: Annotated[
        str | None,
        typer.Option(help="Regular expression of the layers to watch.", show_default=False),
    ] = None,
    estimator: Annotated[
        Estimator | None,
        typer.Option(
            help="Of fisher; default sampled for language models, exact for others.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Sequences to measure on.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens per sequence, at most.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    text: Annotated[str, typer.Option(help="Field of the text.")] = "text",
    label: Annotated[str, typer.Option(help="Field of the class index.")] = "label",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of sampled labels.")] = 0,
    max_memory: Annotated[
        str | None,
        typer.Option(help="Most memory for the statistics, such as 8GB.", show_default=False),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue an interrupted measurement, or start over.")
    ] = True,
) -> None:
    """Measure MODEL on DATA for methods such as fisher and regmean."""
    from fusekit import calibrate as measuring
    from fusekit.checkpoint.layout import parse_size

    written = measuring.measure_folder(
        model,
        data,
        out,
        statistic=statistic.value,
        modules=modules,
        estimator=None if estimator is None else estimator.value,
        samples=samples,
        length=length,
        batch=batch,
        text=text,
        label=label,
        device=device,
        seed=seed,
        max_memory=None if max_memory is None else parse_size(max_memory),
        resume=resume,
        on_progress=_progress(),
    )
    print(f"{written}: {statistic.value} of {model}")


def _progress() -> Callable[[Progress], None]:
    last = 0.0

    def show(at: Progress) -> None:
        nonlocal last
        if at.seconds - last >= PLAIN_SECONDS:
            last = at.seconds
            print(f"{at.batches} of {at.total} batches, {at.seconds:.0f} s", file=sys.stderr)

    return show
