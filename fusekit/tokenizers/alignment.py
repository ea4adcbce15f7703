"""Which rows of which models make up each model's embedding matrix in an output vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Alignment:
    """Row maps of all models onto one output vocabulary of `size` ids in `rows` matrix rows.

    Row `j < size` of model `m` is its own row `own[m, j]`, or, where that is -1, the mean of the
    *fallback* rows of `j`: `(fallback_model[t], fallback_row[t])` for `t` from
    `fallback_start[j]` to `fallback_start[j + 1]`; no fallback row means zeros. The fallback does
    not depend on the model that lacks the row. Rows from `size` on are the mean of the rows before.
    `ids[m, j]` is the id of `j` in `m`, -1 for none, also where `m` is to take another row for it.
    """

    models: tuple[str, ...]
    own: Ids
    fallback_start: Ids
    fallback_model: Ids
    fallback_row: Ids
    ids: Ids
    size: int
    rows: int

    @classmethod
    def of(cls, models: tuple[str, ...], own: Ids, fallback: Ids, ids: Ids, rows: int) -> Alignment:
        """From dense tables `(models, size)`: own rows, fallback rows and ids, -1 for none."""
        size = own.shape[1]
        token, model = np.nonzero(fallback.T >= 0)
        start = np.zeros(size + 1, np.int64)
        np.cumsum(np.bincount(token, minlength=size), out=start[1:])
        return cls(models, own, start, model, fallback[model, token], ids, size, rows)

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of each model reference in `models`."""
        return {model: position for position, model in enumerate(self.models)}

    def is_identity(self, model: str, rows: int) -> bool:
        """Whether a matrix of `rows` rows of this model is already in the output vocabulary."""
        own = self.own[self.index[model]]
        return rows == self.rows == self.size and bool(np.array_equal(own, np.arange(self.size)))

    def new_ids(self, model: str, rows: int) -> Ids:
        """The other direction: output id of each of the model's `rows` old ids, -1 for none."""
        ids = self.ids[self.index[model]]
        known = np.flatnonzero((ids >= 0) & (ids < rows))[::-1]
        new = np.full(rows, -1, np.int64)
        new[ids[known]] = known
        return new
