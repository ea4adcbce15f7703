"""Choose a parameter on validation data, report it on test data.

python examples/tune_lambda.py
"""

from __future__ import annotations

from safetensors.numpy import load_file

import fusekit
from fusekit.evaluate import digits


def main() -> None:
    base = load_file(digits.base() / "model.safetensors")
    experts = [load_file(path / "model.safetensors") for path in digits.experts().values()]

    def merged(scale: float) -> dict[str, object]:
        return fusekit.merge_state_dicts(
            experts, method="ties", base=base, parameters={"density": 0.5, "lambda": scale}
        )

    def accuracy(scale: float, split: digits.Split) -> float:
        scores = digits.evaluate(merged(scale), split)
        return sum(scores.values()) / len(scores)

    candidates = [0.5, 1.0, 1.5, 2.0, 2.5]
    found = {scale: accuracy(scale, "validation") for scale in candidates}
    for scale, score in found.items():
        print(f"lambda {scale:3.1f}: {100 * score:5.1f} % on validation")
    best = max(found, key=lambda scale: found[scale])
    print(f"lambda {best:3.1f}: {100 * accuracy(best, 'test'):5.1f} % on test")


if __name__ == "__main__":
    main()
