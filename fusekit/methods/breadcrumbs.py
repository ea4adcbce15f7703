"""Model Breadcrumbs: task arithmetic without the smallest and without the largest updates."""

from __future__ import annotations

from fusekit.methods.base import Parameter, Tensor
from fusekit.methods.pruning import trim_two_sided
from fusekit.methods.task_vectors import (
    ELECTION,
    YADAV,
    Merged,
    Pruned,
    add_up,
    common_parameters,
    density_parameter,
    elect,
    given_weights,
    rescale,
    rescale_parameter,
    task_vector_method,
    weight_parameter,
)


def two_sided(tensor: Tensor) -> Pruned:
    """Drop the largest gamma share of every task vector, keep the density share that follows."""
    densities = tensor.each("density")
    prunings = yield from trim_two_sided(tensor, densities, tensor.each("gamma"))
    return (yield from rescale(tensor, prunings, densities))


def _breadcrumbs(tensor: Tensor) -> Merged:
    prunings = yield from two_sided(tensor)
    return add_up(tensor, prunings, given_weights(tensor))


def _breadcrumbs_ties(tensor: Tensor) -> Merged:
    prunings = yield from two_sided(tensor)
    return (yield from elect(tensor, prunings, given_weights(tensor)))


GAMMA = Parameter(
    "gamma",
    "float",
    "Fraction of entries dropped as outliers, the largest first. Gives way where density + gamma "
    "exceeds 1, and has no effect at density 1.",
    default=0.01,
    per_model=True,
    minimum=0.0,
    maximum=1.0,
)

_DENSITY = density_parameter(
    "Fraction of entries kept; at least one entry of every tensor is. Must be set to have an "
    "effect; the paper keeps 0.1 to 0.15.",
    1.0,
    minimum=0.0,
    maximum=1.0,
)

_DAVARI = (
    "Davari and Belilovsky, Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks, "
    "ECCV 2024, arXiv 2312.06795"
)
_PASSES = "two (order statistics, combine); ties at a cut add one, rescale l1 another"

METHODS = (
    task_vector_method(
        "breadcrumbs",
        "Model Breadcrumbs",
        _breadcrumbs,
        summary="Task arithmetic with the tiny and the huge updates of every tensor masked out.",
        formula=(
            "y = base + lambda sum_i w_i m_i (x_i - base),  m_i = 1 on the int(density D) entries "
            "that follow the int(gamma D) largest"
        ),
        references=(_DAVARI,),
        parameters=(
            weight_parameter(),
            _DENSITY,
            GAMMA,
            rescale_parameter("none"),
            *common_parameters(normalize=False),
        ),
        passes=_PASSES,
        use_when="Many tasks are added with one setting, or single updates are outliers.",
        caveats=(
            "Every tensor keeps the same share, whether it matters or not. A tensor too small for "
            "int(gamma D) >= 1 loses no outlier (mergekit zeroes such tensors altogether)."
        ),
    ),
    task_vector_method(
        "breadcrumbs_ties",
        "Model Breadcrumbs + TIES",
        _breadcrumbs_ties,
        summary="Two-sided masks, then sign election and merging of what agrees.",
        formula="as breadcrumbs, summed over the entries that agree with the elected sign",
        references=(_DAVARI, YADAV),
        parameters=(
            weight_parameter(),
            _DENSITY,
            GAMMA,
            rescale_parameter("none"),
            *ELECTION,
            *common_parameters(normalize=False),
        ),
        passes=_PASSES,
        use_when="As breadcrumbs, where task vectors conflict in sign.",
        caveats="As breadcrumbs.",
    ),
)
