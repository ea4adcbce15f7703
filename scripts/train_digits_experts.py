"""Train the base and the experts of the embedded digits suite and write them as package data.

One thread and one seed: a run takes about 15 seconds on a CPU and writes the same bytes again on
the same machine.

    python scripts/train_digits_experts.py [--out fusekit/evaluate/data/digits]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from fusekit.evaluate.digits_training import (
    CLASS_OF_DIGIT,
    FINE_TUNING,
    PRETRAINING,
    WIDTH,
    DigitsEncoder,
    Plan,
    Schedule,
    Splits,
    fit,
    random_head,
    train,
)

__all__ = [
    "CLASS_OF_DIGIT",
    "FINE_TUNING",
    "PRETRAINING",
    "WIDTH",
    "DigitsEncoder",
    "Schedule",
    "fit",
    "load_splits",
    "random_head",
]

SIZES = {"train": 1000, "validation": 297, "test": 500}

ORIGIN = {
    "origin": "scikit-learn load_digits: test part of Optical Recognition of Handwritten Digits, "
    "E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, doi:10.24432/C50P49",
    "licence": "CC BY 4.0",
}


def load_splits(seed: int) -> Splits:
    """The images of scikit-learn, shuffled once."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    edges = np.cumsum(list(SIZES.values()))
    assert edges[-1] == len(order)
    return {
        split: (bunch.images[part].astype(np.uint8), bunch.target[part].astype(np.uint8))
        for split, part in zip(SIZES, np.split(order, edges[:-1]), strict=True)
    }


def main() -> None:
    """Train everything, write it, and print what was reached."""
    default = Path(__file__).parents[1] / "fusekit" / "evaluate" / "data" / "digits"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=default, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    seed = arguments.seed
    train(arguments.out, load_splits(seed), Plan(), seed, CLASS_OF_DIGIT, ORIGIN, print)


if __name__ == "__main__":
    main()
