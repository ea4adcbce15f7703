"""`fusekit plan`: what a merge would do, without reading a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusekit.cli.format import size

if TYPE_CHECKING:
    from fusekit.adapters.merge import Settings
    from fusekit.adapters.recipe import AdapterPlan
    from fusekit.engine.plan import Plan


def plan(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.", show_default=False)],
    out_shard_size: Annotated[
        str, typer.Option(help="Largest size of a weight file, such as 5GB or 500MB.")
    ] = "5GB",
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor with its method and parameters.")
    ] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show every parameter over the layers, and its values."),
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Look at hub models without downloading them.")
    ] = False,
) -> None:
    """Print what merging RECIPE would read, hold in memory and write."""
    from fusekit.checkpoint.layout import parse_size

    show(recipe, parse_size(out_shard_size), tensors, explain=explain, stream=stream)


def show(
    recipe: Path,
    shard_bytes: int,
    tensors: bool = False,
    *,
    explain: bool = False,
    stream: bool = False,
) -> None:
    """Plan a recipe and print the plan."""
    from fusekit.adapters.recipe import merges_adapters, plan_adapters
    from fusekit.engine.executor import available_cpus, memory_estimate
    from fusekit.engine.planner import plan as make_plan
    from fusekit.recipe.schema import load_recipe

    loaded = load_recipe(recipe)
    if merges_adapters(loaded):
        _print_adapters(plan_adapters(loaded), tensors or explain)
        return
    made = make_plan(loaded, out_shard_size=shard_bytes, stream=stream)
    try:
        _print_summary(made)
        print(f"memory    about {size(memory_estimate(made, available_cpus()))} of buffers")
        if explain:
            _print_explanation(made)
        if tensors:
            _print_tensors(made)
    finally:
        made.close()


def _print_summary(made: Plan) -> None:
    method = made.tensors[0].method if made.tensors else None
    if method is not None:
        print(f"method    {method.name}: {method.summary}")
    for checkpoint in made.checkpoints:
        nbytes = sum(info.nbytes for info in checkpoint.source.tensors.values())
        print(f"input     {checkpoint.reference}  {size(nbytes)}")
    for warning in made.warnings:
        print(f"warning   {warning}")
    kinds = Counter(planned.kind for planned in made.tensors)
    copied = f", {kinds['same']} copied if equal (integer or empty)" if kinds["same"] else ""
    copied += f", {kinds['first']} copied from the first" if kinds["first"] else ""
    print(f"tensors   {kinds['merge']} merged{copied}; granularity {made.granularity}")
    whole = sum(planned.is_whole for planned in made.tensors)
    if whole and method is not None:
        print(f"whole     {whole} merged as whole matrices; others: {method.others}")
    dtypes = Counter(planned.dtype.torch_name for planned in made.tensors)
    print("dtypes    " + ", ".join(f"{count} {name}" for name, count in dtypes.most_common()))
    passes = made.tensors[0].method.passes if made.tensors else "one"
    print(f"read      {size(made.input_bytes)}; passes over it: {passes}")
    shards = len(made.layout.shards)
    print(f"write     {size(made.output_bytes)} in {shards} file{'s' * (shards > 1)}")


def _print_adapters(made: AdapterPlan, modules: bool) -> None:
    print(f"method    {made.method}: adapters are merged into one adapter")
    settings = [made.settings(name) for name in made.modules]
    for i, nbytes in enumerate(made.input_bytes()):
        span = _span([weights[i] for weights, _ in settings])
        count = len(made.adapters[i].modules)
        print(
            f"input     {made.references[i]}  {size(nbytes)}, {count} modules, "
            f"weight {span}{_densities(made, settings, i)}"
        )
    rank = _span([options.rank for _, options in settings if options.rank])
    print(f"modules   {len(made.modules)} merged" + (f", to rank {rank}" if rank else ""))
    print(f"read      {size(sum(made.input_bytes()))}")
    for name, (weights, options) in zip(made.modules, settings, strict=True) if modules else ():
        holders = [
            f"{reference} (weight {weight:.4g})"
            for reference, adapter, weight in zip(
                made.references, made.adapters, weights, strict=True
            )
            if name in adapter.modules
        ]
        to_rank = f"rank {options.rank}  " if options.rank else ""
        print(f"  {name}  {to_rank}{', '.join(holders)}")


def _densities(made: AdapterPlan, settings: list[Settings], adapter: int) -> str:
    if made.options.density is None:
        return ""
    count = len(made.adapters)
    return f", density {_span([options.densities(count)[adapter] for _, options in settings])}"


def _span(values: Sequence[float]) -> str:
    """One number for all, or the least and the largest."""
    ends = sorted({f"{value:g}" for value in values}, key=float)
    return " to ".join(ends if len(ends) < 2 else (ends[0], ends[-1]))


def _print_explanation(made: Plan) -> None:
    from fusekit.engine.explain import explain

    for curve in explain(made):
        print(f"\n{curve.parameter}  {curve.models}".rstrip())
        for row in curve.rows:
            bars = f"{row.bars}  " if row.bars else ""
            print(f"  {bars}{row.text}  {row.tensors}")


def _print_tensors(made: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("tensor", "shape", "dtype", "file", "parameters", box=None)
    for planned in made.tensors:
        values = dict(planned.tensor.parameters)
        for i, own in enumerate(planned.tensor.model_parameters):
            values.update({f"{name}[{i}]": value for name, value in own.items()})
        table.add_row(
            planned.name,
            "x".join(map(str, planned.shape)) or "scalar",
            planned.dtype.torch_name,
            made.layout.shard_of[planned.name].file_name,
            " ".join(
                f"{name}={_short(value)}" for name, value in values.items() if value is not None
            ),
        )
    Console(width=200).print(table)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
