"""Putting a finished local folder at an fsspec URL, so that its completeness can be seen there.

Object stores have no rename that could make a folder appear at once. So the weights go first and
`manifest.json` last: a folder without it is not complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from fusekit.checkpoint.companions import describes_model
from fusekit.checkpoint.layout import MANIFEST
from fusekit.checkpoint.ranges import FsspecRanges, open_file_system
from fusekit.checkpoint.remote import within
from fusekit.errors import CheckpointError, FusekitError


class RemoteFolder:
    """A folder of a file system that fsspec knows, to which an output is uploaded.

    Args:
        url: `s3://bucket/model`, `gs://...`, `memory://...`.

    Raises:
        FusekitError: a file system that cannot be written to, or whose package is missing.
    """

    def __init__(self, url: str) -> None:
        scheme = url.partition("://")[0]
        if scheme in {"http", "https", "hf"}:
            raise FusekitError(
                f"{url}: {scheme} addresses are only read; expected a local folder or the URL of a "
                "file system, such as s3://bucket/model"
            )
        self.url = url.rstrip("/")
        self._fs, self._path = open_file_system(self.url)

    def check(self, *, overwrite: bool, begun: bool) -> None:
        """Refuse an address where something is, unless it is this upload's (`begun`) or goes away.

        Raises:
            FusekitError: an output, or other files, are there, or the address cannot be listed.
        """
        names = self._names()
        if MANIFEST in names and not overwrite:
            raise FusekitError(
                f"{self.url}: already exists; choose another output or pass --overwrite"
            )
        if names and not overwrite and not begun:
            raise FusekitError(
                f"{self.url}: found {min(names)!r} and no {MANIFEST}, so another model or an "
                "upload that was not finished; choose another output or pass --overwrite"
            )

    def upload(self, folder: Path, record: Path, on_file: Callable[[str], None]) -> None:
        """Copy all files, check their sizes there, and remove what they replace.

        Args:
            folder: the finished output.
            record: a file that notes what is uploaded; an interrupted upload continues after that.
            on_file: called with the name of every file before it is sent.

        Raises:
            FusekitError: a file could not be written, or has another size there.
        """
        done: dict[str, Any] = _read_json(record) or {}
        files = dict(_in_order(folder))
        finished = {
            name for name, path in files.items() if name in done and self._is_same(path, done[name])
        }
        record.write_text(json.dumps(done))
        self._clear(finished)
        for name, path in files.items():
            if name in finished:
                continue
            on_file(name)
            done[name] = self._put(path, name)
            record.write_text(json.dumps(done))

    def _names(self) -> set[str]:
        """The files directly in the folder."""
        try:
            self._fs.invalidate_cache()
            entries = self._fs.ls(self._path, detail=True)
        except FileNotFoundError:
            return set()
        except Exception as error:
            self._refuse(self.url, "listed", error)
        return {
            entry["name"].rpartition("/")[2] for entry in entries if entry.get("type") == "file"
        } - {""}

    def _clear(self, kept: set[str]) -> None:
        """Remove an earlier output, its manifest first."""
        old = {
            name for name in self._names() if name.endswith(".safetensors") or describes_model(name)
        }
        if MANIFEST in old:
            old |= self._listed_in_manifest()
        for name in sorted(old - kept, key=lambda name: (name != MANIFEST, name)):
            try:
                self._fs.rm_file(f"{self._path}/{name}")
            except FileNotFoundError:
                continue
            except Exception as error:
                self._refuse(f"{self.url}/{name}", "removed", error)

    def _listed_in_manifest(self) -> set[str]:
        try:
            tensors = json.loads(self._fs.cat_file(f"{self._path}/{MANIFEST}"))["tensors"]
            named = {str(entry["file"]) for entry in tensors.values()}
        except Exception:
            return set()  # not a manifest of fusekit: what it lists is not ours to remove
        return {name for name in named if ".." not in name and name.endswith(".safetensors")}

    def _put(self, path: Path, name: str) -> dict[str, Any]:
        try:
            self._fs.put_file(str(path), f"{self._path}/{name}")
        except Exception as error:
            self._refuse(f"{self.url}/{name}", "written", error)
        there = FsspecRanges(within(self.url, name))
        if there.size != path.stat().st_size:
            raise FusekitError(
                f"{self.url}/{name}: {there.size} bytes after the upload, expected "
                f"{path.stat().st_size}"
            )
        return {"local": _stamp(path), "remote": there.identity()}

    def _is_same(self, path: Path, noted: Any) -> bool:
        """Whether neither the local file nor its copy has changed since it was uploaded."""
        try:
            remote = FsspecRanges(noted["remote"]["url"]).identity()
        except (CheckpointError, KeyError, TypeError):
            return False
        return bool(noted == {"local": _stamp(path), "remote": remote})

    def _refuse(self, place: str, done: str, error: Exception) -> NoReturn:
        """File systems raise errors of their own libraries, so any of them ends up here."""
        hint = ""
        if isinstance(error, PermissionError) or "redential" in f"{type(error).__name__} {error}":
            scheme = self.url.partition("://")[0]
            hint = f"; set credentials that may do so, where {scheme}:// looks for them"
        raise FusekitError(
            f"{place}: cannot be {done}: {type(error).__name__}: {error}{hint}"
        ) from None


def _in_order(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a folder by name: weights, then all else, config and index, the manifest."""

    def rank(name: str) -> tuple[int, str]:
        if name == MANIFEST:
            return 3, name
        if name.endswith(("config.json", ".index.json")):
            return 2, name
        return (0 if name.endswith(".safetensors") else 1), name

    files = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    yield from ((name, files[name]) for name in sorted(files, key=rank))


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
