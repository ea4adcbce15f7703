"""All merging methods by name. Importing this module imports neither NumPy nor Numba."""

from __future__ import annotations

import functools
import importlib

from fusekit.errors import RecipeError, did_you_mean
from fusekit.methods.base import Method

_FAMILIES = (
    "linear",
    "spherical",
    "task_vectors",
    "breadcrumbs",
    "della",
    "sce",
    "pipeline",
    "model_stock",
    "arcee_fusion",
    "nearswap",
    "ram",
    "passthrough",
    "pcb",
    "widen",
    "varm",
    "soups",
    "emr",
    "tall_masks",
    "localize",
    "singular",
    "least_squares",
    "measured",
    "continual",
)


@functools.cache
def available() -> dict[str, Method]:
    """Every method by the name recipes use.

    >>> available()["slerp"].max_models
    2
    """
    methods: dict[str, Method] = {}
    for family in _FAMILIES:
        for method in importlib.import_module(f"fusekit.methods.{family}").METHODS:
            methods[method.name] = method
    return methods


@functools.cache
def _stages() -> dict[str, Method]:
    """Steps that the engine takes on the way to a method's result."""
    stages = importlib.import_module("fusekit.methods.continual").STAGES
    return {method.name: method for method in stages}


def find(name: str) -> Method:
    """The method of that name; `RecipeError` names the nearest one otherwise."""
    method = available().get(name) or _stages().get(name)
    if method is None:
        raise RecipeError(f"unknown merge_method {name!r}{did_you_mean(name, available())}")
    return method
