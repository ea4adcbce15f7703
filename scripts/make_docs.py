"""Write the pages of every merging method and of the command line from the code.

Every page ends with the method's recipe from `examples/recipes/methods`, which runs on the embedded
digit experts; a method that has none yet gets a minimal one.

    python scripts/make_docs.py
    python scripts/make_docs.py --check    # changes nothing; status 1 if a page is out of date
"""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
import yaml

from fusekit.checkpoint.dtypes import DTYPES
from fusekit.cli import app
from fusekit.cli.methods import describe_base, describe_count
from fusekit.evaluate import digits
from fusekit.methods import Method, Parameter, available
from fusekit.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "methods"
RECIPES = ROOT / "examples" / "recipes" / "methods"
COMMANDS = ROOT / "docs" / "cli.md"
NOTE = "<!-- Written by scripts/make_docs.py from the method's description and recipe. -->"
COMMANDS_NOTE = "<!-- Written by scripts/make_docs.py from the commands' help. -->"
COMMANDS_INTRODUCTION = """
# Command line

Every command explains itself with `--help`. Results go to standard output, progress and warnings to
standard error.

| exit status | meaning |
|---|---|
| 0 | done |
| 1 | `verify` found a difference; `inspect` found what makes a merge meaningless |
| 2 | refused: one sentence on standard error |
| 130 | interrupted; `fusekit merge` continues when run again |
"""


def pages() -> dict[Path, str]:
    """Path and text of every generated page."""
    methods = available().values()
    found = {COMMANDS: commands_page(), PAGES / "index.md": index_page(list(methods))}
    for method in methods:
        found[PAGES / f"{method.name}.md"] = method_page(method, example_recipe(method))
    return found


def example_recipe(method: Method) -> str:
    """The method's recipe among the examples, or a minimal one where there is none yet."""
    path = RECIPES / f"{method.name}.yml"
    return path.read_text(encoding="utf-8") if path.is_file() else minimal_recipe(method)


def outdated() -> list[Path]:
    """What `write` would change: pages of no method, old or missing pages, missing recipes."""
    wanted = pages()
    stale = [
        path
        for path, text in wanted.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    stale += [path for path in sorted(PAGES.glob("*.md")) if path not in wanted]
    recipes = [RECIPES / f"{name}.yml" for name in available()]
    return stale + [path for path in recipes if not path.is_file()]


def index_page(methods: list[Method]) -> str:
    """All methods in a table, and what the columns mean."""
    lines = [
        NOTE,
        "",
        "# Methods",
        "",
        "`fusekit methods` prints this list, `fusekit methods NAME` one method in full. "
        "The name is what a recipe gives as `merge_method`.",
        "",
        "| method | what it does | base_model | models | needs |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| [{method.name}]({method.name}.md) | {_cell(method.summary)} "
        f"| {_base_word(method)} | {describe_count(method)} | {_needs(method)} |"
        for method in methods
    ]
    lines += [
        "",
        "**base_model**: *required* or *optional* where the method works on task vectors, the "
        "differences to that base; *first* where it is the first of the models; *none* where "
        "the method takes no base. **models**: how many, the base not counted. **needs**: *torch* "
        "is the `[torch]` extra, *statistics* are files of what data says about every model.",
        "",
        "Two settings of a recipe combine with the methods of this list: "
        "[`granularity`](../recipes.md#granularity), over what a method's statistics are taken "
        "(methods that merge in blocks), and [`layer_scaling`](../recipes.md#layer_scaling) "
        "(methods with a base).",
        "",
    ]
    return "\n".join(lines)


def method_page(method: Method, recipe: str) -> str:
    """One method: formula, parameters, cost, advice, references and a recipe that runs."""
    lines = [NOTE, "", f"# {method.title}", "", f"`merge_method: {method.name}`", ""]
    lines += [mark(method.summary), "", "```text", method.formula.replace(";  ", "\n"), "```", ""]
    lines += [
        f"- **base_model**: {describe_base(method)}",
        f"- **models**: {describe_count(method)}",
        f"- **passes over the data**: {mark(method.passes)}",
        *_special_needs(method),
        "",
    ]
    if method.use_when:
        lines += ["## Use when", "", mark(method.use_when), ""]
    if method.caveats:
        lines += ["## Caveats", "", mark(method.caveats), ""]
    lines += ["## Parameters", ""]
    if method.parameters:
        lines += ["| name | values | default | per model | |", "|---|---|---|---|---|"]
        lines += [_parameter_row(parameter) for parameter in method.parameters]
    else:
        lines += ["None."]
    name = f"examples/recipes/methods/{method.name}.yml"
    lines += [
        "",
        "## Example",
        "",
        "On the experts that come with fusekit, from the root of the repository:",
        "",
        "```console",
        f"$ fusekit merge {name} merged",
        "```",
        "",
        f'```yaml title="{name}"',
        recipe.rstrip(),
        "```",
        "",
        "## References",
        "",
    ]
    lines += [f"- {reference}" for reference in method.references]
    return "\n".join([*lines, ""])


def commands_page() -> str:
    """All commands with their arguments and options."""
    group = typer.main.get_command(app)
    sections = [COMMANDS_NOTE, COMMANDS_INTRODUCTION.rstrip(), *_commands(group, "fusekit")]
    return "\n".join(sections) + "\n"


def _commands(group: Any, prefix: str) -> Iterator[str]:
    for name, command in group.commands.items():
        path = f"{prefix} {name}"
        if hasattr(command, "commands"):
            yield from _commands(command, path)
            continue
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        usage = " ".join([path, *(["[OPTIONS]"] if options else []), *map(_usage, arguments)])
        yield f"\n## {path.removeprefix('fusekit ')}\n\n```console\n$ {usage}\n```\n"
        yield inspect.cleandoc(command.help)
        if arguments or options:
            yield "\n| | | default |\n|---|---|---|"
        for parameter in [*arguments, *options]:
            yield _option_row(parameter)


def _usage(argument: Any) -> str:
    name = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _option_row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        names = f"`{parameter.name.upper()}`"
    else:
        names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    choices = getattr(parameter.type, "choices", None)
    text = _cell(parameter.help or "")
    if choices:
        text += " One of " + ", ".join(f"`{shown(str(choice))}`" for choice in choices) + "."
    default = parameter.default
    if parameter.required:
        given = "required"
    elif default is None or isinstance(default, bool) or callable(default) or default == ():
        given = ""
    else:
        given = f"`{getattr(default, 'value', default)}`"
    return f"| {names} | {text} | {given} |"


def _special_needs(method: Method) -> list[str]:
    """What sets the method apart from those that merge in blocks and write nothing else."""
    lines = []
    if method.matrix is not None:
        lines.append("- **needs**: the `[torch]` extra; `--device cuda` computes on a GPU")
        lines.append(f"- **tensors that are not merged as a whole**: {mark(method.others)}")
    if method.side is not None:
        lines.append(
            "- **also writes**: data per task, from which `fusekit reconstruct` rebuilds it"
        )
    if method.missing == "first":
        lines.append("- **tensors that not all models have**: those of the first model")
    return lines


def _parameter_row(parameter: Parameter) -> str:
    default = "not set" if parameter.default is None else f"`{shown(parameter.default)}`"
    if parameter.required:
        default = "required"
    if parameter.default == "":
        default = "empty"
    each = "yes" if parameter.per_model else ""
    return (
        f"| `{parameter.name}` | {_values(parameter)} | {default} | {each} "
        f"| {_cell(parameter.help)} |"
    )


def _values(parameter: Parameter) -> str:
    """The accepted values as a recipe spells them."""
    if parameter.kind == "choice":
        values = dict.fromkeys(map(shown, (*parameter.choices, *parameter.aliases)))
        return ", ".join(f"`{value}`" for value in values)
    return _cell(parameter.describe_range())


def shown(value: object) -> str:
    """A value as YAML spells it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _base_word(method: Method) -> str:
    if method.base is None:
        return "none"
    if method.base == "first":
        return "first"
    return "required" if method.base_required else "optional"


def mark(text: str) -> str:
    """Names that cannot be words (`mask_rate`, `granularity: layer`) as code."""
    return re.sub(
        r"(?<![`\w])(?:[a-z]\w*: [a-z0-9_.]*[a-z0-9_]|[a-z]+_[a-z0-9_]+)(?![`\w])", _coded, text
    )


def _coded(found: re.Match[str]) -> str:
    word = found.group()
    name, colon, value = word.partition(": ")
    if name not in _names() or (colon and value not in _choices()):
        return f"`{name}`{colon}{value}" if name in _names() and "_" in name else word
    return f"`{word}`"


@functools.cache
def _choices() -> frozenset[str]:
    """The words that parameters and keys of the recipe take as values."""
    choices = {word for m in available().values() for p in m.parameters for word in p.choices}
    keys = {
        word
        for field in Recipe.model_fields.values()
        if get_origin(field.annotation) is Literal
        for word in get_args(field.annotation)
    }
    dtypes = {dtype.torch_name for dtype in DTYPES.values()}
    return frozenset({*choices, *keys, *dtypes, "true", "false"})


@functools.cache
def _names() -> frozenset[str]:
    """What recipes call things: methods and their parameters, keys of the recipe."""
    methods = available()
    parameters = {p.name for method in methods.values() for p in method.parameters}
    return frozenset({*methods, *parameters, *Recipe.model_fields})


def _needs(method: Method) -> str:
    torch = ["torch"] if method.matrix is not None else []
    return ", ".join(torch + (["statistics"] if method.statistic is not None else []))


def _cell(text: str) -> str:
    return mark(text).replace("|", "\\|")


def minimal_recipe(method: Method) -> str:
    """A recipe of nothing but what the method demands, for the digit experts."""
    most = method.max_models or max(3, method.min_models)
    recipe: dict[str, Any] = {"merge_method": method.name}
    if method.base == "origin":
        recipe["base_model"] = _relative(digits.base())
    experts = list(digits.experts().values())[:most]
    recipe["models"] = [{"model": _relative(folder)} for folder in experts]
    parameters = {
        parameter.name: _some_value(parameter)
        for parameter in method.parameters
        if parameter.required
    }
    if parameters:
        recipe["parameters"] = parameters
    comment = textwrap.fill(method.summary, 99, initial_indent="# ", subsequent_indent="# ")
    return f"{comment}\n{yaml.safe_dump(recipe, sort_keys=False)}"


def _relative(folder: Path) -> str:
    return str(Path("../../..") / folder.relative_to(ROOT))


def _some_value(parameter: Parameter) -> Any:
    if parameter.kind == "choice":
        return parameter.choices[0]
    if parameter.kind == "path":
        return f"{parameter.name}.safetensors"
    return parameter.check(1 if parameter.name == "weight" else 0.5)


def write() -> None:
    """Add missing recipes, write all pages and remove those of methods that are gone."""
    RECIPES.mkdir(parents=True, exist_ok=True)
    PAGES.mkdir(parents=True, exist_ok=True)
    for method in available().values():
        recipe = example_recipe(method)
        (RECIPES / f"{method.name}.yml").write_text(recipe, encoding="utf-8")
    wanted = pages()
    for path in PAGES.glob("*.md"):
        if path not in wanted:
            path.unlink()
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write docs/methods and docs/cli.md from the code."
    )
    parser.add_argument("--check", action="store_true", help="change nothing, report old pages")
    if not parser.parse_args().check:
        write()
        return
    stale = outdated()
    for path in stale:
        print(f"{path.relative_to(ROOT)}: out of date, run python scripts/make_docs.py")
    sys.exit(1 if stale else 0)


if __name__ == "__main__":
    main()
