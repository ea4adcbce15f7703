"""Which models a method gets, in its order, for every slice of the output, before any is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusekit.errors import RecipeError
from fusekit.methods.base import Method
from fusekit.recipe.parameters import Level, read_level
from fusekit.recipe.schema import ModelEntry, Recipe, SourceEntry
from fusekit.recipe.schema import Slice as SliceEntry


@dataclass(frozen=True)
class Operand:
    """One model of a slice: its place in the recipe, its layers (None: all), its own parameters."""

    model: str
    place: str
    layers: tuple[int, int] | None
    own: Level


@dataclass(frozen=True)
class Slice:
    """Output layers and their operands; `levels` are the parameters for all of them, the most
    specific first."""

    models: tuple[Operand, ...]
    base: Operand | None
    levels: tuple[Level, ...]

    @property
    def operands(self) -> tuple[Operand, ...]:
        """All operands, the base first."""
        return self.models if self.base is None else (self.base, *self.models)

    @property
    def length(self) -> int | None:
        """How many layers, or None for as many as the models have."""
        layers = self.operands[0].layers
        return None if layers is None else layers[1] - layers[0]


@dataclass(frozen=True)
class Section:
    """The slices of one module (None: of the whole model)."""

    module: str | None
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Operands:
    """Everything a recipe puts into a merge. `reference` is the model whose config is carried
    over, `notes` what the user should be told."""

    sections: tuple[Section, ...]
    reference: str
    notes: tuple[str, ...] = ()

    def models(self) -> list[str]:
        """Every model, the reference first."""
        used = [
            operand.model
            for section in self.sections
            for part in section.slices
            for operand in part.operands
        ]
        return list(dict.fromkeys([self.reference, *used]))


def choose_operands(recipe: Recipe, method: Method) -> Operands:
    """The method's operands among the recipe's models.

    Raises:
        RecipeError: models or parameters that the method cannot take.
    """
    notes: list[str] = []
    top = read_level(recipe.parameters, method, "parameters", notes)
    reader = _Reader(recipe, method, notes)
    if recipe.modules is None:
        sections = [reader.section(None, "", recipe.models, recipe.slices, (top,))]
    else:
        sections = []
        for name, module in recipe.modules.items():
            place = f"modules.{name}."
            level = read_level(module.parameters, method, f"{place}parameters", notes)
            sections.append(reader.section(name, place, module.models, module.slices, (level, top)))
    first = sections[0].slices[0].operands[0].model
    return Operands(tuple(sections), recipe.base_model or first, tuple(notes))


class _Reader:
    """Turns the entries of a recipe into operands."""

    def __init__(self, recipe: Recipe, method: Method, notes: list[str]) -> None:
        self._recipe = recipe
        self._method = method
        self._notes = notes

    def section(
        self,
        module: str | None,
        place: str,
        models: Sequence[ModelEntry] | None,
        slices: Sequence[SliceEntry] | None,
        levels: tuple[Level, ...],
    ) -> Section:
        if slices is None:
            assert models is not None
            parts = [self._slice(f"{place}models", models, self._recipe.base_model, levels)]
        else:
            parts = [
                self._slice(
                    f"{place}slices[{i}].sources",
                    part.sources,
                    part.base_model or self._recipe.base_model,
                    (
                        read_level(
                            part.parameters,
                            self._method,
                            f"{place}slices[{i}].parameters",
                            self._notes,
                        ),
                        *levels,
                    ),
                )
                for i, part in enumerate(slices)
            ]
        return Section(module, tuple(parts))

    def _slice(
        self,
        place: str,
        entries: Sequence[ModelEntry],
        base: str | None,
        levels: tuple[Level, ...],
    ) -> Slice:
        method = self._method
        listed = [self._operand(entry, f"{place}[{i}]") for i, entry in enumerate(entries)]
        same = [operand for operand in listed if operand.model == base]
        others = [operand for operand in listed if operand.model != base]
        if base is None:
            if method.base_required:
                raise RecipeError(
                    f"base_model is missing: {method.name} merges differences from it"
                )
        elif method.base == "first" and method.max_models != 1:
            listed = [*(same or [self._added(base, listed)]), *others]
        elif method.base == "origin":
            if method.max_models is not None and same:
                raise RecipeError(
                    f"base_model: {base!r} is also one of the models {method.name} is to merge; "
                    "its task vector is zero"
                )
            if others or not (same and isinstance(entries[0], SourceEntry)):
                self._check_count(place, len(others))
            return Slice(tuple(others), same[0] if same else self._added(base, listed), levels)
        elif method.base is None and not same and not isinstance(entries[0], SourceEntry):
            listed.append(self._added(base, listed))
            self._notes.append(
                f"base_model {base} is merged as one more model: {method.name} has no base"
            )
        self._check_count(place, len(listed))
        return Slice(tuple(listed), None, levels)

    def _added(self, base: str, listed: Sequence[Operand]) -> Operand:
        """A base that is not among the sources gives the layers that the first source gives."""
        return Operand(base, "base_model", listed[0].layers if listed else None, {})

    def _operand(self, entry: ModelEntry, place: str) -> Operand:
        own = read_level(entry.parameters, self._method, f"{place}.parameters", self._notes)
        idle = [name for name in own if not self._method.parameter(name).per_model]  # type: ignore[union-attr]
        if idle:
            self._notes.append(
                f"{place}.parameters.{idle[0]} has no effect: {self._method.name} looks it up once "
                "for all models; move it to the parameters of the slice or of the recipe"
            )
        layers = entry.layer_range if isinstance(entry, SourceEntry) else None
        return Operand(entry.model, place, layers, own)

    def _check_count(self, place: str, count: int) -> None:
        method = self._method
        most, few = method.max_models, method.min_models
        if few <= count and (most is None or count <= most):
            return
        expected = (
            f"at least {few}" if most is None else f"{few}" if few == most else f"{few} to {most}"
        )
        besides = " besides its base" if method.base == "origin" else ""
        more = f"; for more see {method.for_more}" if method.for_more and count > few else ""
        raise RecipeError(
            f"{place}: {method.name} merges {expected} model(s){besides}, found {count}{more}"
        )
