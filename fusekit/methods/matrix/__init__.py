"""Matrix-space mathematics on torch tensors: no files, no devices chosen, nothing of the engine.

Functions take float32 tensors on any device, compute in float64 where cancellation matters, and
return float32 on the same device. Submodules load on first use: importing this package does not
import torch, and using it without torch names the extra that brings it.
"""

from __future__ import annotations

import importlib
from typing import Any

from fusekit.errors import MissingExtraError

_SUBMODULES = (
    "fisher",
    "iso",
    "knots",
    "linalg",
    "opcm",
    "optmerge",
    "quadratic",
    "regmean",
    "tsv",
)


def __getattr__(name: str) -> Any:
    if name not in _SUBMODULES:
        raise AttributeError(f"module 'fusekit.methods.matrix' has no attribute {name!r}")
    try:
        return importlib.import_module(f"fusekit.methods.matrix.{name}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("merging in matrix space", "torch") from None
