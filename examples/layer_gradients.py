"""Give every layer its own parameter, see what each tensor gets, and merge.

python examples/layer_gradients.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import fusekit
from fusekit.evaluate import digits

EXPERTS = ("parity", "modulo_3")


def recipe(t: Any) -> dict[str, Any]:
    """Interpolate two experts with t: a number, a gradient, or filters."""
    return {
        "merge_method": "slerp",
        "models": [{"model": str(digits.experts()[task])} for task in EXPERTS],
        "parameters": {"t": t},
    }


def main() -> None:
    settings = {
        "the same everywhere": 0.5,
        "a gradient": [0.0, 1.0],
        "by tensor": [{"filter": "up_proj", "value": [0.0, 1.0]}, {"value": 0.5}],
    }
    for title, t in settings.items():
        plan = fusekit.plan(recipe(t))
        values = {planned.name: planned.tensor["t"] for planned in plan.tensors}
        plan.close()
        each = [values[f"encoder.layers.{i}.mlp.up_proj.weight"] for i in range(6)]
        with tempfile.TemporaryDirectory() as folder:
            fusekit.merge(recipe(t), Path(folder) / "merged")
            scores = digits.evaluate(Path(folder) / "merged", tasks=EXPERTS)
        print(f"{title}: t of up_proj in blocks 0 to 5: {', '.join(f'{t:.1f}' for t in each)}")
        print("   " + ", ".join(f"{task} {100 * score:.1f} %" for task, score in scores.items()))


if __name__ == "__main__":
    main()
