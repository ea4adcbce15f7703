"""What a partial adapter folder already holds, so that a merge that was killed can go on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusekit.checkpoint.json_lines import read_entries
from fusekit.checkpoint.layout import JOURNAL

SYNC_SECONDS = 5.0
"""How often finished modules are forced to the disk and noted; quicker merges note nothing."""


class AdapterJournal:
    """A line for every finished module, added once its bytes have reached the disk.

    The first line says what is being written: everything its bytes depend on.

    Args:
        folder: the partial folder.
        subject: what is being written.
    """

    def __init__(self, folder: Path, subject: Mapping[str, Any]) -> None:
        self._path = folder / JOURNAL
        self._subject = json.loads(json.dumps(subject))
        self._fresh: list[Mapping[str, Any]] = []
        self._synced = time.monotonic()

    def entries(self) -> list[dict[str, Any]]:
        """The finished modules of this very subject; none if the folder holds something else."""
        parsed = read_entries(self._path)
        return parsed[1:] if parsed[:1] == [self._subject] else []

    def begin(self, entries: list[dict[str, Any]]) -> None:
        """Start a journal anew with what is finished; without that, only when there is more."""
        self._path.unlink(missing_ok=True)
        if entries:
            self._append([self._subject, *entries])

    def note(self, entry: Mapping[str, Any]) -> bool:
        """Note a module; True if it is time to bring the data to the disk and `sync`."""
        self._fresh.append(entry)
        return time.monotonic() - self._synced >= SYNC_SECONDS

    def sync(self) -> None:
        """Say of the noted modules that they are on the disk."""
        self._append(self._fresh if self._path.is_file() else [self._subject, *self._fresh])
        self._fresh = []
        self._synced = time.monotonic()

    @property
    def is_begun(self) -> bool:
        """Whether there is anything to go on with."""
        return self._path.is_file()

    def discard(self) -> None:
        """Remove the journal from a folder that is complete."""
        self._path.unlink(missing_ok=True)

    def _append(self, entries: list[Mapping[str, Any]]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
            file.flush()
            os.fsync(file.fileno())
