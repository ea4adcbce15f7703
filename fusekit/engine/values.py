"""Parameter values of every output tensor, computed once where they are the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusekit.engine.matching import Matched
from fusekit.engine.operands import Slice
from fusekit.methods.base import Method
from fusekit.recipe.parameters import Lookup

Values = dict[str, Any]


@dataclass
class _SliceLookup:
    """The lookups of one slice, and its values where they do not depend on the tensor."""

    shared: Lookup
    models: list[Lookup]
    places: list[str]
    constant: bool
    once: tuple[Values, tuple[Values, ...]] | None = None


class ParameterValues:
    """Looks up parameters from the most to the least specific level.

    Per-model parameters go by the tensor's name in the model: source, slice, module, recipe. All
    others go by the output's name: slice, module, recipe. The method's default comes last.
    """

    def __init__(self, method: Method, folder: Path | None = None) -> None:
        """Paths are looked up from the working directory, then from `folder`, the recipe's."""
        self._method = method
        self._folder = folder
        self._paths = [p.name for p in method.parameters if p.kind == "path"]
        self._slices: dict[int, _SliceLookup] = {}

    def of(self, matched: Matched) -> tuple[Values, tuple[Values, ...]]:
        """Values of the global parameters, and those of each model that holds the tensor.

        Raises:
            RecipeError: a required parameter that no level gives.
        """
        lookup = self._slices.get(id(matched.part))
        if lookup is None:
            lookup = self._slices[id(matched.part)] = self._lookup(matched.part)
        complete = len(matched.kept) == len(lookup.models)
        if lookup.constant and complete and lookup.once is not None:
            return lookup.once
        shared = lookup.shared.values(
            tensor=matched.info.name,
            position=matched.position,
            whose="recipe",
        )
        each = tuple(
            self._located(
                lookup.models[i].values(
                    tensor=name, position=matched.position, whose=lookup.places[i]
                )
            )
            for i, name in zip(matched.kept, matched.names, strict=True)
        )
        if complete:
            lookup.once = shared, each
        return shared, each

    def _located(self, values: Values) -> Values:
        """Values whose paths mean the same from anywhere."""
        for name in self._paths:
            path = values.get(name)
            if path is not None and self._folder is not None and not Path(path).exists():
                values[name] = str(self._folder / path)
        return values

    def _lookup(self, part: Slice) -> _SliceLookup:
        shared = Lookup(self._method, part.levels, per_model=False)
        models = [
            Lookup(self._method, (operand.own, *part.levels), per_model=True)
            for operand in part.models
        ]
        return _SliceLookup(
            shared,
            models,
            [f"{operand.place} ({operand.model})" for operand in part.models],
            shared.is_constant and all(lookup.is_constant for lookup in models),
        )
