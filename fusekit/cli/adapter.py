"""`fusekit adapter`: merge, extract, pack and describe LoRA adapters."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusekit.cli.format import size
from fusekit.cli.merge import progress

if TYPE_CHECKING:
    from fusekit.adapters.adapter import Adapter
    from fusekit.adapters.extract import ExtractReport
    from fusekit.adapters.info import AdapterInfo, Overlap
    from fusekit.adapters.reversible import PackReport

app = typer.Typer(
    no_args_is_help=True, help="Merge, extract, pack and describe LoRA adapters (PEFT folders)."
)

CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


class Method(StrEnum):
    """How adapters are merged."""

    linear = "linear"
    cat = "cat"
    svd = "svd"
    ties = "ties"
    ties_svd = "ties_svd"
    dare_linear = "dare_linear"
    dare_linear_svd = "dare_linear_svd"
    dare_ties = "dare_ties"
    dare_ties_svd = "dare_ties_svd"
    magnitude_prune = "magnitude_prune"
    magnitude_prune_svd = "magnitude_prune_svd"
    lora_lego = "lora_lego"
    knots_linear = "knots_linear"
    knots_ties = "knots_ties"
    knots_dare_ties = "knots_dare_ties"


class MajoritySign(StrEnum):
    """What TIES counts when it elects a sign."""

    total = "total"
    frequency = "frequency"


class Convention(StrEnum):
    """Whose conventions a merge follows."""

    fusekit = "fusekit"
    peft = "peft"


class Side(StrEnum):
    """A side of a weight matrix."""

    output = "output"
    input = "input"


class Decomposition(StrEnum):
    """How dense results are decomposed."""

    auto = "auto"
    exact = "exact"
    randomized = "randomized"


class Replacements(StrEnum):
    """What becomes of tensors that several adapters save whole."""

    error = "error"
    first = "first"
    average = "average"


class ExtractSvd(StrEnum):
    """How differences are decomposed."""

    randomized = "randomized"
    exact = "exact"


class Embeddings(StrEnum):
    """What becomes of embeddings and output heads."""

    save = "save"
    lora = "lora"
    skip = "skip"


class Biases(StrEnum):
    """What becomes of the biases of decomposed layers."""

    lora = "lora"
    save = "save"
    skip = "skip"


class Others(StrEnum):
    """What becomes of norms and other tensors that do not decompose."""

    save = "save"
    skip = "skip"


@app.command()
def merge(
    adapters: Annotated[
        list[str], typer.Argument(help="Adapter folders, LoRA files, or adapters on the hub.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    method: Annotated[Method, typer.Option(help="How adapters are merged.")] = Method.svd,
    weight: Annotated[
        list[float] | None,
        typer.Option(help="Weight of an adapter; repeat, one per adapter.", show_default=False),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the result.")] = None,
    parameter_budget: Annotated[
        int | None, typer.Option(min=1, help="Factor entries to share out over all modules.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Fraction of entries kept.")] = None,
    majority_sign: Annotated[
        MajoritySign | None, typer.Option(help="What TIES counts; default total.")
    ] = None,
    convention: Annotated[
        Convention | None,
        typer.Option(help="peft: as PEFT's add_weighted_adapter; default fusekit."),
    ] = None,
    svd: Annotated[
        Decomposition | None, typer.Option(help="Decomposition of dense results; default auto.")
    ] = None,
    replacements: Annotated[
        Replacements | None,
        typer.Option(help="Tensors several adapters save whole; default error."),
    ] = None,
    restarts: Annotated[
        int | None, typer.Option(min=1, help="Runs of k-means (lora_lego); default 1.")
    ] = None,
    canonicalize: Annotated[
        bool, typer.Option("--canonicalize", help="Align signs and sizes first (lora_lego).")
    ] = False,
    knots_basis: Annotated[
        Side | None, typer.Option(help="Side whose common basis KnOTS takes; default output.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model, for DoRA adapters and kohya files.")
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="The part of a LoRA file for several models (unet, te1).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random masks and clusters.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Modules at once.")] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue an interrupted merge, or start over.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists, when complete.")
    ] = False,
) -> None:
    """Merge ADAPTERS of one base model into one adapter."""
    from fusekit.adapters.recipe import merge_planned, plan_adapters
    from fusekit.checkpoint.writer import check_target
    from fusekit.errors import FusekitError
    from fusekit.recipe.schema import load_recipe

    if weight and len(weight) != len(adapters):
        raise FusekitError(f"{len(weight)} weights for {len(adapters)} adapters")
    own = [{"weight": each} for each in weight] if weight else [{} for _ in adapters]
    given = {
        "rank": rank,
        "parameter_budget": parameter_budget,
        "density": density,
        "majority_sign_method": majority_sign and majority_sign.value,
        "convention": convention and convention.value,
        "svd": svd and svd.value,
        "replacements": replacements and replacements.value,
        "restarts": restarts,
        "canonicalize": canonicalize or None,
        "knots_basis": knots_basis and knots_basis.value,
    }
    recipe = {
        "merge_method": method.value,
        "base_model": base,
        "models": [
            {"model": reference, "parameters": values}
            for reference, values in zip(adapters, own, strict=True)
        ],
        "parameters": {name: value for name, value in given.items() if value is not None},
        "seed": seed,
    }
    check_target(out, overwrite)
    plan = plan_adapters(load_recipe(recipe), component)
    with progress() as on_progress:
        report = merge_planned(
            plan,
            out,
            threads=threads,
            resume=resume,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    typer.echo(
        f"{out}: {method.value} of {len(adapters)} adapter{'s' * (len(adapters) > 1)}, "
        f"{report.tensors} tensors, "
        f"{size(report.bytes_written)}"
    )
    for warning in report.warnings:
        typer.echo(f"warning: {warning}", err=True)


@app.command()
def extract(
    base: Annotated[str, typer.Argument(help="The model the adapter will be put on.")],
    model: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    rank: Annotated[int, typer.Option(min=1, help="Largest rank of a module.")] = 128,
    energy: Annotated[
        float | None, typer.Option(help="Keep this share of every squared norm, up to --rank.")
    ] = None,
    parameter_budget: Annotated[
        int | None, typer.Option(min=1, help="Factor entries to share out over all modules.")
    ] = None,
    sv_epsilon: Annotated[float, typer.Option(help="Drop singular values up to this.")] = 0.0,
    svd: Annotated[ExtractSvd, typer.Option(help="Decomposition.")] = ExtractSvd.randomized,
    distribute: Annotated[
        bool, typer.Option(help="Share singular values between both factors.")
    ] = True,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Regular expression of modules to take; repeat.", show_default=False),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Regular expression of modules to leave; repeat.", show_default=False),
    ] = None,
    save: Annotated[
        list[str] | None,
        typer.Option(
            help="Regular expression of modules to store whole; repeat.", show_default=False
        ),
    ] = None,
    embeddings: Annotated[
        Embeddings, typer.Option(help="Embeddings and output heads.")
    ] = Embeddings.save,
    biases: Annotated[Biases, typer.Option(help="Biases of decomposed layers.")] = Biases.lora,
    others: Annotated[Others, typer.Option(help="Norms and the like.")] = Others.save,
    seed: Annotated[int, typer.Option(help="Seed of the randomized decomposition.")] = 0,
    resume: Annotated[
        bool, typer.Option(help="Continue an interrupted extraction, or start over.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists, when complete.")
    ] = False,
) -> None:
    """Turn the difference of MODEL and BASE into an adapter."""
    from fusekit.adapters import ExtractOptions, extract_adapter
    from fusekit.checkpoint.folder import open_checkpoint
    from fusekit.errors import FusekitError

    for reference in (base, model):
        if (Path(reference) / "adapter_config.json").is_file():
            raise FusekitError(f"{reference}: is an adapter, expected a model")
    opened = open_checkpoint(base)
    config = opened.config() or {}
    options = ExtractOptions(
        rank=rank,
        energy=energy,
        parameter_budget=parameter_budget,
        sv_epsilon=sv_epsilon,
        svd=svd.value,
        seed=seed,
        distribute=distribute,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        save=tuple(save or ()),
        embeddings=embeddings.value,
        biases=biases.value,
        others=others.value,
        conv1d=config.get("model_type") in CONV1D_MODELS,
    )
    fields = {"base_model_name_or_path": base, "task_type": _task_type(config)}
    tuned = open_checkpoint(model).source
    report = extract_adapter(
        opened.source, tuned, out, options, fields, overwrite=overwrite, resume=resume
    )
    _print_extraction(out, report)


@app.command()
def pack(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folders; names become tasks.")],
    out: Annotated[Path, typer.Argument(help="Pack to write, or with --add to extend.")],
    directions: Annotated[
        int | None, typer.Option(min=0, help="Directions kept per position.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Instead: storage relative to all adapters.")
    ] = None,
    align: Annotated[
        bool, typer.Option("--align", help="Turn rank spaces towards each other first.")
    ] = False,
    add: Annotated[
        bool, typer.Option("--add", help="Add to a pack that exists, without refitting.")
    ] = False,
) -> None:
    """Store ADAPTERS as one shared basis and a few coefficients per task (reversible merging)."""
    from fusekit.adapters import load_adapter
    from fusekit.adapters.provenance import Provenance, adapter_files, file_identities
    from fusekit.adapters.reversible import open_pack, pack_adapters
    from fusekit.errors import FusekitError

    paths = {path.absolute().name: path for path in adapters}
    if len(paths) < len(adapters):
        raise FusekitError("two adapter folders have the same name, which would be their task's")
    if add and (directions is not None or ratio is not None or align):
        raise FusekitError("--add uses the pack's basis: leave out --directions, --ratio, --align")
    loaded = {task: load_adapter(path) for task, path in paths.items()}
    inputs = {task: file_identities(str(path), adapter_files(path)) for task, path in paths.items()}
    if add:
        for task, adapter in loaded.items():
            error = open_pack(out).add(task, adapter, inputs[task])
            typer.echo(f"{task}: added, relative error {error:.4f}")
        return
    if directions is None and ratio is None:
        directions = 1
    asked = {"directions": directions, "ratio": ratio, "align": align}
    record = {"packed": {"tasks": list(paths), **{k: v for k, v in asked.items() if v is not None}}}
    provenance = Provenance(out.name, "", record, list(inputs.values()))
    report = pack_adapters(
        loaded, out, directions=directions, ratio=ratio, align=align, provenance=provenance
    )
    _print_pack(out, report)
    if directions is not None and directions > report.directions:
        typer.echo(f"note: {report.directions} directions are exact, more were not kept", err=True)


@app.command()
def unpack(
    pack: Annotated[Path, typer.Argument(help="A pack.")],
    out: Annotated[Path, typer.Argument(help="Adapter folder to write; must not exist.")],
    task: Annotated[str, typer.Option(help="The task whose adapter to rebuild.")],
) -> None:
    """Rebuild the adapter of one task of a PACK."""
    from fusekit.adapters import write_adapter
    from fusekit.adapters.reversible import open_pack

    opened = open_pack(pack)
    write_adapter(opened.unpack(task), out, provenance=opened.provenance(task))
    typer.echo(f"{out}: task {task} of {pack}")


@app.command()
def info(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folders, or LoRA files.")],
    modules: Annotated[bool, typer.Option("--modules", help="List every module.")] = False,
    component: Annotated[
        str | None, typer.Option(help="The part of a LoRA file for several models (unet, te1).")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a report with figures to this file.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Write the figures as SVG files to this folder.")
    ] = None,
) -> None:
    """Ranks, scalings and norms; with several ADAPTERS also how far they overlap."""
    from fusekit.adapters import load_adapter
    from fusekit.adapters.info import compare_adapters, describe_adapter

    if html is not None or figures is not None:
        from fusekit.report.figures import require_plotly

        require_plotly()
    loaded = [load_adapter(path, component=component) for path in adapters]
    described = [describe_adapter(adapter) for adapter in loaded]
    for adapter, each in zip(loaded, described, strict=True):
        _print_left_out(adapter)
        _print_info(each, modules)
    overlap = compare_adapters(loaded) if len(loaded) > 1 else None
    if overlap is not None:
        _print_overlap(overlap)
    if html is not None or figures is not None:
        from fusekit.report.adapters import adapter_report

        report = adapter_report(described, overlap)
        if html is not None:
            html.write_text(report.to_html(), encoding="utf-8")
            typer.echo(f"report: {html}", err=True)
        if figures is not None:
            report.save_figures(figures)
            typer.echo(f"figures: {figures}", err=True)


def _task_type(config: dict[str, object]) -> str | None:
    """PEFT's name of the task, read off the architecture's."""
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    endings = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    return next((task for ending, task in endings.items() if name.endswith(ending)), None)


def _print_extraction(out: Path, report: ExtractReport) -> None:
    for module in report.modules:
        note = "  larger than the full matrix" if module.wasteful else ""
        typer.echo(f"{module.residual:8.2%} missed  rank {module.rank:4}  {module.name}{note}")
    typer.echo(
        f"{out}: {len(report.modules)} modules, {report.residual:.2%} of their difference missed; "
        f"{len(report.saved)} tensors saved whole, {report.unchanged} unchanged"
    )
    for name in report.lost:
        typer.echo(f"note: {name} differs but is not in the adapter", err=True)


def _print_pack(out: Path, report: PackReport) -> None:
    typer.echo(f"{'task':24}  reversible  truncated to rank {report.truncated_rank:.1f}")
    for error in report.errors:
        typer.echo(f"{error.task:24}  {error.packed:10.4f}  {error.truncated:10.4f}")
    typer.echo(
        f"{out}: {report.directions} directions, {report.ratio:.3f} of the adapters' size; "
        f"recommended: {report.recommended}"
    )


def _print_left_out(adapter: Adapter) -> None:
    for component, count in adapter.left_out.items():
        typer.echo(f"note: {adapter.label}: {count} tensors of {component} were left out", err=True)


def _print_info(info: AdapterInfo, modules: bool) -> None:
    ranks = sorted({module.rank for module in info.modules})
    scalings = sorted({round(module.scaling, 6) for module in info.modules})
    extras = [
        f"DoRA on {sum(m.dora for m in info.modules)}" * any(m.dora for m in info.modules),
        f"biases on {sum(m.bias for m in info.modules)}" * any(m.bias for m in info.modules),
        f"{len(info.replacements)} tensors saved whole" * bool(info.replacements),
    ]
    typer.echo(
        f"{info.label}: {len(info.modules)} modules, {info.parameters} parameters, "
        f"rank {', '.join(map(str, ranks))}, scaling {', '.join(f'{s:g}' for s in scalings)}, "
        f"norm {info.norm:.4g}" + "".join(f", {extra}" for extra in extras if extra)
    )
    if not modules:
        return
    for module in info.modules:
        typer.echo(
            f"  {module.name}  {module.kind} {list(module.shape)}  rank {module.rank}  "
            f"scaling {module.scaling:g}  norm {module.norm:.4g}  "
            f"stable rank {module.stable_rank:.1f}"
        )
    for name, shape in info.replacements:
        typer.echo(f"  {name}  whole {list(shape)}")


def _print_overlap(overlap: Overlap) -> None:
    tables = {
        "cosine": overlap.cosine,
        "output spaces (mean squared cosine)": overlap.output,
        "input spaces (mean squared cosine)": overlap.input,
    }
    for title, matrix in tables.items():
        typer.echo(title)
        for row in matrix:
            typer.echo("  " + " ".join(f"{value:7.3f}" for value in row))
