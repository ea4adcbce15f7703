"""What users write to name a model: `path_or_id[@revision][+adapter[@revision]]`, or the long form.

The text form is what everything else works with; a path that exists is never taken apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusekit.errors import RecipeError, did_you_mean


@dataclass(frozen=True)
class ModelReference:
    """A reference taken apart: where the model is, and the adapter to fold into it."""

    model: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None


def parse_reference(text: str) -> ModelReference:
    """Take a reference apart.

    >>> parse_reference("org/model@main+org/adapter")
    ModelReference(model='org/model', revision='main', lora='org/adapter', lora_revision=None)

    Raises:
        RecipeError: an empty part, more than one `+`, more than one `@` in a part.
    """
    parts = text.split("+")
    if len(parts) > 2:
        raise RecipeError(f"model {text!r}: expected at most one adapter after a '+'")
    if "://" in parts[0]:  # in URLs an @ belongs to the address, except at the end of a hub's
        hub = parts[0].startswith("hf://")
        model, revision = _revision(parts[0], text) if hub else (parts[0], None)
    else:
        model, revision = _revision(parts[0], text)
    if len(parts) == 1:
        return ModelReference(model, revision)
    return ModelReference(model, revision, *_revision(parts[1], text))


def exists(path: Path) -> bool:
    """Whether something is at a path; at a text longer than paths can be there is nothing."""
    try:
        return path.exists()
    except OSError:
        return False


def _revision(part: str, text: str) -> tuple[str, str | None]:
    name, *revisions = part.split("@")
    if not name or len(revisions) > 1 or revisions == [""]:
        raise RecipeError(
            f"model {text!r}: expected path_or_id[@revision][+adapter[@revision]], found {part!r}"
        )
    return name, revisions[0] if revisions else None


def reference_text(value: Any, place: str) -> Any:
    """The text form of `{model: {path, revision}, lora: {path, revision}}`; others unchanged.

    `override_architecture` may stand there: layers are read off the tensors' names, so there is
    nothing to override.

    Raises:
        RecipeError: unknown or missing keys.
    """
    if not isinstance(value, Mapping):
        return value
    if "model" in value:
        _check_keys(value, ("model", "lora", "override_architecture"), place)
        model = reference_text(value["model"], f"{place}.model")
        lora = reference_text(value.get("lora"), f"{place}.lora")
        return model if lora is None else f"{model}+{lora}"
    _check_keys(value, ("path", "revision"), place)
    if not isinstance(value.get("path"), str):
        raise RecipeError(f"{place}: found {dict(value)!r}, expected a mapping with a path")
    revision = value.get("revision")
    return value["path"] if revision is None else f"{value['path']}@{revision}"


def _check_keys(value: Mapping[str, Any], known: tuple[str, ...], place: str) -> None:
    for key in value:
        if key not in known:
            raise RecipeError(f"unknown key '{place}.{key}'{did_you_mean(str(key), known)}")
