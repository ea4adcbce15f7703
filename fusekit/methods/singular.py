"""Merging by singular directions: task singular vectors and isotropic spectra."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from fusekit import kernels
from fusekit.methods import matrix
from fusekit.methods.base import Combine, Copy, Method, Parameter, Remark, Summary, Tensor
from fusekit.methods.combines import linear
from fusekit.methods.wholes import (
    EMBEDDINGS,
    HEADS,
    OTHERS,
    exclude,
    is_excluded,
    is_matrix,
    mean_of_the_rest,
    scale,
    scaled,
)

if TYPE_CHECKING:
    import torch

    from fusekit.methods.matrix.iso import Isotropic


def _tsv(tensor: Tensor, deltas: list[torch.Tensor]) -> Generator[Remark, None, torch.Tensor]:
    yield from ()
    weights = tensor.each("weight")
    merged: torch.Tensor = matrix.tsv.merge(
        [d * w if w != 1.0 else d for d, w in zip(deltas, weights, strict=True)],
        tensor["rank_fraction"],
    )
    return merged


def _tsv_rest(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    yield from ()
    if is_excluded(tensor) and tensor["excluded"] == "base":
        return Copy(-1)
    weights = [tensor["lambda"] * w / tensor.models for w in tensor.each("weight")]
    return linear(weights, 1.0 - sum(weights))


def _iso_c(tensor: Tensor, deltas: list[torch.Tensor]) -> Generator[Remark, None, torch.Tensor]:
    return (yield from _flattened(tensor, matrix.iso.common(deltas, tensor["rank"])))


def _iso_cts(tensor: Tensor, deltas: list[torch.Tensor]) -> Generator[Remark, None, torch.Tensor]:
    fraction = tensor["common_space_fraction"]
    merged = matrix.iso.common_and_specific(deltas, fraction, tensor["rank"])
    return (yield from _flattened(tensor, merged))


def _flattened(tensor: Tensor, merged: Isotropic) -> Generator[Remark, None, torch.Tensor]:
    if tensor["rank"] == "auto" and merged.is_cut:
        yield Remark(
            "isotropic merging of updates of low rank: directions without strength were left out; "
            "rank: full gives them the common strength too"
        )
    return merged.update


def _knots(tensor: Tensor, deltas: list[torch.Tensor]) -> Generator[Remark, None, torch.Tensor]:
    yield from ()
    update: torch.Tensor = matrix.knots.merge(
        deltas,
        tensor["rule"],
        tensor["density"],
        tensor.thresholds,
        basis=tensor["basis"],
        drop=_dare(tensor),
    )
    return update


def _knots_coordinates(tensor: Tensor, deltas: list[torch.Tensor]) -> list[torch.Tensor]:
    aligned = matrix.knots.align(deltas, tensor["basis"], _dare(tensor))
    found: list[torch.Tensor] = aligned.coordinates
    return found


def _dare(tensor: Tensor) -> Callable[[int, torch.Tensor], torch.Tensor] | None:
    """The random drop of a task's coordinates, decided by the seed, task, tensor and position."""
    density = tensor["dare_density"]
    if density == 1.0:
        return None

    def drop(task: int, coordinates: torch.Tensor) -> torch.Tensor:
        import numpy as np
        import torch

        kept = np.full(coordinates.numel(), 1.0 / density, np.float64)
        kernels.random.drop(kept, density, np.uint64(tensor.keys[task]), 0)
        survivors = torch.from_numpy(kept).to(coordinates).reshape(coordinates.shape)
        return coordinates * survivors

    return drop


_RANK = Parameter(
    "rank",
    "choice",
    "With full every direction gets the common strength, as published; with numerical only those "
    "above rounding noise; auto is numerical where the updates are of low rank, as LoRAs' are.",
    default="auto",
    choices=("auto", "full", "numerical"),
)

_MARCZAK = (
    "Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific "
    "Subspaces, ICML 2025, arXiv 2502.04959"
)
_CAVEAT = (
    "The best lambda grows with width and number of tasks and is worth a search on validation data "
    "(0 to 3); updates of very low rank need lambda below 1. A single model does not come back "
    "unchanged."
)


def _method(name: str, title: str, merge: Any, **about: Any) -> Method:
    return Method(
        name=name,
        title=title,
        base="origin",
        base_required=True,
        integers="first",
        whole=is_matrix,
        matrix=scaled(merge),
        others=OTHERS,
        **{"passes": "one, whole matrices", **about},
    )


METHODS = (
    _method(
        "tsv",
        "Task singular vectors (TSV-Merge)",
        _tsv,
        rule=_tsv_rest,
        summary="Keep every task's leading singular directions, made orthogonal across tasks.",
        formula="y = base + lambda polar([U_1..U_T]) diag(S_1..S_T) polar([V_1..V_T])^T,  "
        "U_i S_i V_i^T = the top min(m, n) / T of x_i - base",
        references=(
            "Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, "
            "CVPR 2025, arXiv 2412.00081",
        ),
        parameters=(
            Parameter(
                "weight",
                "float",
                "Multiplier of the model's task vector before the decomposition.",
                default=1.0,
                per_model=True,
            ),
            scale(),
            Parameter(
                "rank_fraction",
                "float",
                "Share of a matrix's directions that every task keeps; left out, 1 / number of "
                "models.",
                default=None,
                above=0.0,
                maximum=1.0,
            ),
            *exclude("text_projection"),
        ),
        use_when="Many fine-tuned models of one wide base, without data.",
        caveats=(
            "lambda 1 suits wide vision transformers; on small models it is worth a search. "
            "N copies of one model give its update cut to 1/N of the rank. Where there are more "
            "tasks than rows, each keeps one direction."
        ),
    ),
    _method(
        "iso_c",
        "Isotropic merging, common subspace (Iso-C)",
        _iso_c,
        rule=mean_of_the_rest,
        summary="Give all singular directions of the summed task vectors the same strength.",
        formula="y = base + lambda mean(S) U V^T,  U S V^T = sum_i (x_i - base)",
        references=(_MARCZAK,),
        parameters=(scale(), _RANK, *exclude("text_projection")),
        use_when="Many tasks, of which a few would dominate the sum; without data.",
        caveats=_CAVEAT,
    ),
    _method(
        "iso_cts",
        "Isotropic merging, common and task-specific subspaces (Iso-CTS)",
        _iso_cts,
        rule=mean_of_the_rest,
        summary="As iso_c, with part of the directions kept for what is specific to each task.",
        formula="y = base + lambda mean(S) polar(U) polar(V)^T,  columns: each task's residual "
        "directions, then the leading ones of the sum",
        references=(_MARCZAK,),
        parameters=(
            scale(),
            Parameter(
                "common_space_fraction",
                "float",
                "Share of the directions that stays common; 1 is iso_c.",
                default=0.8,
                minimum=0.0,
                maximum=1.0,
            ),
            _RANK,
            *exclude("text_projection"),
        ),
        use_when="As iso_c, with many (10 and more) tasks.",
        caveats=_CAVEAT,
    ),
    _method(
        "knots",
        "KnOTS",
        _knots,
        rule=mean_of_the_rest,
        summary="Express all task vectors in one left basis, then merge their coordinates by TIES.",
        formula="y = base + lambda U merge_i(U^T d_i),  U S V^T = [d_1 .. d_T],  d_i = x_i - base",
        references=(
            "Stoica et al., Model merging with SVD to tie the Knots, ICLR 2025, arXiv 2410.19735",
        ),
        parameters=(
            scale(),
            Parameter(
                "rule",
                "choice",
                "ties elects signs and averages what agrees, ties_sum adds it up; sum adds all up "
                "(task arithmetic), mean averages what is kept.",
                default="ties",
                choices=("ties", "ties_sum", "sum", "mean"),
            ),
            Parameter(
                "basis",
                "choice",
                "The side whose common basis is taken.",
                default="output",
                choices=("output", "input"),
            ),
            Parameter(
                "dare_density",
                "float",
                "Share of the coordinates that survives a random drop first, rescaled (DARE).",
                default=1.0,
                above=0.0,
                maximum=1.0,
            ),
            Parameter(
                "density",
                "float",
                "Share of the coordinates kept, the largest first, of the tensor or as granularity "
                "says.",
                default=1.0,
                above=0.0,
                maximum=1.0,
            ),
            *exclude(f"{EMBEDDINGS}|{HEADS}"),
        ),
        use_when="Related tasks whose updates lie in poorly aligned subspaces, such as LoRAs'.",
        survey=_knots_coordinates,
        passes="one, whole matrices; three if density below 1 is taken over more than a tensor",
        caveats=(
            "The authors' thresholds are those of granularity: model. Where kept coordinates "
            "cancel out exactly, the majority sign is the tensor's. For LoRA adapters, `fusekit "
            "adapter` merges from the factors alone."
        ),
    ),
)
