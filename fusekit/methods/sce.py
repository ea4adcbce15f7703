"""SCE: keep the positions where models differ most, weigh models by energy, erase minorities."""

from __future__ import annotations

from fusekit.methods.base import Copy, Parameter, Remark, Tensor
from fusekit.methods.pruning import keep_most_varying
from fusekit.methods.task_vectors import (
    ElectedMerge,
    Merged,
    SquaredNorms,
    int8_mask_parameter,
    task_vector_method,
)


def energy_weights(energies: list[float], elements: int, floor: float = 0.0) -> tuple[float, ...]:
    """Each model's share of the squared norms; equal shares where nothing was changed.

    `floor` is a sum of mean squares below which the shares are equal too.
    """
    total = sum(energies)
    if total <= 0.0 or total / elements < floor:
        return (1.0 / len(energies),) * len(energies)
    return tuple(energy / total for energy in energies)


def _sce(tensor: Tensor) -> Merged:
    selected = yield from keep_most_varying(tensor, tensor["select_topk"])
    energies = yield SquaredNorms(selected)
    if not energies.any():
        if tensor["select_topk"] < 1.0 and (yield SquaredNorms(())).any():
            yield Remark("models that do not differ have no variance to select by: the base stays")
        return Copy(-1)
    weights = energy_weights(energies.tolist(), tensor.group_size, tensor["uniform_below"])
    merged = selected if tensor["variant"] == "paper" else ()
    return ElectedMerge(
        merged,
        ballots=(1.0,) * tensor.models,
        weights=weights,
        election=0,
        tie_sign=1,
        merge=0,
        scale=1.0,
    )


SELECT_TOPK = Parameter(
    "select_topk",
    "float",
    "Share of the positions that are not the same in all models that is kept, those of largest "
    "variance over the models; 1 keeps all. The paper takes 0.1.",
    default=1.0,
    minimum=0.0,
    maximum=1.0,
)

METHODS = (
    task_vector_method(
        "sce",
        "SCE (select, calculate, erase)",
        _sce,
        summary="Models weighed by the energy of their most disputed updates, majority sign only.",
        formula=(
            "c_i = |m d_i|^2 / sum_j |m d_j|^2,  m = 1 where the variance over models is largest;  "
            "y = base + sum over {i: sign(m d_i) = s} of c_i m d_i / sum of their c_i,  "
            "s = sign(sum_i m d_i)"
        ),
        references=(
            "Wan et al., FuseChat: Knowledge Fusion of Chat Models, 2024, arXiv 2408.07990",
        ),
        parameters=(
            SELECT_TOPK,
            Parameter(
                "variant",
                "choice",
                "paper: election and merge use the selected entries; fuseai: the selection affects "
                "the weights alone, as in the authors' released code.",
                default="paper",
                choices=("paper", "fuseai"),
            ),
            Parameter(
                "uniform_below",
                "float",
                "Equal weights where the sum of mean squared updates is below this; mergekit has "
                "1e-6, which makes the weights of most language model fine-tunes equal.",
                default=0.0,
                minimum=0.0,
            ),
            int8_mask_parameter(),
        ),
        passes="two, with select_topk below 1 three (order statistics, energies, combine)",
        use_when="Several chat models tuned from one pivot on data of different teachers.",
        caveats=(
            "There are no weights to set. With select_topk below 1 a tensor that is the same in "
            "all models (or a single model) gives the base, not the models' tensor."
        ),
    ),
)
