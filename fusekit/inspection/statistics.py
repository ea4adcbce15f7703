"""What is known of a set of elements: sums that add up over tensors, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TOP_SHARES = (0.01, 0.05, 0.2)
"""Shares of the largest entries whose part of the energy is measured; the last is the support."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over the elements of a tensor, a layer, a kind of module or a whole model.

    With a base the rows are task vectors `delta = model - base`, otherwise the models themselves.
    `gram` is exact; the other sums are estimated from evenly spaced samples of large tensors.

    Attributes:
        elements: how many elements per model.
        gram: (k, k) inner products, the base (if any) first, then the n rows.
        powers: (n, 4) sums of x, x^2, x^3, x^4.
        both: (2, n, n) positions where both rows are non-zero (0) or in both supports (1).
        opposed: (2, n, n) positions among those where the signs differ.
        positions: two or more rows non-zero, of those with both signs, the same among the
            supports, sum |x|, sum |sum over rows x|.
        top_energy: (n, 3) sum of x^2 over the largest 1, 5 and 20 % of entries, tensor by tensor.
    """

    elements: float
    gram: Floats
    powers: Floats
    both: Floats
    opposed: Floats
    positions: Floats
    top_energy: Floats

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            *(getattr(self, field.name) + getattr(other, field.name) for field in fields(self))
        )

    def of(self, models: Sequence[int]) -> Statistics:
        """Those of some of the models; what counts positions over all models becomes NaN."""
        rows = np.asarray(models, dtype=int)
        skip = len(self.gram) - self.models
        gram = np.concatenate([np.arange(skip), rows + skip])
        everyone = len(rows) == self.models
        return Statistics(
            self.elements,
            self.gram[np.ix_(gram, gram)],
            self.powers[rows],
            self.both[:, rows][:, :, rows],
            self.opposed[:, rows][:, :, rows],
            self.positions if everyone else np.full_like(self.positions, np.nan),
            self.top_energy[rows],
        )

    @property
    def models(self) -> int:
        return len(self.powers)

    @property
    def has_base(self) -> bool:
        return len(self.gram) > self.models

    @property
    def norms(self) -> Floats:
        """(n,) Frobenius norm of every row."""
        return np.asarray(np.sqrt(np.diag(self._rows_gram)))

    @property
    def base_norm(self) -> float:
        """Frobenius norm of the base, NaN without one."""
        return float(np.sqrt(self.gram[0, 0])) if self.has_base else float("nan")

    @property
    def relative_norms(self) -> Floats:
        """(n,) |delta| / |base|."""
        return _ratio(self.norms, self.base_norm)

    @property
    def cosine(self) -> Floats:
        """(n, n) cosines between rows; NaN where a row is zero."""
        return np.asarray(np.clip(_ratio(self._rows_gram, np.outer(self.norms, self.norms)), -1, 1))

    @property
    def cosine_to_base(self) -> Floats:
        """(n,) cosine between model (not delta) and base; NaN without a base."""
        if not self.has_base:
            return np.full(self.models, np.nan)
        squared, cross, own = self.gram[0, 0], self.gram[0, 1:], np.diag(self.gram)[1:]
        model = np.sqrt(np.maximum(squared + 2 * cross + own, 0.0))
        return _ratio(squared + cross, np.sqrt(squared) * model)

    @property
    def sign_agreement(self) -> Floats:
        """(n, n) share of positions, non-zero in both rows, with equal signs."""
        return 1 - _ratio(self.opposed[0], self.both[0])

    @property
    def top_sign_agreement(self) -> Floats:
        """(n, n) the same among positions in both supports (the largest 20 %)."""
        return 1 - _ratio(self.opposed[1], self.both[1])

    @property
    def overlap(self) -> Floats:
        """(n, n) |A and B| / min(|A|, |B|) of supports; 0.2 is chance, 1 is the same support."""
        sizes = np.diag(self.both[1])
        return _ratio(self.both[1], np.minimum.outer(sizes, sizes))

    @property
    def conflict_rate(self) -> float:
        """Of the positions two or more models change, the share with both signs."""
        return float(_ratio(self.positions[1], self.positions[0]))

    @property
    def top_conflict_rate(self) -> float:
        """Of the positions in two or more supports, the share with both signs."""
        return float(_ratio(self.positions[3], self.positions[2]))

    @property
    def cancellation(self) -> float:
        """1 - sum |sum_i delta_i| / sum_i sum |delta_i|: what adding the task vectors destroys."""
        return float(1 - _ratio(self.positions[5], self.positions[4]))

    @property
    def density(self) -> Floats:
        """(n,) share of non-zero entries."""
        return np.asarray(np.diag(self.both[0]) / self.elements)

    @property
    def kurtosis(self) -> Floats:
        """(n,) excess kurtosis: 0 for a normal distribution, large for a few big updates."""
        first, second, third, fourth = self.powers.T / self.elements
        variance = second - first**2
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        return _ratio(central, variance**2) - 3

    @property
    def energy_profile(self) -> Floats:
        """(n, 3) share of the squared norm in the largest 1, 5 and 20 % of entries."""
        return _ratio(self.top_energy, self.powers[:, 1:2])

    @property
    def _rows_gram(self) -> Floats:
        skip = len(self.gram) - self.models
        return self.gram[skip:, skip:]


def pairs(matrix: Floats) -> Floats:
    """The entries above the diagonal: one per pair of models."""
    return np.asarray(matrix[np.triu_indices(len(matrix), 1)])


def _ratio(numerator: Any, denominator: Any) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = np.asarray(np.divide(numerator, denominator), dtype=np.float64)
    return np.where(np.isfinite(quotient), quotient, np.nan)
