"""Run every recipe of examples/recipes and score the merges on the embedded digits.

    python examples/run_all.py [--out examples-out] [PATTERN]

PATTERN selects recipes by a part of their path, such as `methods/ties`. The recipes of `fisher` and
`regmean` need what `python examples/measure_statistics.py` writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fusekit
from fusekit.errors import CheckpointError, MissingExtraError
from fusekit.evaluate import digits

RECIPES = Path(__file__).parent / "recipes"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the example recipes and score the merges.")
    parser.add_argument("pattern", nargs="?", default="", help="part of a recipe's path")
    parser.add_argument("--out", type=Path, default=Path("examples-out"))
    options = parser.parse_args()

    chosen = [path for path in sorted(RECIPES.rglob("*.yml")) if options.pattern in str(path)]
    for path in chosen:
        name = path.relative_to(RECIPES).with_suffix("")
        out = options.out / name
        try:
            fusekit.merge(path, out, overwrite=True)
        except (MissingExtraError, CheckpointError) as missing:
            print(f"{name}: left out: {missing}")
            continue
        if "/digits/" not in path.read_text():
            print(f"{name!s:36} merged; not a model of the digits")
            continue
        scores = digits.evaluate(out)
        print(f"{name!s:36} {100 * sum(scores.values()) / len(scores):5.1f} %")
    print(f"Mean accuracy over the six tasks of the experts. Merges are in {options.out}/.")


if __name__ == "__main__":
    main()
