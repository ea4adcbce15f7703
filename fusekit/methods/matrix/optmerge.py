"""OptMerge: WUDI's problem on denoised task vectors, in its three published recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fusekit.methods.matrix.linalg import mean, triples
from fusekit.methods.matrix.quadratic import (
    Quadratic,
    adam,
    informative,
    problem,
    sgd,
    starting_point,
    task_norm,
)

Variant = Literal["full", "lora", "modality"]


@dataclass(frozen=True)
class _Published:
    """The optimiser a variant was published with."""

    lr: float
    steps: int = 300


PUBLISHED = {"full": _Published(1e-5), "lora": _Published(1e-4), "modality": _Published(5e-2)}


def kept_rank(shape: Sequence[int], models: int, variant: Variant, ratio: float | None) -> int:
    """k: floor(min(m, n) ratio), where ratio is 1 / N, or 1 / 5 for modalities; at least 1."""
    smaller = min(shape)
    if ratio is not None:
        return max(1, int(smaller * ratio))
    return max(1, smaller // (5 if variant == "modality" else models))


def denoised_problem(deltas: Sequence[Tensor], variant: Variant, rank: int) -> Quadratic:
    """The quadratic of a variant from non-zero task vectors in float64.

    `full`: targets are the rank-k parts of the centred task vectors plus their mean, projectors the
    rank-k factors `S_k V_k^T` of the task vectors; `lora`: targets are rank-k parts; `modality`:
    as `lora`, with the whole task vectors as projectors. Norms are those of the untrimmed ones.
    """
    norms = [task_norm(delta) for delta in deltas]
    cut = [triples(delta, rank) for delta in deltas]
    if variant == "full":
        average = mean(deltas)
        targets = [triples(delta - average, rank).product() + average for delta in deltas]
    else:
        targets = [piece.product() for piece in cut]
    if variant == "modality":
        projectors = list(deltas)
    else:
        projectors = [piece.S[:, None] * piece.V.T for piece in cut]
    return problem(targets, projectors, norms)


def merge(
    deltas: Sequence[Tensor],
    variant: Variant = "full",
    *,
    ratio: float | None = None,
    steps: int | None = None,
    lr: float | None = None,
) -> Tensor:
    """The merged update of one matrix.

    `full` runs Adam from the sum of the task vectors, `lora` and `modality` gradient descent with
    momentum 0.9 from their mean.

    Args:
        deltas: task vectors (m, n); zero ones are left out.
        variant: the published recipe.
        ratio: rank kept as a share of min(m, n); by default 1 / N (1 / 5 for `modality`).
        steps, lr: of the optimiser; by default as published.

    References:
        "Unifying Multimodal Large Language Model Capabilities and Modalities via Model Merging",
        arXiv 2505.19892.
    """
    used = informative(deltas)
    average = mean(deltas)
    if not used:
        return average.to(deltas[0].dtype)
    rank = kept_rank(deltas[0].shape, len(deltas), variant, ratio)
    quadratic = denoised_problem(used, variant, rank)
    published = PUBLISHED[variant]
    steps = published.steps if steps is None else steps
    lr = published.lr if lr is None else lr
    if variant == "full":
        merged = adam(quadratic, starting_point(deltas, "sum"), steps, lr)
    else:
        merged = sgd(quadratic, average, steps, lr)
    return merged.to(deltas[0].dtype)
