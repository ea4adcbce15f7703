"""Is a task vector a low-rank update plus rounding? Asked of a few matrices per model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusekit.engine.blocks import Array
from fusekit.inspection.measure import Measurement, Measurer
from fusekit.inspection.statistics import Floats

PROBED_MATRICES = 3
PROBED_ROWS = 256

_MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}

_EXPLAINED = 0.3
"""Least share of the energy that must lie in the low-rank part."""


def probe(measurer: Measurer, found: Sequence[Measurement]) -> dict[int, list[int | None]]:
    """For every model (by source index) the ranks of its largest changed matrices.

    None stands for a matrix whose update is not of low rank. Without a base there is nothing to
    ask.
    """
    if not measurer.has_base:
        return {}
    ranks: dict[int, list[int | None]] = {}
    for model in range(measurer.models):
        changed = [
            each
            for each in found
            if each.statistics is not None
            and model + 1 in each.comparison.compared
            and min(each.comparison.matrix_shape) >= 16
            and each.statistics.norms[model] > 0
        ]
        changed.sort(key=lambda each: -each.comparison.size)
        chosen = [changed[i] for i in _spread(len(changed), PROBED_MATRICES)]
        ranks[model + 1] = [_rank(measurer, each, model) for each in chosen]
    return ranks


def _spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` indices, evenly over `count`."""
    taken = min(count, wanted)
    return [(i * count) // taken for i in range(taken)]


def _rank(measurer: Measurer, found: Measurement, model: int) -> int | None:
    comparison = found.comparison
    rows, _ = measurer.rows(comparison, 0, PROBED_ROWS)
    mantissa = _MANTISSA[comparison.infos[model + 1].dtype.name]
    noise = rounding_energy(rows[model + 1], mantissa)
    return low_rank(rows[model + 1] - rows[0], noise)


def rounding_energy(values: Array, mantissa: int) -> float:
    """Mean of ulp^2 / 12 over stored values: the variance that rounding alone brings."""
    exponents = np.frexp(values.astype(np.float64))[1]
    return float(np.mean(np.exp2(2.0 * (exponents - 1 - mantissa)) / 12))


def low_rank(delta: Array, noise: float) -> int | None:
    """The rank of a matrix with additive noise of variance `noise`, or None if it is not low.

    Singular values above the edge of the noise's spectrum, sqrt(noise) (sqrt(m) + sqrt(n)), count.
    The rank is low if it is at most a third of the smaller side and what is left is no more than
    noise.
    """
    rows, columns = delta.shape
    squares = np.linalg.eigvalsh(_small_gram(delta))[::-1]
    total = float(squares.sum())
    edge = 1.5 * noise * (np.sqrt(rows) + np.sqrt(columns)) ** 2 + 1e-9 * total
    rank = int(np.count_nonzero(squares > edge))
    rest = float(squares[rank:].sum())
    low = 0 < 3 * rank <= min(rows, columns)
    explained = total - rest >= _EXPLAINED * total
    return rank if low and explained and rest <= 2 * noise * rows * columns + 1e-6 * total else None


def _small_gram(matrix: Array) -> Floats:
    wide = matrix.astype(np.float64)
    return wide @ wide.T if len(wide) <= wide.shape[1] else wide.T @ wide
