"""Folders of parameters that adapters share: a JSON file of facts and one of tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fusekit.checkpoint.writer import new_folder
from fusekit.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Made = TypeVar("Made")


class SharedFormat:
    """How one kind of shared parameters lies in a folder.

    Args:
        kind: what messages call it.
        mark: the value of `format` in the file of facts.
        facts_name, weights_name: the two files.
    """

    def __init__(self, kind: str, mark: str, facts_name: str, weights_name: str) -> None:
        self.kind = kind
        self._mark = mark
        self._facts_name = facts_name
        self._weights_name = weights_name

    def save(
        self, folder: str | Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> None:
        """Write a new folder, which appears only when it is complete.

        Raises:
            FusekitError: there is something already, or another process writes it.
        """
        from safetensors.torch import save_file

        with new_folder(Path(folder)) as work:
            save_file(dict(tensors), work / self._weights_name)
            content = json.dumps({"format": self._mark, **facts}, indent=2)
            (work / self._facts_name).write_text(content + "\n", encoding="utf-8")
            for path in work.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def load(self, folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Facts and tensors.

        Raises:
            CheckpointError: not a folder of this kind, or a file that cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(folder)
        try:
            facts = json.loads((path / self._facts_name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: not {self.kind}: {error}") from None
        found = facts.get("format") if isinstance(facts, dict) else facts
        if found != self._mark:
            raise CheckpointError(
                f"{path / self._facts_name}: format is {found!r:.60}, expected {self._mark!r}"
            )
        try:
            return facts, load_file(path / self._weights_name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path / self._weights_name}: cannot be read: {error}") from None

    def made(self, folder: str | Path, make: Callable[[], Made]) -> Made:
        """What a function makes of the facts; facts that are missing or of another type are named.

        Raises:
            CheckpointError: the facts are damaged.
        """
        try:
            return make()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"{Path(folder) / self._facts_name}: is damaged: {reason}"
            ) from None
