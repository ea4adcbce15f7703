"""The files of statistics a plan draws on: checked while planning, read while merging."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from fusekit.checkpoint.statistics import Statistics
from fusekit.engine.plan import Plan, PlannedTensor
from fusekit.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]


class Measurements:
    """Every model's statistics of the tensors that a plan merges as a whole.

    Raises:
        CheckpointError: a file cannot be read, or lacks the statistic of a module, or holds it in
            another shape.
    """

    def __init__(self, plan: Plan) -> None:
        self._files: dict[str, Statistics] = {}
        self._names: dict[str, list[str]] = {}
        self._norms: dict[str, float] = {}
        self._unreached: set[str] = set()
        try:
            for planned in _measured(plan):
                assert planned.method.statistic is not None
                self._check(plan, planned, planned.method.statistic(planned.tensor))
        except BaseException:
            self.close()
            raise

    def of(self, planned: PlannedTensor) -> list[tuple[Array, float]]:
        """By model, the statistic of a tensor and the norm of all that the merge takes of it.

        Nothing at all where some model's data did not reach the tensor.
        """
        if planned.method.statistic is None or planned.name in self._unreached:
            return []
        name = planned.method.statistic(planned.tensor)
        paths = planned.tensor.each("statistics")
        return [(self._files[path].read(name), self._norm(path)) for path in paths]

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _check(self, plan: Plan, planned: PlannedTensor, name: str) -> None:
        shapes = planned.method.statistic_shapes
        expected = None if shapes is None else shapes(planned.tensor)
        for path, ref in zip(planned.tensor.each("statistics"), planned.models, strict=True):
            if path not in self._files:
                self._files[path] = Statistics(path)
            model = plan.checkpoints[ref.source].reference
            shape = self._files[path].require(name, model, planned.name)
            if shape is None:
                self._unreached.add(planned.name)
                continue
            if expected is not None and shape not in expected:
                raise CheckpointError(
                    f"{path}: {name!r} has shape {list(shape)}, expected {_either(expected)} for "
                    f"tensor {planned.name!r} of {model}, of shape {list(planned.shape)}"
                )
            self._names.setdefault(path, []).append(name)

    def _norm(self, path: str) -> float:
        if path not in self._norms:
            self._norms[path] = self._files[path].norm(self._names[path])
        return self._norms[path]


def _measured(plan: Plan) -> Iterator[PlannedTensor]:
    """The tensors whose merge takes statistics."""
    return (p for p in plan.tensors if p.is_whole and p.method.statistic is not None)


def statistics_identities(plan: Plan) -> list[dict[str, Any]]:
    """What pins every file of statistics that a plan draws on: its path, and what it was."""
    paths = dict.fromkeys(path for p in _measured(plan) for path in p.tensor.each("statistics"))
    found = []
    for path in paths:
        with contextlib.closing(Statistics(path)) as file:
            found.append({"reference": path, **file.identity()})
    return found


def _either(shapes: Iterable[tuple[int, ...]]) -> str:
    return " or ".join(str(list(shape)) for shape in shapes)


def check_statistics(plan: Plan) -> None:
    """Refuse a plan whose statistics are missing or do not fit, from the files' headers alone.

    Raises:
        CheckpointError: as `Measurements`.
    """
    with contextlib.closing(Measurements(plan)):
        pass
