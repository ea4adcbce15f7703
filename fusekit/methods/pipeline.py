"""The task-vector pipeline with every step open: combinations that no paper names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fusekit.errors import RecipeError
from fusekit.methods.base import Parameter, Tensor
from fusekit.methods.breadcrumbs import GAMMA, two_sided
from fusekit.methods.della import EPSILON, RANK_OVER, rank_based
from fusekit.methods.pruning import drop_random, keep_most_varying
from fusekit.methods.sce import SELECT_TOPK, energy_weights
from fusekit.methods.task_vectors import (
    ELECTION,
    RULE,
    Merged,
    Pruned,
    SquaredNorms,
    add_up,
    common_parameters,
    density_parameter,
    elect,
    given_weights,
    rescale,
    rescale_parameter,
    task_vector_method,
    trim,
    weight_parameter,
)


def _whole(tensor: Tensor) -> Pruned:
    yield from ()
    return ()


def _largest(tensor: Tensor) -> Pruned:
    densities = tensor.each("density")
    prunings = yield from trim(tensor, densities)
    return (yield from rescale(tensor, prunings, densities))


def _random(tensor: Tensor) -> Pruned:
    densities = tensor.each("density")
    return (yield from rescale(tensor, drop_random(tensor, densities), densities))


def _most_varying(tensor: Tensor) -> Pruned:
    share = tensor["select_topk"]
    prunings = yield from keep_most_varying(tensor, share)
    return (yield from rescale(tensor, prunings, [share] * tensor.models))


_PRUNERS: dict[str, Callable[[Tensor], Pruned]] = {
    "none": _whole,
    "magnitude": _largest,
    "random": _random,
    "rank": rank_based,
    "two_sided": two_sided,
    "variance": _most_varying,
}
_USED_BY = {
    "density": ("magnitude", "random", "rank", "two_sided"),
    "rule": ("magnitude",),
    "gamma": ("two_sided",),
    "epsilon": ("rank",),
    "rank_over": ("rank",),
    "select_topk": ("variance",),
    "rescale": ("magnitude", "random", "rank", "two_sided", "variance"),
}


def _task_vectors(tensor: Tensor) -> Merged:
    _refuse_idle_settings(tensor)
    prunings = yield from _PRUNERS[tensor["prune"]](tensor)
    weights = given_weights(tensor)
    if tensor["weighting"] == "energy":
        energies = yield SquaredNorms(prunings)
        weights = energy_weights(energies.tolist(), tensor.group_size)
    if tensor["election"] == "none":
        return add_up(tensor, prunings, weights)
    return (yield from elect(tensor, prunings, weights))


def _refuse_idle_settings(tensor: Tensor) -> None:
    """Settings that the chosen steps never look at are mistakes, not preferences."""
    idle = {
        name: f"prune: {tensor['prune']}"
        for name, users in _USED_BY.items()
        if tensor["prune"] not in users
    }
    if tensor["election"] == "none":
        idle |= {parameter.name: "election: none" for parameter in ELECTION[1:]}
    if tensor["weighting"] == "energy":
        idle["weight"] = "weighting: energy"
    for parameter in _PARAMETERS:
        if parameter.name not in idle:
            continue
        name = parameter.name
        values = tensor.each(name) if parameter.per_model else [tensor[name]]
        if any(value != parameter.default for value in values):
            raise RecipeError(
                f"task_vectors: {name} has no effect with {idle[name]} (tensor {tensor.name!r}); "
                "remove it or choose another step"
            )


_PARAMETERS = (
    weight_parameter(),
    Parameter(
        "prune",
        "choice",
        "Which entries of a task vector are kept: all; the largest (TIES); at random (DARE); at "
        "random by rank (DELLA); without the largest and smallest (Breadcrumbs); the positions "
        "that vary most over the models (SCE).",
        default="none",
        choices=tuple(_PRUNERS),
    ),
    density_parameter("Fraction of entries kept.", 1.0, minimum=0.0, maximum=1.0),
    RULE,
    GAMMA,
    EPSILON,
    RANK_OVER,
    SELECT_TOPK,
    rescale_parameter("none"),
    Parameter(
        "weighting",
        "choice",
        "given: the weights as set; energy: each model's share of the squared norms of what is "
        "left (SCE).",
        default="given",
        choices=("given", "energy"),
    ),
    dataclasses.replace(
        ELECTION[0],
        help=f"none: add everything up. Otherwise: {ELECTION[0].help}",
        default="none",
        choices=("none", *ELECTION[0].choices),
    ),
    *ELECTION[1:],
    *common_parameters(normalize=False),
)

METHODS = (
    task_vector_method(
        "task_vectors",
        "Task-vector pipeline",
        _task_vectors,
        summary="Prune, rescale, weigh, elect, normalise: every step of the family chosen freely.",
        formula="y = base + lambda merge_i(w_i rescale(prune(x_i - base)))",
        references=(
            "Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv 2212.04089",
            "the methods whose steps are combined: ties, dare_linear, della, breadcrumbs, sce",
        ),
        parameters=_PARAMETERS,
        passes="one to five, as the chosen steps need",
        use_when="Searching over combinations, or to see what one step of a known method does.",
        caveats=(
            "Left alone it is task arithmetic. With election: mass, ties is prune: magnitude and "
            "normalize: true; della is prune: rank, rescale: l1 and normalize: true; sce is prune: "
            "variance, weighting: energy, weights_in_election: false and normalize: true."
        ),
    ),
)
