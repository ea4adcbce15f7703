"""A recipe file as its YAML documents, and the order in which those that feed others are made."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import yaml

from fusekit.errors import RecipeError


def read_documents(path: Path) -> list[dict[str, Any]]:
    """The mappings in a YAML file, one per document; empty documents do not count.

    Raises:
        RecipeError: not readable, not YAML, or a document that is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"{path}: the recipe cannot be read: {reason}") from None
    try:
        documents = list(yaml.safe_load_all(text))
    except (yaml.YAMLError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        reason = getattr(error, "problem", None) or "nested too deeply"
        raise RecipeError(f"{path}{line}: not valid YAML: {reason}") from None
    written = [document for document in documents if document is not None] or [None]
    for document in written:
        if not isinstance(document, dict):
            found = type(document).__name__
            raise RecipeError(
                f"{path}: expected a mapping with merge_method and models, found {found}"
            )
    return written


def making_order(needs: Mapping[str, Set[str]], label: str) -> list[str]:
    """Names ordered so that each comes after those it needs; otherwise as given.

    Raises:
        RecipeError: documents that need each other, with the circle spelt out.
    """
    order: list[str] = []
    open_names: list[str] = []

    def visit(name: str) -> None:
        if name in order:
            return
        if name in open_names:
            circle = [*open_names[open_names.index(name) :], name]
            raise RecipeError(f"{label}: documents need each other: {' -> '.join(circle)}")
        open_names.append(name)
        for needed in sorted(needs[name]):
            if needed in needs:
                visit(needed)
        open_names.pop()
        order.append(name)

    for name in needs:
        visit(name)
    return order
