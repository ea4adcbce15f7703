"""Merge state dicts in memory: no recipe, no files written.

python examples/merge_in_memory.py
"""

from __future__ import annotations

from safetensors.numpy import load_file

import fusekit
from fusekit.evaluate import digits


def main() -> None:
    base = load_file(digits.base() / "model.safetensors")
    experts = [load_file(path / "model.safetensors") for path in digits.experts().values()]

    # Any method by name; parameters as a recipe would give them.
    summed = fusekit.merge_state_dicts(
        experts, method="task_arithmetic", base=base, parameters={"lambda": 0.4}
    )
    # Parameters per model, in the order of the models, and another element type.
    weighted = fusekit.merge_state_dicts(
        experts,
        method="linear",
        model_parameters=[{"weight": 2.0 if i == 0 else 1.0} for i in range(len(experts))],
        out_dtype="bfloat16",
    )
    for name, merged in {"base": base, "task_arithmetic": summed, "linear": weighted}.items():
        scores = digits.evaluate(merged)
        kind = next(iter(merged.values())).dtype
        print(f"{name:16} {kind!s:9} {100 * sum(scores.values()) / len(scores):5.1f} %")


if __name__ == "__main__":
    main()
