"""OPCM: one fine-tuned model after another into a running update that protects earlier ones.

The update N of every tensor grows by itself, `N <- N + T'`; one number at the end, the mean norm of
the task vectors over the norm of N, scales it for the whole model. The engine therefore merges in
two steps: the update (`opcm.start` or `opcm.continue`, kept in float32), then base + scale * N.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fusekit.errors import RecipeError
from fusekit.methods import matrix
from fusekit.methods.base import Combine, Method, Parameter, Remark, Summary, Tensor
from fusekit.methods.combines import linear
from fusekit.methods.wholes import EMBEDDINGS, is_matrix

if TYPE_CHECKING:
    import torch


def _add(tensor: Tensor, update: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    grown: torch.Tensor = matrix.opcm.add(
        update,
        delta,
        alpha=tensor["alpha"],
        zero_diagonal=tensor["zero_diagonal"],
        protect=tensor["protect"],
    )
    return grown


def _alone(
    tensor: Tensor, rows: list[torch.Tensor], measured: list[Any]
) -> Generator[Remark, None, torch.Tensor]:
    yield from ()
    raise RecipeError(_ALONE)


def _alone_rest(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    yield from ()
    raise RecipeError(_ALONE)


_ALONE = "opcm keeps a running update beside its result: merge it by a recipe of its own"
"""Said where it is one step among others (a document that another one draws on)."""


def _start(
    tensor: Tensor, rows: list[torch.Tensor], measured: list[Any]
) -> Generator[Remark, None, torch.Tensor]:
    """The update after all models; the first row is the base."""
    yield from ()
    base, first, *others = rows
    update = first - base
    for row in others:
        update = _add(tensor, update, row - base)
    return update


def _start_rest(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    yield from ()
    return linear([float(1 - tensor.models), *[1.0] * (tensor.models - 1)])


def _continue(
    tensor: Tensor, rows: list[torch.Tensor], measured: list[Any]
) -> Generator[Remark, None, torch.Tensor]:
    """The update after one more model; rows are the update so far, the base, the model."""
    yield from ()
    update, base, model = rows
    return _add(tensor, update, model - base)


def _continue_rest(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    yield from ()
    return linear([1.0, -1.0, 1.0])


_OPCM = Method(
    name="opcm",
    title="Continual merging by orthogonal projection (OPCM)",
    summary="Add models one after another, each without what earlier ones already occupy.",
    formula="y = base + N mean|x_i - base| / |N|,  N_t = N_(t-1) + project(x_t - base; N_(t-1))",
    references=(
        "Tang et al., Merging Models on the Fly Without Retraining: A Sequential Approach to "
        "Scalable Continual Model Merging, NeurIPS 2025, arXiv 2501.09522",
    ),
    parameters=(
        Parameter(
            "alpha",
            "float",
            "Share of the singular values' sum that is protected: more keeps old tasks better and "
            "learns new ones less.",
            default=0.5,
            minimum=0.0,
            maximum=1.0,
        ),
        Parameter(
            "zero_diagonal",
            "bool",
            "Also remove what lies on the pairs of singular directions themselves.",
            default=True,
        ),
        Parameter(
            "protect",
            "choice",
            "inner: between dominant directions; all: whatever touches one.",
            default="inner",
            choices=("inner", "all"),
        ),
        Parameter(
            "exclude",
            "text",
            "Regular expression; matrices whose name it is found in are added without projection.",
            default=EMBEDDINGS,
        ),
        Parameter(
            "order",
            "choice",
            "Models arrive as they are given, or shuffled by the recipe's seed.",
            default="given",
            choices=("given", "shuffled"),
        ),
    ),
    rule=_alone_rest,
    base="origin",
    base_required=True,
    integers="first",
    whole=is_matrix,
    matrix=_alone,
    others="sum of the task vectors, scaled with the rest",
    passes="one over whole matrices, one for the norms, one over the result",
    continual=True,
    use_when="Models that arrive one by one: fusekit merge --into adds one with constant memory.",
    caveats=(
        "The order of models matters; report a spread over orders. Methods that see all models at "
        "once score higher. The update is kept in <out>.continual, in float32."
    ),
)


def _finish(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    """base + scale * N; the models are the base and the update."""
    yield from ()
    return linear([1.0, tensor["scale"]])


_HISTORY = Parameter("history", "text", "What has been merged so far, as JSON.")


def _stage(name: str, **about: Any) -> Method:
    options = {"parameters": (*_OPCM.parameters, _HISTORY), **about}
    return replace(_OPCM, name=name, base=None, base_required=False, continual=False, **options)


METHODS = (_OPCM,)

STAGES = (
    _stage("opcm.start", min_models=2, rule=_start_rest, matrix=_start),
    _stage("opcm.continue", min_models=3, max_models=3, rule=_continue_rest, matrix=_continue),
    _stage(
        "opcm.finish",
        min_models=2,
        max_models=2,
        rule=_finish,
        whole=None,
        matrix=None,
        parameters=(Parameter("scale", "float", "Of the update."), _HISTORY),
    ),
)
"""Steps of the engine, found by name but not offered to users."""
