"""`fusekit demo`: the main job on embedded input, from recipes to a table of scores."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

MERGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("linear", {"merge_method": "linear", "parameters": {"weight": 1.0}}),
    ("karcher", {"merge_method": "karcher"}),
    ("task_arithmetic", {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}}),
    ("ties", {"merge_method": "ties", "parameters": {"density": 0.5, "lambda": 1.5}}),
    ("dare_linear", {"merge_method": "dare_linear", "parameters": {"density": 0.5, "lambda": 0.4}}),
    ("dare_ties", {"merge_method": "dare_ties", "parameters": {"density": 0.5, "lambda": 0.4}}),
    (
        "pcb",
        {
            "merge_method": "pcb",
            "granularity": "model",
            "parameters": {"ratio": 0.2, "lambda": 1.4},
        },
    ),
    (
        "lines",
        {
            "merge_method": "task_arithmetic",
            "layer_scaling": {"method": "lines", "alpha": "auto", "beta": 0.9},
        },
    ),
)
"""Name of the merge, and its recipe without the models; scales were chosen on validation images."""


def demo(
    out: Annotated[Path, typer.Option(help="Folder for recipes and merged models.")] = Path(
        "demo-out"
    ),
) -> None:
    """Merge six small experts by several methods and score each merge on every expert's task."""
    import yaml

    from fusekit.evaluate import digits

    base, experts = digits.base(), digits.experts()
    rows = [("base", digits.evaluate(base))]
    rows += [(f"expert {task}", digits.evaluate(path)) for task, path in experts.items()]
    out.mkdir(parents=True, exist_ok=True)
    for name, settings in MERGES:
        recipe = {**settings, "models": [{"model": str(path)} for path in experts.values()]}
        if settings["merge_method"] not in {"linear", "karcher"}:
            recipe["base_model"] = str(base)
        path = out / f"{name}.yml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        _run("merge", str(path), str(out / name), "--overwrite")
        rows.append((f"merge {name}", digits.evaluate(out / name)))
    _print_table(rows)
    print(
        f"Accuracy in % on held-out digits; every merge is one model for all six tasks.\n"
        "Scales (lambda, beta) were chosen on other, validation digits.\n"
        f"Recipes and merged checkpoints are in {out}/."
    )
    _report(out)


def _run(*arguments: str, silent: bool = False) -> None:
    """An ordinary command, shown as a user would type it."""
    print(f"$ fusekit {' '.join(arguments)}", flush=True)
    output = subprocess.PIPE if silent else None
    subprocess.run(
        [sys.executable, "-m", "fusekit", *arguments], check=True, stdout=output, stderr=output
    )


def _report(out: Path) -> None:
    """The same experts under a few methods, tuned and not, as an HTML page."""
    if importlib.util.find_spec("plotly") is None:
        print("For an HTML report as well: pip install 'fusekit[report]' and run this again.")
        return
    page = out / "report.html"
    methods = "linear,task_arithmetic,ties"
    options = ("--budget", "4", "--out", str(out / "suite"), "--html", str(page))
    _run("suite", "run", "digits", "--methods", methods, *options, silent=True)
    print(f"HTML report, these methods tuned and not, with confidence intervals: {page}")


def _print_table(rows: list[tuple[str, dict[str, float]]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    tasks = list(rows[0][1])
    table = Table("model", *tasks, "mean", box=box.SIMPLE)
    for name, scores in rows:
        values = [scores[task] for task in tasks]
        mean = sum(values) / len(values)
        table.add_row(name, *(f"{100 * value:.1f}" for value in (*values, mean)))
    Console(width=max(100, 24 + 11 * len(tasks))).print(table)
