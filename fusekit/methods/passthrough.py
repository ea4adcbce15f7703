"""Copy tensors of one source, optionally scaled."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from fusekit.methods.base import Combine, Method, Parameter, Summary, Tensor
from fusekit.methods.combines import linear


def _passthrough(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    yield from ()
    (scale,) = tensor.each("scale")
    return linear([1.0 if scale is None else scale])


METHODS = (
    Method(
        name="passthrough",
        title="Passthrough",
        summary="Copies the tensors of one source per slice, bit for bit unless scaled.",
        formula="y = scale x",
        references=(
            "Kim et al., SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective "
            "Depth Up-Scaling, 2023, arXiv 2312.15166",
        ),
        parameters=(
            Parameter(
                "scale",
                "float",
                "Factor on the tensor; left out, the bytes are copied.",
                default=None,
                per_model=True,
            ),
        ),
        rule=_passthrough,
        base="first",
        max_models=1,
        keeps_nonfinite=True,
        use_when="Stacking, dropping or reordering layers, or changing a dtype.",
        caveats="Stacked models lose some quality until they are trained further.",
    ),
)
