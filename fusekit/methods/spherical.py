"""Interpolation on the sphere: SLERP, NuSLERP, multi-SLERP and the Karcher mean.

All four end in a linear combination of the models, so all they need to know is the Gram matrix of
the models (or of their task vectors): norms and angles follow from it, iterations included.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from fusekit.errors import RecipeError
from fusekit.methods.base import Combine, Method, Parameter, Remark, Summary, Tensor
from fusekit.methods.combines import IndexedLinear, linear, move
from fusekit.methods.linear import shares
from fusekit.methods.summaries import ColumnGram, DeltaGram, Gram, Matrix, RowGram

if TYPE_CHECKING:
    from fusekit.methods.base import Array

Steps = Generator[Summary, Any, Combine]

_PARALLEL = 0.9995
_NORM_FLOOR = 1e-8
_STRAIGHT = 1e-7
"""The sine of an angle whose cosine is 1 or -1 up to rounding is below this."""


def _slerp(tensor: Tensor) -> Steps:
    if tensor.models == 1:
        return linear([1.0])
    gram = yield Gram(2)
    return linear(slerp_weights(gram, tensor["t"]))


def slerp_weights(gram: Matrix, t: float) -> list[float]:
    """Coefficients of two vectors with this Gram matrix on the arc from the first to the second.

    Straight interpolation where the vectors are nearly parallel or nearly opposite. The
    coefficients apply to the vectors as they are, not to unit vectors.
    """
    norms = [math.sqrt(gram[i][i]) for i in range(2)]
    scales = [norm if norm > _NORM_FLOOR else 1.0 for norm in norms]
    cosine = gram[0][1] / (scales[0] * scales[1])
    if abs(cosine) > _PARALLEL:
        return [1.0 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def _nuslerp(tensor: Tensor) -> Steps:
    if tensor.models == 1:
        return linear([1.0])
    first, second = tensor.each("weight")
    t = second / (first + second) if abs(first + second) >= 1e-6 else 0.5
    by_vector = not tensor["nuslerp_flatten"] and len(tensor.shape) > 1
    if not by_vector:
        gram = yield (DeltaGram if tensor.has_base else Gram)(2)
        a, b = nuslerp_weights(gram[0][0], gram[0][1], gram[1][1], t)
        return move([a, b], tensor.has_base)
    along_rows = tensor["nuslerp_row_wise"]
    grams = yield (ColumnGram if along_rows else RowGram)(tensor.has_base)
    repeat = 1 if along_rows else tensor.shape[-1]
    return IndexedLinear(_nuslerp_weights_by_vector(grams, t, tensor.has_base), repeat)


def _nuslerp_weights_by_vector(grams: Array, t: float, has_base: bool) -> Array:
    import numpy as np

    pairs = [nuslerp_weights(aa, ab, bb, t) for aa, ab, bb in grams.T.tolist()]
    weights = np.zeros((3, len(pairs)))
    weights[:2] = np.array(pairs).T
    if has_base:
        weights[2] = 1.0 - weights[:2].sum(axis=0)
    return weights


def nuslerp_weights(aa: float, ab: float, bb: float, t: float) -> tuple[float, float]:
    """SLERP coefficients from the inner products of two vectors, straight only where sin = 0."""
    floor = 1e-7
    cosine = ab / (max(math.sqrt(aa), floor) * max(math.sqrt(bb), floor))
    angle = math.acos(min(max(cosine, -1.0), 1.0))
    sine = math.sin(angle)
    if abs(sine) < _STRAIGHT:
        return 1.0 - t, t
    return math.sin((1.0 - t) * angle) / sine, math.sin(t * angle) / sine


def _multislerp(tensor: Tensor) -> Steps:
    if tensor.models == 1:
        return linear([1.0])
    weights = tensor.each("weight")
    if tensor["normalize_weights"]:
        weights = shares(tensor, "multislerp", "normalize_weights")
    gram = yield (DeltaGram if tensor.has_base else Gram)(tensor.models)
    epsilon = tensor["eps"]
    norms = [math.sqrt(gram[i][i]) for i in range(tensor.models)]
    if not any(norms):
        return move([0.0] * tensor.models, tensor.has_base)
    # The mean direction is sum_i (w_i / r_i) v_i; its length follows from the Gram matrix. One
    # tangent step from it vanishes in exact arithmetic: its components sum to zero.
    # A vector of length 0 has no direction: it only lowers the scale.
    direction = [
        w / (norm + epsilon) if norm else 0.0 for w, norm in zip(weights, norms, strict=True)
    ]
    length = math.sqrt(max(quadratic(gram, direction), 0.0))
    if length <= epsilon:
        if tensor.models == 2:
            return move(weights, tensor.has_base)
        raise RecipeError(
            f"multislerp: the weighted directions of tensor {tensor.name!r} cancel out: "
            "there is no mean direction; change the weights"
        )
    scale = sum(w * norm for w, norm in zip(weights, norms, strict=True))
    return move([scale * d / length for d in direction], tensor.has_base)


def _karcher(tensor: Tensor) -> Steps:
    if tensor.models == 1:
        return linear([1.0])
    alphas = shares(tensor, "karcher", option=None)
    gram = yield Gram(tensor.models)
    if tensor.models == 2 and gram[0][1] <= (1e-12 - 1.0) * math.sqrt(gram[0][0] * gram[1][1]) < 0:
        yield Remark("karcher: opposite directions have no mean: the first one is taken")
    return linear(karcher_weights(gram, alphas, tensor["max_iter"], tensor["tol"]))


def karcher_weights(gram: Matrix, shares: list[float], max_iter: int, tol: float) -> list[float]:
    """Coefficients of the Riemannian centre of mass of vectors, times their mean norm.

    Vectors no longer than `tol` have no direction and only lower the mean norm; all coefficients
    are 0 where no other vector has a share.

    All iterates lie in the span of the unit vectors, so they are followed as coefficients `z` with
    inner products from the Gram matrix `unit` of the unit vectors.
    """
    norms = [math.sqrt(gram[i][i]) for i in range(len(gram))]
    valid = [i for i, norm in enumerate(norms) if norm > tol]
    result = [0.0] * len(gram)
    total = sum(shares[i] for i in valid)
    if total == 0:
        return result
    unit = [[gram[i][j] / (norms[i] * norms[j]) for j in valid] for i in valid]
    alphas = [shares[i] / total for i in valid]

    z = list(alphas)
    length = math.sqrt(max(quadratic(unit, z), 0.0))
    z = [1.0] + [0.0] * (len(valid) - 1) if length < tol else [c / length for c in z]
    for _ in range(max_iter):
        cosines = [sum(row[j] * z[j] for j in range(len(z))) for row in unit]
        tangent = [0.0] * len(z)
        for i, cosine in enumerate(cosines):
            angle = math.acos(min(max(cosine, -1.0), 1.0))
            sine = math.sin(angle)
            if angle < tol or sine < tol:  # at the point itself, or opposite: no direction to go
                continue
            pull = alphas[i] * angle / sine
            tangent = [g - pull * cosine * c for g, c in zip(tangent, z, strict=True)]
            tangent[i] += pull
        step = math.sqrt(max(quadratic(unit, tangent), 0.0))
        if step < tol:
            break
        z = [
            math.cos(step) * c + math.sin(step) * g / step for c, g in zip(z, tangent, strict=True)
        ]
        length = math.sqrt(max(quadratic(unit, z), 0.0))
        if length > tol:
            z = [c / length for c in z]
    scale = sum(share * norm for share, norm in zip(shares, norms, strict=True))
    for i, coefficient in zip(valid, z, strict=True):
        result[i] = scale * coefficient / norms[i]
    return result


def quadratic(matrix: Matrix, z: list[float]) -> float:
    """z^T M z."""
    return sum(a * b * matrix[i][j] for i, a in enumerate(z) for j, b in enumerate(z))


_WEIGHT = Parameter("weight", "float", "The model's weight.", per_model=True)

METHODS = (
    Method(
        name="slerp",
        title="SLERP",
        summary="Spherical interpolation between two models; the norm does not shrink on the way.",
        formula="y = [sin((1-t) theta) a + sin(t theta) b] / sin(theta)",
        references=("Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985",),
        parameters=(
            Parameter("t", "float", "0 gives base_model, 1 the other model; beyond extrapolates."),
        ),
        rule=_slerp,
        base="first",
        max_models=2,
        for_more="multislerp and karcher",
        passes="two (Gram matrix, combine)",
        use_when="Two models, usually with a gradient of t over depth.",
        caveats=(
            "Tensors whose cosine exceeds 0.9995 in magnitude are interpolated linearly, nearly "
            "opposite ones too. If one tensor is zero the other is scaled by a sine, not linearly."
        ),
    ),
    Method(
        name="nuslerp",
        title="NuSLERP",
        summary="SLERP with per-model weights, optionally per row or column, or on task vectors.",
        formula="t = w_1/(w_0+w_1);  y = [sin((1-t) theta) v_0 + sin(t theta) v_1] / sin(theta)",
        references=(
            "Ramé et al., WARP: On the benefits of weight averaged rewarded policies, 2024, "
            "arXiv 2406.16768 (interpolation of task vectors)",
        ),
        parameters=(
            _WEIGHT,
            Parameter(
                "nuslerp_flatten",
                "bool",
                "Treat a tensor as one vector; false: one angle per vector along the last axis.",
                default=True,
            ),
            Parameter(
                "nuslerp_row_wise",
                "bool",
                "Without flattening, take the vectors along axis 0 (one angle per column).",
                default=False,
            ),
        ),
        rule=_nuslerp,
        base="origin",
        max_models=2,
        for_more="multislerp and karcher",
        common_rows=True,
        passes="two (Gram matrix, combine)",
        use_when="Two models with ordinary weights, or two task vectors around a base.",
    ),
    Method(
        name="multislerp",
        title="Multi-SLERP",
        summary="Spherical average of two or more models in closed form.",
        formula="y = (sum_i w_i |v_i|) m / |m|,  m = sum_i w_i v_i / |v_i|",
        references=("Goddard, mergekit: multi-SLERP (description by its author), 2025",),
        parameters=(
            _WEIGHT,
            Parameter(
                "normalize_weights", "bool", "Divide the weights by their sum.", default=True
            ),
            Parameter("eps", "float", "Guard added to norms.", default=1e-8, minimum=0.0),
        ),
        rule=_multislerp,
        base="origin",
        passes="two (Gram matrix, combine)",
        use_when="More than two models where plain averaging shrinks norms too much.",
    ),
    Method(
        name="karcher",
        title="Karcher mean",
        summary="Riemannian centre of mass of the models on the sphere, with the mean norm.",
        formula="argmin_u sum_i alpha_i arccos(<u, x_i/|x_i|>)^2, times sum_i alpha_i |x_i|",
        references=(
            "Karcher, Riemannian center of mass and mollifier smoothing, CPAM 1977",
            "Model merging over the Fisher-Rao manifold, 2026, arXiv 2603.04972 (as its proxy)",
        ),
        parameters=(
            Parameter(
                "weight", "float", "The model's share.", default=1.0, per_model=True, minimum=0.0
            ),
            Parameter("max_iter", "int", "Most fixed-point steps.", default=10, minimum=0),
            Parameter(
                "tol",
                "float",
                "Stop when a step would be shorter than this, in radians. Also the norm up to "
                "which a model's tensor counts as zero: it has no direction and only lowers the "
                "mean norm, and where all do the result is zero.",
                default=1e-5,
                above=0.0,
            ),
        ),
        rule=_karcher,
        base=None,
        passes="two (Gram matrix, combine)",
        use_when="More than two models far apart in angle.",
        caveats="For models a few degrees apart it is close to the plain average.",
    ),
)
