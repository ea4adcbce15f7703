"""Opening a model reference: what the user wrote -> tensors, config and the files beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusekit.checkpoint.layout import SIDE_FILE
from fusekit.checkpoint.safetensors import (
    INDEX_SUFFIX,
    SafetensorsFile,
    ShardedSource,
    open_sharded,
)
from fusekit.checkpoint.source import TensorSource
from fusekit.errors import CheckpointError

COMPANION_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab"})
"""Small files that make a folder of weights a usable model: config, tokenizer, templates, code."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened model: its tensors and, where it is a folder, its config and companion files."""

    reference: str
    source: TensorSource
    folder: Path | None = None

    def config(self) -> dict[str, Any] | None:
        """The parsed config.json, or None where there is none."""
        if self.folder is None or not (self.folder / "config.json").is_file():
            return None
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: expected a JSON object")
        return config

    def companions(self) -> list[Path]:
        """Files to carry over into a merged folder, weights and their indexes left out."""
        if self.folder is None:
            return []
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.is_file()
            and path.suffix in COMPANION_SUFFIXES
            and not path.name.endswith(".index.json")
            and path.name != "manifest.json"
        )


def open_checkpoint(reference: str, relative_to: Path | None = None) -> Checkpoint:
    """Open a folder or a `.safetensors` file.

    Args:
        reference: a path; a relative one is looked up from the working directory, then from
            `relative_to`.
        relative_to: the folder of the recipe that holds the reference.

    Raises:
        CheckpointError: nothing there, no weights in it, or a malformed file.
    """
    path = _existing(reference, relative_to)
    if path.is_file():
        if path.name.endswith(INDEX_SUFFIX):
            return Checkpoint(reference, open_sharded(path), path.parent)
        return Checkpoint(reference, SafetensorsFile(path))
    return Checkpoint(reference, _open_folder(path), path)


def _existing(reference: str, relative_to: Path | None) -> Path:
    candidates = [Path(reference).expanduser()]
    if relative_to is not None:
        candidates.append(relative_to / candidates[0])
    for candidate in candidates:
        if candidate.exists():
            return candidate
    looked = " or ".join(str(candidate.absolute()) for candidate in dict.fromkeys(candidates))
    raise CheckpointError(f"model {reference!r}: no such file or folder (looked at {looked})")


def _open_folder(folder: Path) -> TensorSource:
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if indexes:
        preferred = folder / f"model{INDEX_SUFFIX}"
        return open_sharded(preferred if preferred in indexes else indexes[0])
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != SIDE_FILE)
    if not files:
        raise CheckpointError(
            f"{folder}: no weights found, expected *.safetensors or *{INDEX_SUFFIX}"
        )
    if len(files) == 1:
        return SafetensorsFile(files[0])
    return ShardedSource(str(folder), [SafetensorsFile(file) for file in files])
