"""A recipe file as its YAML documents, and the order in which those that feed others are made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import yaml

from fusekit.errors import RecipeError

MAX_NODES = 1_000_000
"""Most values of a document with its aliases written out."""


class _RecipeLoader(yaml.SafeLoader):
    """YAML without the last of two equal keys silently winning; bad values are YAML errors."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError):
            problem = f"{str(node.value)[:40]!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} occurs twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)  # YAML 1.1, unlike everybody else, takes 1e-5 for a text


def _expanded(value: Any, known: dict[int, int]) -> int:
    """How many values there are when every alias is written out."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = 1  # a value that contains itself is counted once
        inside = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded(item, known) for item in inside)
    return known[id(value)]


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
        documents = list(yaml.load_all(text, _RecipeLoader))
    except (yaml.YAMLError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        if isinstance(error, RecursionError):
            reason = "nested too deeply"
        else:  # unlike all others, errors of characters call their problem a reason
            reason = getattr(error, "problem", None) or getattr(error, "reason", "unreadable")
        raise RecipeError(f"{path}{line}: not valid YAML: {reason}") from None
    written = [document for document in documents if document is not None] or [None]
    for document in written:
        if _expanded(document, {}) > MAX_NODES:
            raise RecipeError(f"{path}: aliases expand the recipe to more than {MAX_NODES} values")
        if not isinstance(document, dict):
            found = "nothing" if document is None else type(document).__name__
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
