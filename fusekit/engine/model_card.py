"""README.md of a merged model: what it is made of, how, and whom to cite. No network is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusekit.checkpoint.folder import Checkpoint
from fusekit.checkpoint.hub import is_hub_reference
from fusekit.checkpoint.pipelines import DIFFUSERS_FILE, is_pipeline
from fusekit.checkpoint.references import parse_reference
from fusekit.engine.plan import Plan
from fusekit.errors import FusekitError
from fusekit.methods.base import Method

CARD = "README.md"


def model_card(plan: Plan) -> str:
    """The card in the hub's format: front matter, models, recipe, citations."""
    import yaml

    from fusekit import __version__

    method = plan.tensors[0].method if plan.tensors else None
    recipe = yaml.safe_dump(dict(plan.recipe), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(plan), sort_keys=False, allow_unicode=True)}---",
        f"# {_title(plan)}",
        f"A merge of trained models, made with fusekit {__version__}.",
        "## Method",
        _method(method) if method is not None else "Nothing was merged.",
        "## Models",
        "\n".join(_model(checkpoint) for checkpoint in plan.checkpoints),
        "## Recipe",
        f"```yaml\n{recipe}```",
        "`manifest.json` holds the identity of every input and the checksum of every tensor; "
        "`fusekit verify` compares them with this folder.",
    ]
    if method is not None and method.references:
        parts += ["## Citations", "\n".join(f"- {each}" for each in method.references)]
    return "\n\n".join(parts) + "\n"


def _title(plan: Plan) -> str:
    """`Merge of a, b and c`, by the last part of every reference."""
    names = [checkpoint.reference.rstrip("/").rpartition("/")[2] for checkpoint in plan.checkpoints]
    several = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
    return f"Merge of {several}"


def _front_matter(plan: Plan) -> dict[str, Any]:
    """What the hub reads: the models this one is made of, if they are on the hub."""
    matter: dict[str, Any] = {}
    on_hub = [name for name in map(_hub_id, plan.checkpoints) if name is not None]
    if on_hub:
        matter["base_model"] = list(dict.fromkeys(on_hub))
        matter["base_model_relation"] = "merge"
    library = _library(plan)
    if library is not None:
        matter["library_name"] = library
    matter["tags"] = ["merge", "fusekit", *_tags(plan)]
    return matter


def _library(plan: Plan) -> str | None:
    """Which library loads the output, by the files that it looks for."""
    folder = None if plan.config_from is None else plan.checkpoints[plan.config_from].folder
    if folder is not None and is_pipeline(folder):
        is_diffusion = (folder / DIFFUSERS_FILE).is_file()
        return "diffusers" if is_diffusion else "sentence-transformers"
    if plan.config is None:
        return None
    return "diffusers" if "_diffusers_version" in plan.config else "transformers"


def _tags(plan: Plan) -> Sequence[str]:
    return [plan.tensors[0].method.name] if plan.tensors else []


def _hub_id(checkpoint: Checkpoint) -> str | None:
    """A model's id on the hub, or None for paths, URLs and arrays."""
    try:
        model = parse_reference(checkpoint.reference).model
    except FusekitError:
        return None
    relative = model.removeprefix("hf://")
    fetched = checkpoint.folder is not None and "snapshots" in checkpoint.folder.parts
    return relative if fetched and is_hub_reference(relative) else None


def _model(checkpoint: Checkpoint) -> str:
    count = len(checkpoint.source.tensors)
    return f"- `{checkpoint.reference}` ({count} tensor{'s' * (count != 1)})"


def _method(method: Method) -> str:
    return f"**{method.title}** (`{method.name}`). {method.summary}\n\n    {method.formula}"
