"""The recipe as users write it: a superset of mergekit's configuration language."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)

from fusekit.checkpoint.dtypes import DTYPES, dtype_named
from fusekit.checkpoint.references import parse_reference, reference_text
from fusekit.errors import FusekitError, RecipeError, did_you_mean
from fusekit.recipe.chat_templates import check_chat_template
from fusekit.recipe.documents import making_order, read_documents

_FLOATS = [dtype.torch_name for dtype in DTYPES.values() if dtype.is_float]


_EXPECTED = {
    "dict_type": "a mapping",
    "invalid_key": "a text",
    "list_type": "a list",
    "model_type": "a mapping with a model and its parameters",
    "tuple_type": "[start, end)",
    "string_type": "a text",
    "string_pattern_mismatch": "letters, digits, '-', '_' and '.', a letter or digit first",
    "too_short": "at least one",
}
"""Pydantic's kinds of problems in our own words, where its words are about Python."""

Parameters = Annotated[
    dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)
]
"""Parameters as written; an empty `parameters:` in YAML is none."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _reference(value: Any) -> Any:
    text = reference_text(value, "model")
    if isinstance(text, str) and not text.strip():
        raise ValueError("a path or the id of a model on the hub")
    return text


Reference = Annotated[str, BeforeValidator(_reference)]
"""A model reference; the long form becomes the text form."""


class ModelEntry(_Strict):
    """One model to merge and its own parameters."""

    model: Reference
    parameters: Parameters = Field(default_factory=dict)


class SourceEntry(ModelEntry):
    """Layers `[start, end)` of one model, and parameters for them."""

    layer_range: Annotated[Any, PlainValidator(lambda value: _layer_range(value))]


def _layer_range(value: Any) -> tuple[int, int]:
    if (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(type(number) is int for number in value)
        and 0 <= value[0] < value[1]
    ):
        return (value[0], value[1])
    raise ValueError("[start, end) with 0 <= start < end")


class Slice(_Strict):
    """Output layers made from equally many layers of each source."""

    sources: list[SourceEntry] = Field(min_length=1)
    base_model: Reference | None = None
    parameters: Parameters = Field(default_factory=dict)

    @field_validator("sources")
    @classmethod
    def _equally_long(cls, sources: list[SourceEntry]) -> list[SourceEntry]:
        ranges = [source.layer_range for source in sources]
        if len({end - start for start, end in ranges}) > 1:
            raise ValueError(f"ranges of equal length, not {', '.join(map(str, ranges))}")
        return sources


class Module(_Strict):
    """One tower of a model: its models or slices, and parameters for it."""

    models: list[ModelEntry] | None = Field(default=None, min_length=1)
    slices: list[Slice] | None = Field(default=None, min_length=1)
    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_of(self) -> Module:
        if (self.models is None) == (self.slices is None):
            raise ValueError("either models or slices")
        return self


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
    """What to merge and how; exactly one of `models`, `slices` and `modules` says of what.

    `stages` are the other documents of the file that this one draws on, each after those it needs;
    `notes` what the user should be told about what is written.

    >>> Recipe.model_validate({"merge_method": "linear", "models": [{"model": "a"}]}).seed
    0
    """

    merge_method: str
    models: list[ModelEntry] | None = Field(default=None, min_length=1)
    slices: list[Slice] | None = Field(default=None, min_length=1)
    modules: dict[str, Module] | None = Field(default=None, min_length=1)
    base_model: Reference | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    missing: Literal["error", "skip-model", "base", "copy"] = "error"
    tokenizer_source: Reference | None = None
    tokenizer: dict[str, Any] | None = None
    chat_template: str | None = None
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    granularity: Literal["tensor", "module", "layer", "model"] = "tensor"
    layer_scaling: LayerScaling | None = None
    seed: int = Field(default=0, ge=0, lt=2**64, strict=True)
    folder: Path | None = Field(default=None, exclude=True)
    stages: tuple[Recipe, ...] = Field(default=(), exclude=True)
    notes: tuple[str, ...] = Field(default=(), exclude=True)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        given = [key for key in ("models", "slices", "modules") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: found beside {given[0]}, expected only one of them")
        if not given:
            raise ValueError("models is missing (or slices, or modules)")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("tokenizer: found beside tokenizer_source, expected only one of them")
        return self

    @field_validator("chat_template")
    @classmethod
    def _known_template(cls, value: str | None) -> str | None:
        if value is not None:
            check_chat_template(value)
        return value

    def references(self) -> list[str]:
        """Every model the recipe draws on, the base first, else in the order written."""
        found = [self.base_model]
        modules = list((self.modules or {}).values())
        for models in (self.models, *(module.models for module in modules)):
            found += [entry.model for entry in models or []]
        for slices in (self.slices, *(module.slices for module in modules)):
            for part in slices or []:
                found += [part.base_model, *(source.model for source in part.sources)]
        return [reference for reference in dict.fromkeys(found) if reference is not None]

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


_KEYS = [name for name in Recipe.model_fields if name not in {"folder", "stages", "notes"}]


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> Recipe:
    """A checked recipe from a YAML file, a mapping or a recipe.

    Relative model paths in a file are also looked up from the file's folder. In a file of several
    documents, a `name` makes a document's result a model for the others.

    Raises:
        RecipeError: not YAML, unknown or misspelt keys, wrong types, values out of range, documents
            that need each other.

    >>> load_recipe({"merge_method": "linear", "models": [{"model": "a"}]}).models[0].model
    'a'
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return _validated(_plain(source), "recipe", None)
    path = Path(source).expanduser()
    folder = path.absolute().parent
    return _joined([_validated(each, str(path), folder) for each in read_documents(path)], path)


def _plain(value: Any) -> Any:
    """Paths, tuples, NumPy scalars and arrays as what they would be in a file."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.tolist() if hasattr(value, "tolist") else value


def _joined(recipes: list[Recipe], path: Path) -> Recipe:
    """The final one of several documents, with those that it is made from."""
    if len(recipes) == 1:
        return recipes[0]
    named: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe.name is not None:
            if recipe.name in named:
                raise RecipeError(f"{path}: two documents have the name {recipe.name!r}")
            named[recipe.name] = recipe
    final = [recipe for recipe in recipes if recipe.name is None]
    needs = {name: _needed(recipe, named) for name, recipe in named.items()}
    if not final:
        used = set().union(*needs.values())
        final = [recipe for name, recipe in named.items() if name not in used]
        making_order(needs, str(path))
    if len(final) != 1:
        raise RecipeError(
            f"{path}: {len(final)} of {len(recipes)} documents are final results, expected one: "
            "give every other document a name"
        )
    order = making_order({**needs, "": _needed(final[0], named)}, str(path))
    stages = [named[name] for name in order if name and named[name] is not final[0]]
    return final[0].model_copy(update={"stages": tuple(stages)})


def _needed(recipe: Recipe, named: Mapping[str, Recipe]) -> set[str]:
    """Names of the documents whose results a recipe draws on."""
    return {parse_reference(text).model for text in recipe.references()} & set(named)


def _validated(content: dict[str, Any], label: str, folder: Path | None) -> Recipe:
    for key in ("folder", "stages", "notes"):
        if key in content:
            raise RecipeError(f"{label}: unknown key {key!r}{did_you_mean(key, _KEYS)}")
    try:
        return Recipe.model_validate({**content, "folder": folder, "notes": _notes(content)})
    except ValidationError as error:
        raise RecipeError(f"{label}: {_first_problem(error)}") from None
    except RecipeError as error:
        raise RecipeError(f"{label}: {error}") from None


def _notes(content: Any) -> tuple[str, ...]:
    """What is understood in a recipe but changes nothing."""
    if not _holds_key(content, "override_architecture"):
        return ()
    return (
        "override_architecture has no effect: layers are read off the tensors' names, whatever "
        "architecture the config names",
    )


def _holds_key(content: Any, key: str) -> bool:
    """Whether a mapping anywhere in a document has the key; aliases may make it deep or a cycle."""
    waiting, seen = [content], set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Mapping):
            if key in part:
                return True
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)
    return False


def _first_problem(error: ValidationError) -> str:
    """The first validation problem as a sentence with its place in the recipe.

    What is missing may only be misspelt, so unknown keys come first.
    """
    problems = error.errors()
    unknown = [each for each in problems if each["type"] == "extra_forbidden"]
    problem = (unknown if unknown and problems[0]["type"] == "missing" else problems)[0]
    place = _place(problem["loc"])
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        if key in {"model", "layer_range"} and "slices" in problem["loc"]:
            return f"unknown key {place!r}: it stands in an entry of the slice's sources"
        return f"unknown key {place!r}{did_you_mean(key, _keys_at(problem['loc'][:-1]))}"
    if problem["type"] == "missing":
        return f"{place} is missing"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if not place:
        return message
    expected = _EXPECTED.get(problem["type"], message)
    if problem["type"] == "model_type" and problem["loc"][0] in _MAPPINGS:
        expected = _MAPPINGS[problem["loc"][0]] if len(problem["loc"]) < 3 else "a mapping"
    return f"{place}: found {problem['input']!r}, expected {expected}"


_MAPPINGS: dict[int | str, str] = {
    "layer_scaling": "a mapping with alpha and beta",
    "modules": "a mapping with models or slices",
    "slices": "a mapping with sources",
}
"""What stands at or right below these keys, where it is not a model."""

_NESTED: dict[str, type[BaseModel]] = {
    "models": ModelEntry,
    "slices": Slice,
    "sources": SourceEntry,
    "layer_scaling": LayerScaling,
    "outside": LayerValue,
}


def _keys_at(location: tuple[int | str, ...]) -> Iterable[str]:
    """The keys that may stand at a place of the recipe."""
    if not location:
        return _KEYS
    if location[0] == "modules" and len(location) == 2:
        return Module.model_fields
    last = next(part for part in reversed(location) if isinstance(part, str))
    return _NESTED[last].model_fields if last in _NESTED else ()


def _place(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        if part == "[key]":  # the part before is the key, not an index
            break
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
