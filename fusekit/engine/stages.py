"""Documents that feed others: results that are models of a recipe, planned first, then made."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusekit.checkpoint.folder import Checkpoint
from fusekit.checkpoint.source import TensorInfo, TensorSource
from fusekit.engine.companions import companions
from fusekit.engine.manifest import MANIFEST, input_identities
from fusekit.engine.measurements import statistics_identities
from fusekit.engine.plan import Plan
from fusekit.errors import CheckpointError


class PlannedSource(TensorSource):
    """The tensors that a plan will make: names, types and shapes, but no elements yet."""

    def __init__(self, label: str, plan: Plan) -> None:
        self.label = label
        self._layout = plan.layout
        self._tensors = {
            planned.name: TensorInfo(planned.name, planned.dtype, planned.shape)
            for planned in plan.tensors
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read_into(self, name: str, start: int, stop: int, out: memoryview) -> None:
        raise CheckpointError(f"{self.label}: tensor {name!r} is planned and not made yet")

    def where(self, name: str) -> str:
        return f"{self.label}/{self._layout.shard_of[name].file_name}"


def planned_checkpoint(name: str, plan: Plan) -> Checkpoint:
    """A stage before it is made: its tensors, and the small files it will have."""
    temporary = tempfile.TemporaryDirectory(prefix="fusekit-")
    folder = Path(temporary.name)
    for file, content in companions(plan).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return Checkpoint(name, PlannedSource(name, plan), folder, temporary)


def stages_folder(out: Path) -> Path:
    """Where the results that others are made from lie; they are kept for the next run."""
    return out.with_name(out.name + ".stages")


def is_made(folder: Path, plan: Plan) -> bool:
    """Whether a folder holds the finished result of this very plan."""
    try:
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    expected = {
        "recipe": dict(plan.recipe),
        "inputs": input_identities(plan),
        "statistics": statistics_identities(plan),
    }
    if {key: content.get(key) for key in expected} != json.loads(json.dumps(expected)):
        return False
    files = {p.name: plan.layout.shard_of[p.name].file_name for p in plan.tensors}
    return {name: entry["file"] for name, entry in content["tensors"].items()} == files
