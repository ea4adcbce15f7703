"""Merging by what data says: Fisher information of parameters, Gram matrices of layers' inputs."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from fusekit.errors import CheckpointError
from fusekit.methods import matrix
from fusekit.methods.base import Combine, Method, Parameter, Remark, Summary, Tensor
from fusekit.methods.combines import linear
from fusekit.methods.linear import shares
from fusekit.methods.wholes import EMBEDDINGS, HEADS, is_excluded, is_matrix

if TYPE_CHECKING:
    import torch

    from fusekit.methods.base import Measured


def _shares(tensor: Tensor) -> list[float]:
    return shares(tensor, "weight", option=None)


def _average(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    yield from ()
    return linear(_shares(tensor))


def _fisher(
    tensor: Tensor, models: list[torch.Tensor], measured: list[Measured]
) -> Generator[Remark, None, torch.Tensor]:
    if not measured:
        yield Remark("fisher: averaged what had no gradients when it was measured, being frozen")
        return _averaged(tensor, models)
    rule = {"target": "favour_target", "all": "all", "add": "add"}[tensor["floor_rule"]]
    for path, own in zip(tensor.each("statistics"), measured, strict=True):
        if bool((own.value < 0).any()):
            raise CheckpointError(
                f"{path}: the fisher of {tensor.name!r} has negative values, expected squares"
            )
    norms = [own.norm for own in measured]
    factors = matrix.fisher.coefficients(
        _shares(tensor), norms, rule, tensor["floor"], tensor["normalize"]
    )
    merged: torch.Tensor = matrix.fisher.merge(
        models, [own.value for own in measured], factors, rule, tensor["floor"]
    )
    return merged


def _averaged(tensor: Tensor, models: list[torch.Tensor]) -> torch.Tensor:
    merged: torch.Tensor = matrix.linalg.weighted_sum(models, _shares(tensor))
    return merged


def _regmean(
    tensor: Tensor, models: list[torch.Tensor], measured: list[Measured]
) -> Generator[Remark, None, torch.Tensor]:
    if not measured:
        yield Remark("regmean: averaged layers that no data reached when they were measured")
        return _averaged(tensor, models)
    inputs = measured[0].value.shape[0]
    transposed = tensor.shape[1] != inputs
    for path, own in zip(tensor.each("statistics"), measured, strict=True):
        if not _is_gram(own.value):
            raise CheckpointError(
                f"{path}: the gram of {_module(tensor)!r} is no Gram matrix, expected a symmetric "
                "one without negative values on its diagonal"
            )
    solved = matrix.regmean.merge(
        models,
        [own.value for own in measured],
        scale=tensor["scale"],
        factors=_shares(tensor),
        transposed=transposed or (tensor["transposed"] and tensor.shape[0] == inputs),
    )
    if solved.ridged:
        yield Remark(
            "regmean: the data leaves the weights undetermined: a ridge was added, which takes the "
            "average there; measure on more data or lower scale"
        )
    merged: torch.Tensor = solved.weight
    return merged


def _is_gram(matrix: torch.Tensor) -> bool:
    diagonal = matrix.diagonal()
    tolerance = 1e-3 * float(diagonal.abs().max())
    return not bool((diagonal < 0).any()) and float((matrix - matrix.T).abs().max()) <= tolerance


def _regmean_working(tensor: Tensor) -> int:
    """All models' weights, and the equations of the layer's inputs."""
    return (tensor.models + 3) * tensor.size + 8 * max(tensor.shape) ** 2


def _module(tensor: Tensor) -> str:
    return tensor.name.removesuffix(".weight")


_STATISTICS = Parameter(
    "statistics",
    "path",
    "The model's file of statistics, as fusekit calibrate writes it.",
    per_model=True,
)
_WEIGHT = Parameter(
    "weight", "float", "The model's weight.", default=1.0, per_model=True, minimum=0.0
)


def _exclude(default: str, text: str) -> Parameter:
    return Parameter("exclude", "text", f"Regular expression; {text}", default=default)


METHODS = (
    Method(
        name="fisher",
        title="Fisher merging",
        summary="Average every parameter by how much each model's data depends on it.",
        formula="y = sum_i w_i F_i x_i / sum_i w_i F_i  elementwise (w_i over |F_i| if normalised)",
        references=(
            "Matena, Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, "
            "arXiv 2111.09832",
        ),
        parameters=(
            _WEIGHT,
            _STATISTICS,
            Parameter(
                "normalize",
                "bool",
                "Divide every model's Fisher by its norm over the whole model.",
                default=True,
            ),
            Parameter("floor", "float", "Smallest Fisher information.", default=1e-6, minimum=0.0),
            Parameter(
                "floor_rule",
                "choice",
                "target: only the first model's Fisher is raised to the floor, so its values stay "
                "where nobody has information; all: everyone's; add: the floor is added to all.",
                default="target",
                choices=("target", "all", "add"),
            ),
            _exclude("", "tensors whose name it is found in are averaged by the weights alone."),
        ),
        rule=_average,
        base=None,
        integers="first",
        whole=lambda tensor: not is_excluded(tensor),
        matrix=_fisher,
        others="average by the weights",
        statistic=lambda tensor: f"{tensor.name}/fisher",
        statistic_shapes=lambda tensor: (tensor.shape,),
        passes="one, whole tensors, with the statistics",
        use_when="Models whose data can be run once through them: fusekit calibrate MODEL DATA.",
        caveats=(
            "A convex combination cannot amplify: expect somewhat more than averaging. The floor "
            "must fit the Fishers' scale, about 1e-10 in large language models."
        ),
    ),
    Method(
        name="regmean",
        title="RegMean",
        summary="Merge linear layers by least squares on each model's own layer inputs.",
        formula="W^T = (sum_k w_k G_k)^-1 sum_k w_k G_k W_k^T,  G_k the Gram matrix of the inputs",
        references=(
            "Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, "
            "ICLR 2023, arXiv 2212.09849",
        ),
        parameters=(
            _WEIGHT,
            _STATISTICS,
            Parameter(
                "scale",
                "float",
                "Of the Gram matrices' off-diagonal entries; lower is more stable.",
                default=0.9,
                minimum=0.0,
                maximum=1.0,
            ),
            Parameter(
                "transposed",
                "bool",
                "Whether square weights hold inputs first (GPT-2's Conv1D); others are recognised.",
                default=False,
            ),
            _exclude(f"{EMBEDDINGS}|{HEADS}", "matrices whose name it is found in are averaged."),
        ),
        rule=_average,
        base=None,
        integers="first",
        whole=lambda tensor: is_matrix(tensor) and tensor.name.endswith(".weight"),
        matrix=_regmean,
        working=_regmean_working,
        others="average by the weights",
        statistic=lambda tensor: f"{_module(tensor)}/gram",
        statistic_shapes=lambda tensor: tuple(
            (inputs, inputs) for inputs in dict.fromkeys(reversed(tensor.shape))
        ),
        passes="one, whole matrices, with the statistics",
        use_when="A few hundred unlabelled inputs per model are at hand, or their Gram matrices.",
        caveats="Inputs that no data reached are averaged. Set scale near 0.6 for text models.",
    ),
)
