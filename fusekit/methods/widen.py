"""WIDEN: importance of columns by how much their magnitude and direction changed."""

from __future__ import annotations

import math
import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fusekit import kernels
from fusekit.errors import RecipeError
from fusekit.methods.base import (
    Additive,
    Block,
    Combine,
    Copy,
    Method,
    Parameter,
    Remark,
    Scope,
    Sequential,
    Summary,
    Tensor,
)
from fusekit.methods.combines import IndexedLinear

if TYPE_CHECKING:
    from fusekit.methods.base import Array

_EMBEDDING = re.compile(
    r"(^|[._])(embed_tokens|tok_embeddings|word_embeddings|token_embedding|embed_in|wte)([._]|$)"
    r"|(^|\.)shared\.weight$"
)
"""Token embeddings (vocabulary x width): there, one token's vector is a column."""


@dataclass(frozen=True)
class Changes(Sequential):
    """Per column: b.b, then b.d_i of every model, then d_i.d_i (d_i = x_i - b), in float64.

    A column runs along axis 0; with `by_row` it is a row of the tensor (one token's vector).
    """

    by_row: bool

    def unit(self, shape: tuple[int, ...]) -> int:
        return shape[-1] if self.by_row else 1

    def begin(self, tensor: Tensor) -> Array:
        import numpy as np

        columns = tensor.shape[0] if self.by_row else math.prod(tensor.shape[1:])
        return np.zeros((2 * tensor.models + 1, columns))

    def update(self, state: Array, block: Block) -> None:
        if self.by_row:
            length = block.tensor.shape[-1]
            kernels.columnwise.write_row_changes(block.rows, block.base, block.start, length, state)
        else:
            kernels.columnwise.add_column_changes(block.rows, block.base, block.start, state)


@dataclass(frozen=True)
class SumsOfMagnitudes(Additive):
    """sum |d_i| of every task vector."""

    deltas: ClassVar[bool] = True

    scope: Scope = "tensor"

    def width(self, tensor: Tensor) -> int:
        return tensor.models

    def measure(self, block: Block, out: Array) -> None:
        norms = kernels.norms
        norms.sums(block.rows, norms.MAGNITUDES, self.grain(block.tensor.shape), out)


@dataclass(frozen=True)
class SoftOrFixed(Combine):
    """base + sum_i s_i d_i, s = softmax over models of |d_i|, or `fixed` above a threshold."""

    deltas: ClassVar[bool] = True

    thresholds: tuple[float, ...]
    fixed: float

    def apply(self, block: Block, out: Array) -> None:
        import numpy as np

        thresholds = np.array(self.thresholds, dtype=np.float64)
        kernels.columnwise.soft_or_fixed(block.rows, thresholds, self.fixed, block.base, out)


def _widen(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    if tensor["exclude"] is not None and _pattern(tensor["exclude"]).search(tensor.name):
        return Copy(-1)
    if tensor.models > 3:
        yield Remark("widen: with more than 3 models important columns overshoot: use a small s")
    if len(tensor.shape) < 2:
        sums = yield SumsOfMagnitudes()
        thresholds = tuple(tensor["t"] * total / tensor.size for total in sums.tolist())
        return SoftOrFixed(thresholds, tensor["s"])
    by_row = len(tensor.shape) == 2 and _EMBEDDING.search(tensor.name) is not None
    changes = yield Changes(by_row)
    weights = _column_weights(changes, tensor["t"], tensor["s"], tensor["ties"] == "average")
    return IndexedLinear(weights, tensor.shape[-1] if by_row else 1)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise RecipeError(
            f"widen: exclude: found {text!r}, expected a regular expression: {error}"
        ) from None


def _column_weights(changes: Array, t: float, s: float, average_ties: bool) -> Array:
    """Weights (n + 1, columns) of the models and, last, of the base."""
    import numpy as np

    n = len(changes) // 2
    base, products, squares = changes[0], changes[1 : 1 + n], changes[1 + n :]
    models = np.maximum(base + 2.0 * products + squares, 0.0)
    lengths = np.sqrt(models) + np.sqrt(base)
    both = base * models
    with np.errstate(divide="ignore", invalid="ignore"):
        # |m - m0| and 1 - cos without subtracting numbers that are nearly equal.
        longer = np.where(lengths > 0, np.abs(2.0 * products + squares) / lengths, 0.0)
        sine_squared = np.clip((base * squares - products**2) / both, 0.0, 1.0)
        cosine = (base + products) / np.sqrt(both)
        turned = np.where(
            cosine >= 0, sine_squared / (1.0 + np.sqrt(1.0 - sine_squared)), 1.0 - cosine
        )
    # A column of zeros has no direction: unchanged if it still is zero, else fully changed.
    turned = np.where(both > 0, turned, np.where(base + models > 0, 1.0, 0.0))
    weights = np.empty((n + 1, changes.shape[1]))
    weights[:n] = 0.5 * (
        _importance(longer, t, s, average_ties) + _importance(turned, t, s, average_ties)
    )
    weights[n] = 1.0 - weights[:n].sum(axis=0)
    return weights


def _importance(values: Array, t: float, s: float, average_ties: bool) -> Array:
    """softmax over models of the columns' ranks; `s` where a rank exceeds t times the mean rank."""
    import numpy as np

    columns = values.shape[1]
    ranks = np.stack([_ranks(row, average_ties) for row in values])
    weights: Array = np.exp((ranks - ranks.max(axis=0)) / columns)
    weights /= weights.sum(axis=0)
    weights[2.0 * ranks > t * (columns - 1)] = s
    return weights


def _ranks(values: Array, average_ties: bool) -> Array:
    """Positions 0 .. n-1 in ascending order; equal values share theirs, or keep their order."""
    import numpy as np

    order = np.argsort(values, kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(len(values))
    if average_ties:
        _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - 0.5 * (counts + 1))[group]
    return ranks


METHODS = (
    Method(
        name="widen",
        title="WIDEN",
        summary=(
            "Ranks every model's columns by how much their size and direction changed; columns "
            "that changed more than average are taken at full strength."
        ),
        formula=(
            "y_c = base_c + sum_i (S_size,ic + S_dir,ic) / 2 (x_i - base)_c,  "
            "S = s if rank > t mean rank, else softmax over models of the ranks"
        ),
        references=(
            "Yu et al., Extend Model Merging from Fine-Tuned to Pre-Trained Large Language Models "
            "via Weight Disentanglement, 2024, arXiv 2408.03092",
        ),
        parameters=(
            Parameter(
                "t",
                "float",
                "How far above the mean a column's rank must be to count as important; 2 and more "
                "switch that off.",
                default=1.0,
                minimum=0.0,
            ),
            Parameter("s", "float", "Weight of important columns.", default=1.0),
            Parameter(
                "exclude",
                "text",
                "Regular expression of tensor names that keep the base's values.",
                default=None,
            ),
            Parameter(
                "ties",
                "choice",
                "Ranks of columns that changed equally: their average, or by index as in the "
                "authors' code (which ranks the columns of an unchanged model).",
                default="average",
                choices=("average", "index"),
            ),
        ),
        rule=_widen,
        base="origin",
        base_required=True,
        passes="two (column statistics, combine)",
        use_when=(
            "Two models whose updates differ in size by an order of magnitude, such as a chat "
            "fine-tune and a continually pre-trained model; nothing to tune."
        ),
        caveats=(
            "Weights are not normalised over models: their sum lies between about 1 and n s, so "
            "identical models overshoot and more than three models of similar size behave like "
            "task arithmetic with too large a lambda. Vocabularies must be aligned first. "
            "Kernels of convolutions count as matrices (out, in * k)."
        ),
    ),
)
