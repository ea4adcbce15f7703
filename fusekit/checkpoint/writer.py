"""Writing a checkpoint folder so that it is either complete or visibly not there.

Files grow in `<target>.partial` beside the target, which one process at a time holds. When every
byte is flushed the folder is renamed into place; until then nothing carries the target's name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fusekit.checkpoint.layout import MANIFEST, Layout, Shard
from fusekit.errors import FusekitError

_MARKS = (MANIFEST, "adapter_config.json")
"""What shows a folder to be an output: of a merge, or an adapter."""


def partial_folder(target: Path) -> Path:
    """Where an unfinished output lives."""
    return target.with_name(target.name + ".partial")


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that exists or cannot be created, before any work.

    What may be overwritten is what a manifest, or an adapter's config, shows to be an output.
    """
    if target.exists() and not target.is_dir():
        raise FusekitError(f"{target}: is a file, expected a folder or nothing")
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise FusekitError(
                f"{target}: already exists; choose another output or pass --overwrite"
            )
        if not _is_output(target):
            raise FusekitError(
                f"{target}: holds no {MANIFEST}, so it is no output to overwrite; remove it "
                "yourself or choose another output"
            )
    existing = existing_parent(target)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise FusekitError(f"{existing}: not a writable folder, {target} cannot be created")


def _is_output(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _MARKS)


def check_file(path: Path) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold."""
    if path.is_dir():
        raise FusekitError(f"{path}: is a folder, expected a file")
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise FusekitError(f"{folder}: not a writable folder, {path} cannot be created")


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path that is already there."""
    return next(parent for parent in path.absolute().parents if parent.exists())


class PartialFolder:
    """Where an unfinished output grows: `<target>.partial`, held by one process at a time.

    Raises:
        FusekitError: another process holds it, the target exists (or with `overwrite` is no
            output), or the folder cannot be created.
    """

    def __init__(self, target: Path, *, overwrite: bool = False) -> None:
        self.target = target
        self.path = partial_folder(target)
        self.overwrite = overwrite
        with self.explained():
            self._fd = self._claimed()
        try:
            check_target(target, overwrite)  # again: it may have been finished by the last holder
        except BaseException:
            self.close()
            raise

    def _claimed(self) -> int:
        """The locked folder's descriptor; the system gives the lock back when the process ends."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise FusekitError(
                    f"{self.path}: another process is writing this output; wait until it is done, "
                    "or choose another output"
                ) from None
            except OSError:  # a file system that has no locks
                return fd
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), self.path.stat()):
                    return fd
            os.close(fd)  # renamed or removed by the last holder

    def clear(self) -> None:
        """Remove what an earlier run has left."""
        for entry in self.path.iterdir():
            _remove(entry)

    @property
    def is_released(self) -> bool:
        """Whether the output is in place or has been given up."""
        return self._fd < 0

    def close(self) -> None:
        """Let go of the folder, and remove it if nothing was written."""
        if not self.is_released:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            self._release()

    def publish(self) -> None:
        """Rename the folder of flushed files into place and let go of it."""
        with self.explained():
            _publish(self.path, self.target, replace=self.overwrite)
        self._release()

    def _release(self) -> None:
        os.close(self._fd)
        self._fd = -1

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Say of an error of the system where it happened, and what is left.

        Raises:
            FusekitError: in place of any OSError.
        """
        try:
            yield
        except OSError as error:
            raise FusekitError(
                f"{error.filename or self.path}: cannot be written: {error.strerror}; what is "
                f"finished stays in {self.path}, run again to continue"
            ) from None


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill with flushed files, which then becomes the target.

    Raises:
        FusekitError: as of `PartialFolder`.
    """
    partial = PartialFolder(target)
    try:
        partial.clear()
        yield partial.path
        partial.publish()
    finally:
        partial.close()


class CheckpointWriter:
    """The shards of an unfinished output, written at known offsets by any thread in any order."""

    def __init__(self, partial: PartialFolder, layout: Layout, *, keep: bool = False) -> None:
        """Create (or, with `keep`, reopen) all shards at full length; `partial` is taken over."""
        self._partial = partial
        self.folder = partial.path
        self.explained = partial.explained
        self.layout = layout
        self._fds: dict[str, int] = {}
        try:
            with self.explained():
                if not keep:
                    partial.clear()
                self._check_space()
                for shard in layout.files:
                    self._create(shard)
        except BaseException:
            self.close()
            raise
        self._place = {
            name: (self._fds[shard.file_name], offset)
            for shard in layout.files
            for name, offset in shard.offsets.items()
        }

    def _create(self, shard: Shard) -> None:
        path = self.folder / shard.file_name
        path.parent.mkdir(exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._fds[shard.file_name] = fd
        os.ftruncate(fd, shard.nbytes)
        _write_all(fd, memoryview(shard.header), 0)

    def _check_space(self) -> None:
        there = sum(file.stat().st_blocks * 512 for file in self.folder.rglob("*"))
        free = shutil.disk_usage(self.folder).free
        if free + there < self.layout.nbytes:
            raise FusekitError(
                f"{self.folder.parent}: {_amount(free)} free, "
                f"the output needs {_amount(self.layout.nbytes)}"
            )

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor, starting `offset` bytes into it. Thread-safe."""
        fd, begin = self._place[name]
        try:
            _write_all(fd, data, begin + offset)
        except OSError:
            with self.explained():
                raise

    def read(self, name: str, offset: int, out: memoryview) -> None:
        """Read back what was written."""
        fd, begin = self._place[name]
        if os.preadv(fd, [out], begin + offset) != len(out):
            raise FusekitError(f"{self.folder}: tensor {name!r} could not be read back")

    def flush(self) -> None:
        """Force everything written so far to the disk."""
        with self.explained():
            for fd in self._fds.values():
                os.fsync(fd)

    def add_file(self, name: str, content: bytes) -> None:
        """A small file beside the shards, flushed; one of that name stays whole until then."""
        path = self.folder / name
        draft = path.with_name(f"{path.name}.new")
        with self.explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)

    def discard_file(self, name: str) -> None:
        """Remove a working file that is not part of the finished output."""
        (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files and let go of the partial folder, which stays."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}
        self._partial.close()

    def publish(self) -> None:
        """Flush, rename the folder into place and close; an output it replaces goes last."""
        self.flush()
        self._partial.publish()
        self.close()


def _write_all(fd: int, data: memoryview, position: int) -> None:
    done = os.pwrite(fd, data, position)
    while done < len(data):  # a nearly full disk takes less than it is given, then refuses
        done += os.pwrite(fd, data[done:], position + done)


def _amount(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def _publish(folder: Path, target: Path, *, replace: bool) -> None:
    """Rename a folder of flushed files into place; a folder it replaces goes last.

    Where the system can, the two change names in one step, so that something complete is at the
    target all the time.

    Raises:
        OSError: not `replace`, and there is more than an empty folder at the target.
    """
    for each in {folder, *(path.parent for path in folder.rglob("*"))}:
        _fsync_folder(each)
    if not (replace and target.exists()):
        folder.rename(target)
        _fsync_folder(target.absolute().parent)
        return
    with _locked(target):  # or another process would take what is replaced for its partial folder
        if _exchanged(folder, target):
            retired = folder
        else:
            retired = _set_aside(target)
            folder.rename(target)
        _fsync_folder(target.absolute().parent)
        _remove(retired)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where that cannot be done (only Linux can,
    and not on every file system)."""
    import ctypes

    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    names = (os.fsencode(path.absolute()) for path in (one, other))
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, next(names), here, next(names), exchange) == 0)


def _set_aside(target: Path) -> Path:
    """Rename an output that is to be replaced, over what an earlier run may have left there."""
    aside = target.with_name(target.name + ".replaced")
    if _is_output(aside):
        _remove(aside)
    target.rename(aside)
    return aside


def _remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from claiming a folder, where the file system has locks."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
