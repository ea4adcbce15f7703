"""What methods that merge whole matrices share: which tensors those are, and what the rest gets."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from fusekit.errors import RecipeError
from fusekit.methods.base import (
    Combine,
    Copy,
    MatrixRule,
    Parameter,
    Remark,
    Summary,
    Tensor,
)
from fusekit.methods.combines import linear

if TYPE_CHECKING:
    import torch

EMBEDDINGS = r"(^|[._])(embed\w*|emb|wte|wpe)([._]|$)|(^|\.)shared\.weight$"
"""Names of embedding tables, which are matrices of rows rather than maps."""

HEADS = r"(^|[._])lm_head([._]|$)"
"""Names of output heads over the vocabulary."""

OTHERS = "mean of the task vectors (excluded ones as `excluded` says)"


def exclude(default: str) -> tuple[Parameter, Parameter]:
    """The parameters that say which matrices are not merged as such, and what they get instead."""
    return (
        Parameter(
            "exclude",
            "text",
            "Regular expression; tensors whose name it is found in are not treated as matrices.",
            default=default,
        ),
        Parameter(
            "excluded",
            "choice",
            "What excluded tensors become: the mean of the task vectors, or the base's own values.",
            default="mean",
            choices=("mean", "base"),
        ),
    )


def scale(text: str = "Scale of the merged task vector.") -> Parameter:
    """lambda, which multiplies what is added to the base."""
    return Parameter("lambda", "float", text, default=1.0)


def is_excluded(tensor: Tensor) -> bool:
    """Whether the recipe's `exclude` is found in the tensor's name."""
    found: bool = _pattern(tensor["exclude"]).search(tensor.name) is not None
    return found


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor has two axes, some elements, and is not excluded."""
    return len(tensor.shape) == 2 and tensor.size > 0 and not is_excluded(tensor)


@functools.lru_cache(maxsize=64)
def _pattern(text: str) -> re.Pattern[str]:
    if not text:
        return re.compile(r"(?!)")
    try:
        return re.compile(text)
    except re.error as error:
        raise RecipeError(
            f"exclude: found {text!r}, expected a regular expression: {error}"
        ) from None


def mean_of_the_rest(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    """base + lambda * mean_i (x_i - base), or the base where excluded tensors are to keep it."""
    yield from ()
    if is_excluded(tensor) and tensor["excluded"] == "base":
        return Copy(-1)
    share = tensor["lambda"] / tensor.models
    return linear([share] * tensor.models, 1.0 - tensor["lambda"])


def scaled(
    merge: Callable[[Tensor, list[torch.Tensor]], Generator[Remark, None, torch.Tensor]],
) -> MatrixRule:
    """A matrix rule from a merge of task vectors: its result times lambda."""

    def rule(
        tensor: Tensor, rows: list[torch.Tensor], measured: list[Any]
    ) -> Generator[Remark, None, torch.Tensor]:
        merged = yield from merge(tensor, rows)
        return merged if tensor["lambda"] == 1.0 else merged * tensor["lambda"]

    return rule
