"""Model Stock: how far to go from the base to the average, from the angle between fine-tunes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from fusekit.methods.base import Combine, Method, Parameter, Remark, Summary, Tensor
from fusekit.methods.combines import IndexedLinear, move
from fusekit.methods.summaries import DeltaGram, Matrix, RowGram

if TYPE_CHECKING:
    from fusekit.methods.base import Array

_AWAY = -0.1
"""An interpolation ratio below this is no accident of nearly orthogonal task vectors."""

_SINGULAR = 1e-6
"""Below this, 1 + (N - 1) c is rounding: the offsets cancel and their average says nothing."""


def mean_cosine(gram: Matrix) -> float:
    """Mean cosine over all pairs of vectors; pairs with a zero vector count as 0."""
    cosines = []
    for i, j in itertools.combinations(range(len(gram)), 2):
        norms = math.sqrt(gram[i][i]) * math.sqrt(gram[j][j])
        cosines.append(min(max(gram[i][j] / norms, -1.0), 1.0) if norms > 0.0 else 0.0)
    return sum(cosines) / len(cosines)


def interpolation_ratio(cosine: float, models: int, clip: bool) -> float:
    """t = N c / (1 + (N - 1) c): the average's share; 0 where the offsets cancel each other."""
    denominator = 1.0 + (models - 1) * cosine
    if denominator < _SINGULAR:
        return 0.0
    ratio = models * cosine / denominator
    return min(max(ratio, 0.0), 1.0) if clip else ratio


def _model_stock(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    n, clip = tensor.models, tensor["clip"]
    if tensor["filter_wise"] and len(tensor.shape) > 1:
        grams = yield RowGram(on_deltas=True)
        return IndexedLinear(_row_weights(grams, n, clip), tensor.shape[-1])
    gram = yield DeltaGram(n)
    ratio = interpolation_ratio(mean_cosine(gram), n, clip)
    if ratio < _AWAY:
        yield Remark("model_stock: task vectors point away from each other: t < 0; see clip")
    return move([ratio / n] * n, has_base=True)


def _row_weights(grams: Array, n: int, clip: bool) -> Array:
    """(n + 1, rows) weights from the rows' Gram matrices (pairs, rows)."""
    import numpy as np

    upper = list(itertools.combinations_with_replacement(range(n), 2))
    norms = {i: np.sqrt(grams[k]) for k, (i, j) in enumerate(upper) if i == j}
    cosine = np.zeros(grams.shape[1])
    for k, (i, j) in enumerate(upper):
        if i != j:
            product = norms[i] * norms[j]
            cosine += np.clip(grams[k] / np.where(product > 0, product, 1.0), -1.0, 1.0)
    cosine /= n * (n - 1) / 2
    denominator = 1.0 + (n - 1) * cosine
    singular = denominator < _SINGULAR
    ratio = np.where(singular, 0.0, n * cosine / np.where(singular, 1.0, denominator))
    if clip:
        ratio = np.clip(ratio, 0.0, 1.0)
    weights = np.empty((n + 1, len(ratio)))
    weights[:n] = ratio / n
    weights[n] = 1.0 - ratio
    return weights


METHODS = (
    Method(
        name="model_stock",
        title="Model Stock",
        summary="Between the base and the average of fine-tunes, as far as their angle suggests.",
        formula="y = t mean_i(x_i) + (1 - t) base,  t = N c / (1 + (N - 1) c),  c the mean cosine",
        references=(
            "Jang, Yun and Han, Model Stock: All we need is just a few fine-tuned models, ECCV "
            "2024, arXiv 2403.19522",
        ),
        parameters=(
            Parameter(
                "filter_wise",
                "bool",
                "One ratio per row (vector along the last axis) instead of one per tensor.",
                default=False,
            ),
            Parameter(
                "clip",
                "bool",
                "Keep t in [0, 1]: fine-tunes that point apart then give the base instead of a "
                "step away from their average.",
                default=False,
            ),
        ),
        rule=_model_stock,
        base="origin",
        base_required=True,
        min_models=2,
        common_rows=True,
        passes="two (Gram matrix, combine)",
        use_when="Two or three fine-tunes of one task from one base, instead of a soup of many.",
        caveats=(
            "Meant for fine-tunes of the same task: for different tasks cosines are near 0 and the "
            "result is near the base. A negative mean cosine moves away from the average unless "
            "clip is set. For more than two models the angle is the mean over pairs, a convention "
            "of tools; the paper derives it for one angle."
        ),
    ),
)
