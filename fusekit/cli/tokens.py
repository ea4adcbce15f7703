"""`fusekit tokens`: working on a model's vocabulary."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Work on a model's vocabulary.")


@app.callback()
def _group() -> None:
    """Keeps `transplant` a sub-command although it is the only one."""


class Method(StrEnum):
    """How rows for tokens the model lacks are made."""

    omp = "omp"
    common_interpolation = "common_interpolation"
    subword = "subword"
    mean = "mean"
    zero = "zero"
    randn = "randn"
    john_hewitt = "john_hewitt"
    landmark_pca = "landmark_pca"


class WeightScheme(StrEnum):
    """Weights of the nearest shared tokens."""

    distance_proportional = "distance_proportional"
    barycentric = "barycentric"
    least_squares = "least_squares"


class SubwordRule(StrEnum):
    """How the rows of a token's pieces are combined."""

    mean = "mean"
    sum = "sum"
    weighted_mean = "weighted_mean"
    first_last = "first_last"


class Where(StrEnum):
    """The matrices a match applies to."""

    none = "none"
    embed = "embed"
    lm_head = "lm_head"
    both = "both"


@app.command()
def transplant(
    model: Annotated[Path, typer.Argument(help="Folder of the model whose weights are kept.")],
    donor: Annotated[Path, typer.Argument(help="Folder of the model whose tokenizer is used.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    method: Annotated[Method, typer.Option(help="How new rows are made.")] = Method.omp,
    k: Annotated[int, typer.Option("--k", min=1, help="Shared tokens per new row.")] = 64,
    cosine: Annotated[bool, typer.Option("--cosine", help="Nearest by cosine.")] = False,
    weight_scheme: Annotated[
        WeightScheme, typer.Option(help="Weights of the nearest (common_interpolation).")
    ] = WeightScheme.distance_proportional,
    subword_rule: Annotated[
        SubwordRule, typer.Option(help="How pieces are combined (subword).")
    ] = SubwordRule.mean,
    prefix_match: Annotated[
        Where, typer.Option(help="Copy the longest known prefix's row, where.")
    ] = Where.none,
    byte_match: Annotated[
        Where, typer.Option(help="Match single bytes with <0xNN> tokens, where.")
    ] = Where.none,
    scale: Annotated[float, typer.Option(help="Factor on new rows.")] = 1.0,
    noise: Annotated[float, typer.Option(min=0.0, help="Noise on new rows (std).")] = 0.0,
    zero_untrained: Annotated[
        bool, typer.Option("--zero-untrained", help="Zero tokens poorly trained in both models.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="New rows per step.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of random methods and noise.")] = 0,
) -> None:
    """Give MODEL the tokenizer of DONOR, without training.

    Tokens both know keep MODEL's rows; rows of the others are approximated from DONOR's embedding.
    """
    from fusekit.tokenizers.transplant import TransplantOptions
    from fusekit.tokenizers.transplant_folder import transplant_tokens

    options = TransplantOptions(
        method=method.value,
        k=k,
        cosine=cosine,
        weight_scheme=weight_scheme.value,
        subword_rule=subword_rule.value,
        prefix_match=prefix_match.value,
        byte_match=byte_match.value,
        scale=scale,
        noise=noise,
        zero_untrained=zero_untrained,
        batch=batch,
        seed=seed,
    )
    report = transplant_tokens(model, donor, out, options)
    typer.echo(
        f"{out}: {report.tokens} tokens, {report.shared} shared, {report.rows} rows; "
        f"digit tokens shared: {report.digits_shared} of {report.digits}"
    )
    if report.zeroed:
        typer.echo(f"{report.zeroed} tokens poorly trained in both models were zeroed")
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)
