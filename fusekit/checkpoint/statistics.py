"""Files of measured statistics: what data says about a model, by module and kind.

A safetensors file whose entries are called `<module or parameter>/<kind>`, such as
`model.layers.0.mlp.up_proj/gram`, with what was measured, on how much of which data, as metadata.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fusekit.checkpoint.safetensors import SafetensorsFile
from fusekit.errors import CheckpointError

FORMAT = "fusekit-statistics/1"

Array = np.ndarray[Any, np.dtype[Any]]


class Statistics:
    """One model's measured statistics, read entry by entry.

    Raises:
        CheckpointError: not a safetensors file, or not one of statistics.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = SafetensorsFile(self.path)
        if self._file.metadata.get("format") != FORMAT:
            self._file.close()
            found = self._file.metadata.get("format")
            raise CheckpointError(
                f"{self.path}: not a file of statistics: its metadata has format {found!r}, "
                f"expected {FORMAT!r}, as fusekit calibrate writes it"
            )

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What was measured, how, and on what data."""
        return self._mapping("about")

    @functools.cached_property
    def unreached(self) -> frozenset[str]:
        """The modules or parameters that the measured model has but the data said nothing of."""
        names = self.about.get("unreached", [])
        if not isinstance(names, list):
            raise self._malformed("about", names)
        return frozenset(map(str, names))

    @property
    def names(self) -> list[str]:
        """All entries."""
        return list(self._file.tensors)

    def identity(self) -> dict[str, Any]:
        """What tells this very file from another one; its header holds the entries' norms."""
        return self._file.identity()

    def require(self, name: str, model: str, tensor: str) -> tuple[int, ...] | None:
        """The shape of an entry, None if unreached; a file that lacks it otherwise is refused."""
        if name in self._file.tensors:
            return self._file.tensors[name].shape
        owner, _, kind = name.rpartition("/")
        if owner in self.unreached and kind == self.about.get("statistic"):
            return None
        measured = sorted({entry.rpartition("/")[2] for entry in self._file.tensors})
        raise CheckpointError(
            f"{self.path}: no {kind} of {owner!r}, which merging tensor {tensor!r} of {model} "
            f"needs (the file holds {', '.join(measured) or 'nothing'} of "
            f"{len(self._file.tensors)} modules); measure it with fusekit calibrate, or exclude it"
        )

    def read(self, name: str) -> Array:
        """One entry in float32, or in float64 if it was saved in that."""
        info = self._file.tensors[name]
        if not info.dtype.is_float:
            raise CheckpointError(
                f"{self.path}: {name!r} is {info.dtype.torch_name}, expected floating-point numbers"
            )
        stored: Array = np.empty(info.shape, info.dtype.numpy)
        self._file.read_into(name, 0, info.size, stored.reshape(-1).view(np.uint8).data)
        values: Array = stored if info.dtype.name == "F64" else stored.astype(np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.path}: {name!r} holds NaN or infinite values")
        return values

    def norm(self, names: Iterable[str]) -> float:
        """The L2 norm of these entries together."""
        recorded = self._mapping("squared_norms")
        total = 0.0
        for name in names:
            square = recorded.get(name)
            if square is None:
                square = float(np.square(self.read(name), dtype=np.float64).sum())
            if not isinstance(square, (int, float)) or not 0 <= square < math.inf:
                raise self._malformed("squared_norms", square)
            total += square
        return math.sqrt(total)

    def _mapping(self, key: str) -> dict[str, Any]:
        """An entry of the metadata that holds a JSON object; empty without one."""
        text = self._file.metadata.get(key, "{}")
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._malformed(key, text)
        return found

    def _malformed(self, key: str, found: Any) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: its metadata holds {found!r:.80} under {key!r}, which fusekit calibrate "
            "does not write; measure again"
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def save_statistics(path: str | Path, entries: dict[str, Array], about: dict[str, Any]) -> None:
    """Write statistics to a file that appears only when it is complete.

    Args:
        path: the file to create or replace.
        entries: by `<module or parameter>/<kind>`.
        about: what was measured and on what; JSON types.
    """
    from safetensors.numpy import save_file

    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    squared = {
        name: float(np.square(values, dtype=np.float64).sum()) for name, values in entries.items()
    }
    metadata = {
        "format": FORMAT,
        "about": json.dumps(about),
        "squared_norms": json.dumps(squared),
    }
    save_file({name: np.ascontiguousarray(v) for name, v in entries.items()}, partial, metadata)
    partial.replace(target)
