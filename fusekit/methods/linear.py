"""Weighted average of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

from fusekit.errors import RecipeError
from fusekit.methods.base import Combine, Method, Parameter, Summary, Tensor
from fusekit.methods.combines import linear

_ROUNDING = 1e-12
"""Sums of weights this much smaller than the weights themselves are 0."""


def _linear(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    yield from ()
    return linear(shares(tensor, "linear") if tensor["normalize"] else tensor.each("weight"))


def shares(tensor: Tensor, method: str, option: str | None = "normalize") -> list[float]:
    """The models' weights divided by their sum.

    Args:
        option: the parameter that leaves the weights as they are, for the message.

    Raises:
        RecipeError: they sum to 0, up to the rounding of decimal fractions.
    """
    weights = tensor.each("weight")
    total = math.fsum(weights)
    if abs(total) <= _ROUNDING * math.fsum(map(abs, weights)):
        instead = "" if option is None else f"set {option}: false or "
        raise RecipeError(
            f"{method}: the weights of tensor {tensor.name!r} sum to 0 and cannot be normalised; "
            f"{instead}change a weight"
        )
    return [weight / total for weight in weights]


METHODS = (
    Method(
        name="linear",
        title="Linear merge",
        summary="Weighted mean of the models, tensor by tensor.",
        formula="y = sum_i w_i x_i / sum_i w_i",
        references=(
            "Wortsman et al., Model soups: averaging weights of multiple fine-tuned models "
            "improves accuracy without increasing inference time, ICML 2022, arXiv 2203.05482",
        ),
        parameters=(
            Parameter("weight", "float", "The model's weight; may be negative.", per_model=True),
            Parameter("normalize", "bool", "Divide by the sum of the weights.", default=True),
        ),
        rule=_linear,
        base=None,
        use_when="Models fine-tuned from the same start on the same task, or as a baseline.",
        caveats=(
            "Models that do not share an initialisation are not linearly connected: "
            "their average usually collapses."
        ),
    ),
)
