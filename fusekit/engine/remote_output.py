"""Merging to a URL: into a working folder on this machine, then uploaded from there."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from fusekit.checkpoint.upload import RemoteFolder

if TYPE_CHECKING:
    from fusekit.engine.run import MergeReport

_RECORD = "uploaded.json"


def working_folder(url: str) -> Path:
    """Where the output for a URL is made: the same place every time, so that it can be resumed.

    `$XDG_CACHE_HOME/fusekit/outputs/<hash of the URL>`, by default under `~/.cache`.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fusekit" / "outputs" / xxhash.xxh3_64_hexdigest(url.rstrip("/").encode())


def merge_to_url(
    merge_into: Callable[[Path], MergeReport],
    url: str,
    *,
    work: Path | None = None,
    resume: bool = True,
    overwrite: bool = False,
    on_upload: Callable[[str], None] | None = None,
) -> MergeReport:
    """Make an output in a working folder, upload it, and remove the working folder.

    Args:
        merge_into: makes the output in the folder it is given, or keeps what is finished there.
        url: the folder to create, on any file system of fsspec that can be written to.
        work: the working folder; default `working_folder(url)`. Its content is removed at the end.
        resume: continue an interrupted merge or upload; False starts over.
        overwrite: replace an output at `url`, once the merge is complete on this machine.
        on_upload: called with the name of every file before it is sent.

    Raises:
        FusekitError: something is at `url`, or it cannot be written to. What was merged stays in
            the working folder and is not merged again.
    """
    remote = RemoteFolder(url)
    folder = (work or working_folder(url)) / "model"
    record = folder.with_name(_RECORD)
    if not resume:
        _remove(folder, record)
    remote.check(overwrite=overwrite, begun=record.exists())
    report = merge_into(folder)
    remote.upload(folder, record, on_upload or (lambda _name: None))
    _remove(folder, record)
    return dataclasses.replace(report, out=remote.url)


def _remove(folder: Path, record: Path) -> None:
    """Only what a merge makes: the working folder may be one of the user's."""
    record.unlink(missing_ok=True)
    for suffix in ("", ".partial", ".stages", ".replaced"):
        shutil.rmtree(folder.with_name(folder.name + suffix), ignore_errors=True)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()
