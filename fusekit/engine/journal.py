"""What a partial output already holds, so that a run that was killed can go on.

A line is added only after the bytes it speaks of have reached the disk. The first line says what is
being merged; a partial folder of another merge is refused with the reason.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fusekit.checkpoint.json_lines import read_entries
from fusekit.checkpoint.layout import JOURNAL as JOURNAL
from fusekit.checkpoint.layout import Shard
from fusekit.checkpoint.writer import CheckpointWriter
from fusekit.engine.checksum import checksum_of
from fusekit.engine.measurements import statistics_identities
from fusekit.engine.plan import Plan, PlannedTensor
from fusekit.errors import FusekitError


def subject(plan: Plan) -> dict[str, Any]:
    """What a journal is about: everything the output's bytes depend on."""
    from fusekit import __version__

    return {
        "fusekit": __version__,
        "recipe": dict(plan.recipe),
        "inputs": [identity for _, identity in inputs(plan)],
        "shards": [[shard.file_name, shard.nbytes] for shard in plan.layout.files],
    }


def inputs(plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    """Name and identity of all that a plan reads: models, then files of statistics."""
    models = [(source.label, source.identity()) for source in plan.sources]
    return models + [(entry["path"], entry) for entry in statistics_identities(plan)]


def finished_tensors(folder: Path, plan: Plan) -> dict[str, str]:
    """Tensor -> checksum of what a partial folder already holds of this very merge.

    Raises:
        FusekitError: the folder holds part of another merge; the message says what differs.
    """
    entries = read_entries(folder / JOURNAL)
    if len(entries) < 2:  # no tensor was finished: there is nothing to continue or to lose
        return {}
    _check_same(entries[0], subject(plan), folder)
    whole = _whole_tensors(folder, plan)
    found = [(entry.get("tensor"), entry.get("checksum")) for entry in entries[1:]]
    return {
        name: checksum
        for name, checksum in found
        if isinstance(name, str) and isinstance(checksum, str) and name in whole
    }


def damaged_tensors(
    writer: CheckpointWriter, plan: Plan, finished: Mapping[str, str], threads: int
) -> list[str]:
    """Finished tensors whose bytes in the partial folder are not those that were written."""

    def is_damaged(planned: PlannedTensor) -> bool:
        itemsize = planned.dtype.itemsize

        def read(start: int, stop: int, out: memoryview) -> None:
            writer.read(planned.name, start * itemsize, out)

        return checksum_of(planned.size, itemsize, read) != finished[planned.name]

    checked = [planned for planned in plan.tensors if planned.name in finished]
    with writer.explained(), ThreadPoolExecutor(threads) as pool:
        found = pool.map(is_damaged, checked)
        return [planned.name for planned, bad in zip(checked, found, strict=True) if bad]


def _whole_tensors(folder: Path, plan: Plan) -> set[str]:
    """Tensors in files of full length, which all files of a partial folder have from the start."""
    cut = {file.file_name for file in plan.layout.files if not _is_whole(folder, file)}
    if plan.layout.side is not None and plan.layout.side.file_name in cut:
        return set()
    return {name for name, shard in plan.layout.shard_of.items() if shard.file_name not in cut}


def _is_whole(folder: Path, shard: Shard) -> bool:
    try:
        return (folder / shard.file_name).stat().st_size == shard.nbytes
    except OSError:
        return False


def _check_same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    now = json.loads(json.dumps(now))
    names = {
        "fusekit": "another version of fusekit",
        "recipe": "another recipe",
        "shards": "another output layout (--out-shard-size)",
    }
    for key, reason in names.items():
        if before.get(key) != now[key]:
            raise FusekitError(
                f"{folder}: holds part of a merge made with {reason}; "
                "pass --no-resume to start over"
            )
    if before.get("inputs") != now["inputs"]:
        changed = next(
            (new["label"] if "label" in new else new["path"])
            for old, new in zip(
                [*before.get("inputs", []), *[None] * len(now["inputs"])],
                now["inputs"],
                strict=False,
            )
            if old != new
        )
        raise FusekitError(
            f"{folder}: the input {changed} has changed since this merge was begun; "
            "pass --no-resume to start over"
        )


class Journal:
    """Records finished tensors of a running merge."""

    def __init__(self, writer: CheckpointWriter, plan: Plan, finished: dict[str, str]) -> None:
        self._writer = writer
        self._lock = threading.Lock()
        self._fresh: dict[str, str] = {}
        self.checksums = dict(finished)
        path = writer.folder / JOURNAL
        lines = [json.dumps(subject(plan))]
        lines += [_line(name, checksum) for name, checksum in finished.items()]
        writer.add_file(JOURNAL, ("\n".join(lines) + "\n").encode())
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND)

    def finished(self, name: str, checksum: str) -> None:
        """Note a tensor whose bytes have been handed to the writer."""
        with self._lock:
            self._fresh[name] = checksum
            self.checksums[name] = checksum

    def sync(self) -> None:
        """Bring the noted tensors' bytes to the disk, then say so."""
        with self._lock:
            fresh, self._fresh = self._fresh, {}
        if fresh:
            self._writer.flush()
            text = "".join(_line(name, checksum) + "\n" for name, checksum in fresh.items())
            with self._writer.explained():
                os.write(self._fd, text.encode())
                os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def _line(name: str, checksum: str) -> str:
    return json.dumps({"tensor": name, "checksum": checksum})
