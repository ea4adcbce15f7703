"""Extract an adapter from every expert, merge the adapters, fold the result into the base.

python examples/merge_adapters.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import fusekit
from fusekit.adapters import (
    ExtractOptions,
    MergeOptions,
    extract_adapter,
    load_adapter,
    merge_adapters,
    write_adapter,
)
from fusekit.checkpoint.folder import open_checkpoint
from fusekit.evaluate import digits

EXPERTS = ("parity", "modulo_3", "halved")
RANK = 16


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = open_checkpoint(str(digits.base())).source
        for task in EXPERTS:
            expert = open_checkpoint(str(digits.experts()[task])).source
            report = extract_adapter(base, expert, folder / task, ExtractOptions(rank=RANK))
            missed = 100 * report.residual
            print(f"{task}: rank {RANK} misses {missed:.0f} % of the difference's norm")
            expert.close()
        base.close()

        adapters = [load_adapter(folder / task) for task in EXPERTS]
        merged = merge_adapters(
            adapters, "svd", weights=[0.6] * 3, options=MergeOptions(replacements="average")
        )
        write_adapter(merged, folder / "merged")

        # In recipes, `model+adapter` is the model with the adapter folded in.
        recipe = {
            "merge_method": "passthrough",
            "models": [{"model": f"{digits.base()}+{folder / 'merged'}"}],
        }
        fusekit.merge(recipe, folder / "folded")
        for task, score in digits.evaluate(folder / "folded", tasks=EXPERTS).items():
            print(f"{task}: {100 * score:.1f} %")


if __name__ == "__main__":
    main()
