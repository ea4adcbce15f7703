"""The recipe as users write it: a superset of mergekit's configuration language."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    field_validator,
)

from fusekit.checkpoint.dtypes import DTYPES, dtype_named
from fusekit.errors import FusekitError, RecipeError, did_you_mean

_FLOATS = [dtype.torch_name for dtype in DTYPES.values() if dtype.is_float]


_EXPECTED = {
    "dict_type": "a mapping",
    "invalid_key": "a text",
    "list_type": "a list",
    "model_type": "a mapping with a model and its parameters",
    "string_type": "a text",
    "too_short": "at least one",
}
"""Pydantic's kinds of problems in our own words, where its words are about Python."""

Parameters = Annotated[
    dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)
]
"""Parameters as written; an empty `parameters:` in YAML is none."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelEntry(_Strict):
    """One model to merge and its own parameters."""

    model: str
    parameters: Parameters = Field(default_factory=dict)


def _number_or(*words: str) -> PlainValidator:
    def check(value: Any) -> Any:
        if value in words or (
            isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
        ):
            return value
        raise ValueError(" or ".join(["a number", *map(repr, words)]))

    return PlainValidator(check)


class LayerValue(_Strict):
    """A scale for the tensors whose name contains `filter`, or for all."""

    filter: str | None = None
    value: Annotated[Any, _number_or("alpha", "last")]


class LayerScaling(_Strict):
    """How a merge's update is scaled by depth; goes with any method that has a base.

    `outside` gives the scale of tensors outside the blocks: one for all, or `{filter, value}`
    entries of which the first that fits applies.
    """

    method: Literal["lines"] = "lines"
    alpha: Annotated[Any, _number_or("auto")] = "auto"
    beta: Annotated[Any, _number_or()]
    outside: list[LayerValue] = Field(default_factory=list)
    norm: Literal["l1", "l2"] = "l1"
    stack: str | None = None
    stacks: Literal["separate", "concatenate"] = "separate"

    @field_validator("outside", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [{"value": value}]


class Recipe(_Strict):
    """What to merge and how.

    >>> Recipe.model_validate({"merge_method": "linear", "models": [{"model": "a"}]}).seed
    0
    """

    merge_method: str
    models: list[ModelEntry] = Field(min_length=1)
    base_model: str | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    granularity: Literal["tensor", "module", "layer", "model"] = "tensor"
    layer_scaling: LayerScaling | None = None
    seed: int = Field(default=0, ge=0, lt=2**64, strict=True)
    folder: Path | None = Field(default=None, exclude=True)

    @field_validator("dtype", "out_dtype")
    @classmethod
    def _known_float(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            dtype = dtype_named(value)
        except FusekitError:
            dtype = None
        if dtype is None or not dtype.is_float:
            raise ValueError(f"a floating-point type{did_you_mean(value, _FLOATS)}")
        return dtype.torch_name


_KEYS = [name for name in Recipe.model_fields if name != "folder"]


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> Recipe:
    """A checked recipe from a YAML file, a mapping or a recipe.

    Relative model paths in a file are also looked up from the file's folder.

    Raises:
        RecipeError: not YAML, unknown or misspelt keys, wrong types, values out of range.

    >>> load_recipe({"merge_method": "linear", "models": [{"model": "a"}]}).models[0].model
    'a'
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return _validated(dict(source), "recipe", None)
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"{path}: the recipe cannot be read: {reason}") from None
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        reason = getattr(error, "problem", None) or "nested too deeply"
        raise RecipeError(f"{path}{line}: not valid YAML: {reason}") from None
    if not isinstance(content, dict):
        found = type(content).__name__
        raise RecipeError(f"{path}: expected a mapping with merge_method and models, found {found}")
    return _validated(content, str(path), path.absolute().parent)


def _validated(content: dict[str, Any], label: str, folder: Path | None) -> Recipe:
    if "folder" in content:
        raise RecipeError(f"{label}: unknown key 'folder'{did_you_mean('folder', _KEYS)}")
    try:
        return Recipe.model_validate({**content, "folder": folder})
    except ValidationError as error:
        raise RecipeError(f"{label}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    """The first validation problem as a sentence with its place in the recipe."""
    problem = error.errors()[0]
    place = _place(problem["loc"])
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        nested = {"layer_scaling": LayerScaling.model_fields}
        known: Iterable[str] = nested.get(str(problem["loc"][0]), ModelEntry.model_fields)
        if len(problem["loc"]) == 1:
            known = _KEYS
        return f"unknown key {place!r}{did_you_mean(key, known)}"
    if problem["type"] == "missing":
        return f"{place} is missing"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = _EXPECTED.get(problem["type"], message)
    if problem["type"] == "model_type" and "layer_scaling" in problem["loc"]:
        expected = "a mapping" + (" with alpha and beta" if len(problem["loc"]) == 1 else "")
    return f"{place}: found {problem['input']!r}, expected {expected}"


def _place(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        if part == "[key]":  # the part before is the key, not an index
            break
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
