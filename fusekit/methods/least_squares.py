"""WUDI-Merging and OptMerge: the merged update that interferes least with every task vector."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusekit.methods import matrix
from fusekit.methods.base import Method, Parameter, Remark, Tensor
from fusekit.methods.wholes import (
    EMBEDDINGS,
    HEADS,
    OTHERS,
    exclude,
    is_matrix,
    mean_of_the_rest,
    scale,
    scaled,
)

if TYPE_CHECKING:
    import torch


def _wudi(tensor: Tensor, deltas: list[torch.Tensor]) -> Generator[Remark, None, torch.Tensor]:
    yield from ()
    common = {"norm_power": tensor["norm_power"], "init": tensor["init"]}
    if tensor["solver"] == "adam":
        merged: torch.Tensor = matrix.quadratic.wudi_adam(
            deltas, steps=tensor["steps"], lr=tensor["lr"], **common
        )
        return merged
    adaptive = tensor["adaptive"] if tensor["solver"] == "adaptive" else None
    spectral = matrix.quadratic.Spectral(
        filter="none" if adaptive else tensor["solver"],
        time=tensor["time"],
        strength=tensor["strength"],
        iterations=tensor["iterations"],
        ratio=tensor["ratio"],
        adaptive=adaptive,
    )
    merged = matrix.quadratic.wudi_closed(deltas, spectral, **common)
    return merged


def _optmerge(tensor: Tensor, deltas: list[torch.Tensor]) -> Generator[Remark, None, torch.Tensor]:
    yield from ()
    merged: torch.Tensor = matrix.optmerge.merge(
        deltas,
        tensor["variant"],
        ratio=tensor["rank_ratio"],
        steps=tensor["steps"],
        lr=tensor["lr"],
    )
    return merged


def _working(tensor: Tensor) -> int:
    """Two copies of all task vectors, and the eigenproblem of the smaller side of their stack."""
    rows, columns = tensor.shape
    side = min(tensor.models * rows, columns)
    return (2 * tensor.models + 4) * tensor.size + rows**2 + (7 * side + 2 * columns) * side


def _method(name: str, title: str, merge: Any, **about: Any) -> Method:
    return Method(
        name=name,
        title=title,
        rule=mean_of_the_rest,
        base="origin",
        base_required=True,
        integers="first",
        whole=is_matrix,
        matrix=scaled(merge),
        others=OTHERS,
        working=_working,
        passes="one, whole matrices",
        **about,
    )


@dataclass(frozen=True)
class _RankRule(Parameter):
    """A choice, one of which ends in a share of the user's."""

    def check(self, value: Any) -> Any:
        if not (isinstance(value, str) and value.startswith(_CUMULATIVE)):
            return super().check(value)
        try:
            share = float(value.removeprefix(_CUMULATIVE))
        except ValueError:
            share = math.nan
        if not 0.0 < share <= 1.0:
            raise ValueError(f"{_CUMULATIVE} and a share in (0, 1], such as {_CUMULATIVE}0.95")
        return value


_CUMULATIVE = "cumvar_"

_CHENG = (
    "Cheng et al., Whoever Started the Interference Should End It: Guiding Data-Free Model Merging "
    "via Task Vectors, ICML 2025, arXiv 2503.08099"
)

METHODS = (
    _method(
        "wudi",
        "WUDI-Merging",
        _wudi,
        summary="Least squares on the task vectors as their own inputs, in closed form or by Adam.",
        formula="y = base + lambda argmin_m sum_i |(m - d_i) d_i^T|^2 / |d_i|^2,  d_i = x_i - base",
        references=(_CHENG,),
        parameters=(
            scale(),
            Parameter(
                "solver",
                "choice",
                "exponential, tikhonov, landweber: spectral filters; none: the exact minimum; "
                "adaptive: as many directions as the spectrum says; adam: the published descent.",
                default="exponential",
                choices=("exponential", "tikhonov", "landweber", "none", "adaptive", "adam"),
            ),
            Parameter("time", "float", "Of the exponential filter.", default=300.0, above=0.0),
            Parameter("strength", "float", "Of the Tikhonov filter.", default=0.01, above=0.0),
            Parameter("iterations", "int", "Of the Landweber filter.", default=150, minimum=0),
            Parameter(
                "ratio",
                "float",
                "Solve for this share of the columns' directions only, the strongest.",
                default=None,
                above=0.0,
                maximum=1.0,
            ),
            _RankRule(
                "adaptive",
                "choice",
                "Rank rule of solver adaptive; cumvar_0.95 takes 95 % of the spectrum's sum.",
                default="participation_sqrt",
                choices=(
                    "participation_sqrt",
                    "participation",
                    "entropy",
                    "stable_rank",
                    "gavish_donoho",
                    f"{_CUMULATIVE}<share>",
                ),
            ),
            Parameter("steps", "int", "Of solver adam.", default=300, minimum=0),
            Parameter("lr", "float", "Of solver adam.", default=1e-5, above=0.0),
            Parameter(
                "norm_power",
                "int",
                "Tasks weigh 1 / |d_i|^power; 1 favours large task vectors.",
                default=2,
                minimum=1,
                maximum=2,
            ),
            Parameter(
                "init",
                "choice",
                "Where the solution starts, and stays where the task vectors say nothing.",
                default="sum",
                choices=("sum", "mean", "zero"),
            ),
            *exclude(f"{EMBEDDINGS}|{HEADS}"),
        ),
        use_when="Fully fine-tuned experts of one strong base, without data or tuning.",
        caveats=(
            "Fragile where experts' norms differ much. With adam, steps times lr bounds how far "
            "entries move and must fit the task vectors' size. For LoRA experts prefer init: mean "
            "or a small ratio."
        ),
    ),
    _method(
        "optmerge",
        "OptMerge",
        _optmerge,
        summary="WUDI on task vectors cut to low rank, with the published optimiser per setting.",
        formula="y = base + lambda argmin_m sum_i |(m - G_i) P_i^T|^2 / |d_i|^2,  G_i, P_i the "
        "denoised target and projector of the variant",
        references=(
            "Wei et al., Unifying Multimodal Large Language Model Capabilities and Modalities via "
            "Model Merging, ICLR 2026, arXiv 2505.19892",
            _CHENG,
        ),
        parameters=(
            scale(),
            Parameter(
                "variant",
                "choice",
                "full: fine-tuned models (Adam from the sum); lora: LoRA experts (descent from the "
                "mean); modality: experts of different modalities.",
                default="full",
                choices=("full", "lora", "modality"),
            ),
            Parameter(
                "rank_ratio",
                "float",
                "Rank kept as a share of min(m, n); left out, 1/N (1/5 for modality).",
                default=None,
                above=0.0,
                maximum=1.0,
            ),
            Parameter("steps", "int", "Of the optimiser; left out, 300.", default=None, minimum=0),
            Parameter(
                "lr", "float", "Of the optimiser; left out, as published.", default=None, above=0.0
            ),
            *exclude(f"{EMBEDDINGS}|{HEADS}"),
        ),
        use_when="Experts of one language or multimodal model, especially LoRA experts.",
        caveats=(
            "lambda was searched in 0.1 to 1.5. With variant modality, missing: copy in the recipe "
            "keeps encoders that only one model has. The published learning rates hardly move "
            "large task vectors; wudi's closed form does not depend on them."
        ),
    ),
)
