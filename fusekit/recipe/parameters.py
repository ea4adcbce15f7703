"""Per-tensor values of parameters: scalars, gradients over depth, lists of filters, at any level.

A setting is a scalar, a list of numbers (a gradient over the layers) or a list of
`{filter, value}` entries, of which the first whose filter is missing, `*` or part of the tensor's
name applies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fusekit.errors import RecipeError, did_you_mean
from fusekit.methods.base import Parameter


class HasParameters(Protocol):
    """What settings are read for: a method of merging models or adapters."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> tuple[Parameter, ...]: ...

    def parameter(self, name: str) -> Parameter | None: ...


@dataclass(frozen=True)
class Setting:
    """One parameter as written at one level of the recipe, checked."""

    entries: tuple[tuple[str | None, Any], ...]
    """(filter or None, scalar or tuple of numbers), in the order written."""

    def value(self, tensor: str, position: float) -> tuple[bool, Any]:
        """(whether an entry applies, its value) for a tensor at a relative depth in [0, 1]."""
        for pattern, value in self.entries:
            if pattern is None or pattern in tensor:
                return True, gradient(value, position) if isinstance(value, tuple) else value
        return False, None

    @property
    def filters(self) -> list[str]:
        """The texts that tensors are told apart by."""
        return [pattern for pattern, _ in self.entries if pattern is not None]

    @property
    def is_constant(self) -> bool:
        """Whether the value is the same for every tensor."""
        pattern, value = self.entries[0]
        return pattern is None and not isinstance(value, tuple)


def gradient(values: Sequence[float], position: float) -> float:
    """Linear interpolation of evenly spaced values at a position in [0, 1]."""
    s = position * (len(values) - 1)
    i = int(s)
    j = min(i + 1, len(values) - 1)
    return (1.0 - (s - i)) * values[i] + (s - i) * values[j]


Level = Mapping[str, Setting]
"""The settings written at one place, by parameter name."""


_IDLE = frozenset({"int8_mask"})
"""Parameters that old recipes carry to every method and that change no result anywhere."""


def read_level(
    raw: Mapping[str, Any], method: HasParameters, place: str, notes: list[str] | None = None
) -> dict[str, Setting]:
    """Check everything written at one place against the method's parameters.

    Args:
        raw: the `parameters` mapping as written.
        method: whose parameters they must be.
        place: where in the recipe it stands, for messages (`models[1].parameters`).
        notes: gets what the user should be told of parameters that have no effect.

    Raises:
        RecipeError: an unknown parameter (naming the nearest one), a wrong type, a value out of
        range.
    """
    level = {}
    for name, value in raw.items():
        parameter = method.parameter(name)
        if parameter is None and name in _IDLE:
            if notes is not None:
                notes.append(f"{place}.{name} has no effect: {method.name} has no masks")
            continue
        if parameter is None:
            known = [parameter.name for parameter in method.parameters]
            raise RecipeError(
                f"{place}.{name}: {method.name} has no parameter {name!r}"
                f"{did_you_mean(name, known)}"
            )
        level[name] = _read_setting(value, parameter, f"{place}.{name}")
    return level


def _read_setting(raw: Any, parameter: Parameter, place: str) -> Setting:
    if isinstance(raw, list) and any(isinstance(item, Mapping) for item in raw):
        entries = []
        for i, item in enumerate(raw):
            here = f"{place}[{i}]"
            if not isinstance(item, Mapping) or "value" not in item:
                raise RecipeError(f"{here}: found {item!r}, expected {{filter, value}}")
            extra = set(item) - {"filter", "value"}
            if extra:
                key = sorted(map(str, extra))[0]
                raise RecipeError(
                    f"{here}: unknown key {key!r}{did_you_mean(key, ['filter', 'value'])}"
                )
            pattern = item.get("filter")
            if pattern is not None and not isinstance(pattern, str):
                raise RecipeError(f"{here}.filter: found {pattern!r}, expected a text")
            value = _read_value(item["value"], parameter, f"{here}.value")
            entries.append((None if pattern in {None, "*"} else pattern, value))
        return Setting(tuple(entries))
    return Setting(((None, _read_value(raw, parameter, place)),))


def _read_value(raw: Any, parameter: Parameter, place: str) -> Any:
    if isinstance(raw, Mapping):
        raise RecipeError(
            f"{place}: found {dict(raw)!r}, expected {parameter.describe_range()} or a list of "
            "{filter, value}"
        )
    if isinstance(raw, list):
        if parameter.kind != "float" or not raw:
            expected = parameter.describe_range()
            raise RecipeError(f"{place}: found {raw!r}, expected {expected}")
        return tuple(_check(item, parameter, f"{place}[{i}]") for i, item in enumerate(raw))
    return _check(raw, parameter, place)


def _check(raw: Any, parameter: Parameter, place: str) -> Any:
    switch = parameter.kind == "bool" or True in parameter.aliases
    if switch and type(raw) in {int, float} and raw in {0, 1}:
        raw = bool(raw)
    try:
        return parameter.check(raw)
    except ValueError as error:
        raise RecipeError(f"{place}: found {raw!r}, expected {error}") from None


class Lookup:
    """Parameters of one method, looked up through levels from the most to the least specific.

    Only what can differ from tensor to tensor is looked up for every tensor.
    """

    def __init__(self, method: HasParameters, levels: Sequence[Level], *, per_model: bool) -> None:
        """`levels` from the most to the least specific; `per_model` chooses the parameters."""
        self._method = method
        self._fixed: dict[str, Any] = {}
        self._varying: list[tuple[Parameter, list[Setting]]] = []
        for parameter in method.parameters:
            if parameter.per_model != per_model:
                continue
            settings = [level[parameter.name] for level in levels if parameter.name in level]
            if settings and settings[0].is_constant:
                self._fixed[parameter.name] = settings[0].value("", 0.0)[1]
            elif settings or parameter.required:
                self._fixed[parameter.name] = None  # holds the place in the method's order
                self._varying.append((parameter, settings))
            else:
                self._fixed[parameter.name] = parameter.default

    @property
    def is_constant(self) -> bool:
        """Whether `values` is the same for all tensors."""
        return not self._varying

    def values(self, *, tensor: str, position: float, whose: str) -> dict[str, Any]:
        """The values of all parameters for one tensor.

        Raises:
            RecipeError: a required parameter that no level gives.
        """
        values = dict(self._fixed)
        for parameter, settings in self._varying:
            values[parameter.name] = self._value(parameter, settings, tensor, position, whose)
        return values

    def _value(
        self,
        parameter: Parameter,
        settings: Sequence[Setting],
        tensor: str,
        position: float,
        whose: str,
    ) -> Any:
        for setting in settings:
            found, value = setting.value(tensor, position)
            if found:
                return value
        if parameter.required:
            raise RecipeError(
                f"{whose}: {self._method.name} needs the parameter {parameter.name!r} "
                f"({parameter.describe_range()}) and nothing gives it for tensor {tensor!r}"
            )
        return parameter.default
