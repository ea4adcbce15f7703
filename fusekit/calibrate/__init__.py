"""Measuring models on data: inputs of layers, Fisher information, layer-wise regression.

Names load on first use; all but the readers of data need the [torch] extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fusekit.errors import MissingExtraError

if TYPE_CHECKING:
    from fusekit.calibrate.data import read_documents, read_token_ids, token_batches
    from fusekit.calibrate.hooks import capture
    from fusekit.calibrate.information import diagonal_fisher
    from fusekit.calibrate.regression import regmean_plus_plus
    from fusekit.calibrate.run import measure, measure_folder

_HOMES = {
    "capture": "hooks",
    "diagonal_fisher": "information",
    "measure": "run",
    "measure_folder": "run",
    "read_documents": "data",
    "read_token_ids": "data",
    "regmean_plus_plus": "regression",
    "token_batches": "data",
}

__all__ = [
    "capture",
    "diagonal_fisher",
    "measure",
    "measure_folder",
    "read_documents",
    "read_token_ids",
    "regmean_plus_plus",
    "token_batches",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fusekit.calibrate' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"fusekit.calibrate.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("measuring models", "torch") from None
