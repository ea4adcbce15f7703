"""Averages of fine-tunings of one start: uniform soups, and interpolation across modalities."""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Any

from fusekit.errors import RecipeError
from fusekit.methods.base import Combine, Copy, Method, Parameter, Remark, Summary, Tensor
from fusekit.methods.combines import linear
from fusekit.methods.linear import shares


def _soup(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    yield from ()
    return linear(shares(tensor, "model_soups") if tensor["normalize"] else tensor.each("weight"))


def _unival(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    yield from ()
    if tensor["skip_keys"] is not None and _pattern(tensor["skip_keys"]).search(tensor.name):
        return Copy(0)
    uniform = 1.0 / tensor.models
    weights = [uniform if weight is None else weight for weight in tensor.each("weight")]
    if abs(sum(weights) - 1.0) > 1e-6:
        yield Remark(f"unival: the weights sum to {sum(weights):g}, not to 1")
    return linear(weights)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise RecipeError(
            f"unival: skip_keys: found {text!r}, expected a regular expression: {error}"
        ) from None


METHODS = (
    Method(
        name="model_soups",
        title="Uniform model soup",
        summary="The mean of fine-tunings of one model on one task.",
        formula="y = sum_i w_i x_i / sum_i w_i,  w_i = 1",
        references=(
            "Wortsman et al., Model soups: averaging weights of multiple fine-tuned models "
            "improves accuracy without increasing inference time, ICML 2022, arXiv 2203.05482",
        ),
        parameters=(
            Parameter("weight", "float", "The ingredient's share.", default=1.0, per_model=True),
            Parameter("normalize", "bool", "Divide by the sum of the weights.", default=True),
        ),
        rule=_soup,
        base=None,
        integers="first",
        use_when="A hyperparameter sweep on one task: an ensemble's gain at one model's cost.",
        caveats=(
            "A uniform soup contains the bad ingredients too: one chosen greedily on held-out data "
            "is usually better. Models of different pre-trainings collapse. Integer buffers are "
            "the first model's; batch-norm statistics should be re-estimated afterwards "
            "(fusekit.learn.reestimate_batch_norms)."
        ),
    ),
    Method(
        name="unival",
        title="Multimodal weight interpolation (UnIVAL)",
        summary=(
            "Averages models fine-tuned on different tasks or modalities; tensors that not all of "
            "them share stay the first model's."
        ),
        formula="y = sum_i w_i x_i,  w_i = 1/n; two models: w x_1 + (1 - w) x_2",
        references=(
            "Shukor et al., Unified Model for Image, Video, Audio and Language Tasks, TMLR 2023, "
            "arXiv 2307.16184",
        ),
        parameters=(
            Parameter(
                "weight",
                "float",
                "The model's coefficient; left out, 1 / number of models. Not normalised.",
                default=None,
                per_model=True,
            ),
            Parameter(
                "skip_keys",
                "text",
                "Regular expression (or part) of tensor names that stay the first model's.",
                default=None,
            ),
        ),
        rule=_unival,
        base=None,
        integers="first",
        missing="first",
        use_when=(
            "Models of one pre-training whose fine-tunings added different modality encoders."
        ),
        caveats=(
            "Tensors that a model lacks or has in another shape are copied from the first model, "
            "and tensors only other models have are left out: put the model whose parts are to "
            "survive first. Coefficients that do not sum to 1 rescale the model. Models of "
            "different pre-trainings collapse."
        ),
    ),
)
