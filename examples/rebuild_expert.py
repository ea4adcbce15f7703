"""Merge all experts into one model plus a bit per weight and expert, then get an expert back.

python examples/rebuild_expert.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import fusekit
from fusekit.engine.reconstruct import reconstruct
from fusekit.evaluate import digits


def main() -> None:
    recipe = {
        "merge_method": "emr",
        "base_model": str(digits.base()),
        "models": [
            {"model": str(path), "parameters": {"task": task}}
            for task, path in digits.experts().items()
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder) / "merged"
        fusekit.merge(recipe, merged)
        for task, path in digits.experts().items():
            rebuilt = reconstruct(merged, task, Path(folder) / task).out
            before, after = (
                digits.evaluate(model, tasks=[task])[task] for model in (path, rebuilt)
            )
            print(f"{task:9} expert {100 * before:5.1f} %, rebuilt {100 * after:5.1f} %")


if __name__ == "__main__":
    main()
