"""`fusekit methods`: what there is, with parameters, ranges and citations."""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fusekit.methods.base import Method, Parameter


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Explain one method.", show_default=False)
    ] = None,
) -> None:
    """List the merging methods, or explain one of them."""
    from fusekit.methods.registry import available, find

    if name is not None:
        print(explain(find(name)))
        return
    width = max(map(len, available()))
    for method in available().values():
        print(f"{method.name:{width}}  {method.summary}")


def explain(method: Method) -> str:
    """One method in full: formula, parameters, references, cost, advice."""
    lines = [f"{method.name}: {method.title}", "", *_wrapped(method.summary), ""]
    lines += [f"  {method.formula}", ""]
    lines += [f"base_model: {describe_base(method)}; models: {describe_count(method)}"]
    lines += [f"passes over the data: {method.passes}", ""]
    lines.append("parameters")
    for parameter in method.parameters:
        lines += _described(parameter)
    if method.use_when:
        lines += ["", *_wrapped(f"Use when: {method.use_when}")]
    if method.caveats:
        lines += ["", *_wrapped(f"Caveats: {method.caveats}")]
    lines += ["", "references"]
    for reference in method.references:
        lines += _wrapped(reference, "  ")
    return "\n".join(lines)


def describe_base(method: Method) -> str:
    """What base_model is to the method, in words."""
    if method.base is None:
        return "none"
    if method.base == "first":
        return "the first of the models (optional)"
    return "origin of the task vectors" + ("" if method.base_required else " (optional)")


def describe_count(method: Method) -> str:
    """How many models the method takes."""
    if method.max_models is None:
        return f"{method.min_models} or more"
    if method.max_models == method.min_models:
        return str(method.min_models)
    return f"{method.min_models} to {method.max_models}"


def _described(parameter: Parameter) -> list[str]:
    default = "required" if parameter.required else f"default {_shown(parameter.default)}"
    scope = ", per model" if parameter.per_model else ""
    head = f"  {parameter.name}  ({parameter.describe_range()}; {default}{scope})"
    return [head, *_wrapped(parameter.help, "      ")]


def _shown(value: object) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wrapped(text: str, indent: str = "") -> list[str]:
    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
