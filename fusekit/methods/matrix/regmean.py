"""RegMean: linear layers by least squares on their own inputs, from Gram matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusekit.methods.matrix.linalg import eigen

SMALLEST_RIDGE = 1e-10
"""Added, or more (see `_ridge`), to the eigenvalues where equations need it, diagonal scaled to 1.

They do where a pivot is less than ten times as large.
"""


class Solved(NamedTuple):
    """A merged weight, and whether its equations needed a ridge."""

    weight: Tensor
    ridged: bool


def shrink(gram: Tensor, scale: float) -> Tensor:
    """`scale G + (1 - scale) diag(G)`: off-diagonal entries times scale, in float64."""
    wide = gram.double() * scale
    wide.diagonal().copy_(gram.double().diagonal())
    return wide


def merge(
    weights: Sequence[Tensor],
    grams: Sequence[Tensor],
    *,
    scale: float = 0.9,
    factors: Sequence[float] | None = None,
    transposed: bool = False,
) -> Solved:
    """The weight that least disturbs every model's outputs on that model's inputs.

    `W^T = (sum_k c_k G'_k)^-1 sum_k c_k G'_k W_k^T` with `G'_k = shrink(G_k)`. It is solved for the
    departure from the average of the weights, so that inputs that no model ever saw, and directions
    that only a ridge determines, get the average.

    Args:
        weights: W_k (out, in), or (in, out) if `transposed` (GPT-2's Conv1D).
        grams: G_k (in, in), means over tokens of the inputs' outer products.
        scale: of the off-diagonal entries, in [0, 1]; 1 leaves them, 0 keeps the diagonal alone.
        factors: c_k; by default 1.
        transposed: whether the inputs are the weights' first axis.

    References:
        "Dataless Knowledge Fusion by Merging Weights of Language Models", arXiv 2212.09849.
    """
    factors = [1.0] * len(weights) if factors is None else factors
    share = sum(factors)
    oriented = [W.double() if transposed else W.double().T for W in weights]
    average = torch.zeros_like(oriented[0])
    for W, factor in zip(oriented, factors, strict=True):
        average += W * (factor / share)
    total = torch.zeros_like(grams[0], dtype=torch.float64)
    right = torch.zeros_like(average)
    for W, gram, factor in zip(oriented, grams, factors, strict=True):
        G = shrink(gram, scale) * factor
        total += G
        right.addmm_(G, W - average)
    departure, ridged = _solve(total, right, _ridge(grams[0]))
    merged = average + departure
    return Solved((merged if transposed else merged.T).to(weights[0].dtype), ridged)


def _ridge(gram: Tensor) -> float:
    """Ten times the rounding noise in the eigenvalues of a Gram matrix with diagonal 1.

    Entries of n columns are off by up to eps each, the eigenvalues by about eps sqrt(n). A smaller
    ridge would let that noise decide what the data leaves open.
    """
    return max(SMALLEST_RIDGE, 10.0 * torch.finfo(gram.dtype).eps * math.sqrt(len(gram)))


def _solve(total: Tensor, right: Tensor, ridge: float) -> tuple[Tensor, bool]:
    """Cholesky, or eigenvalues with a ridge where the matrix is singular or nearly so.

    The matrix is scaled to a unit diagonal first, so that inputs of different sizes, which do no
    harm, do not count as bad conditioning.
    """
    diagonal = total.diagonal()
    dead = diagonal <= 0
    size = torch.where(dead, torch.ones_like(diagonal), diagonal).rsqrt()
    scaled = total * size[:, None] * size
    scaled.diagonal()[dead] = 1.0
    factor, failed = torch.linalg.cholesky_ex(scaled)
    pivots = factor.diagonal()
    weak = bool(failed) or float(pivots.min() ** 2) < 10.0 * ridge
    aligned = right * size[:, None]
    if weak:
        values, vectors = eigen(scaled)
        inverse = (values.clamp(min=0) + ridge).reciprocal()
        return ((vectors * inverse) @ (vectors.T @ aligned)) * size[:, None], weak
    return torch.cholesky_solve(aligned, factor) * size[:, None], weak
