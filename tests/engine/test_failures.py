"""What goes wrong while a merge runs: one sentence, what is finished is kept, and it goes on.

Every merge runs in a process of its own, through the command line.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import fusekit
from tests.engine.support import write_model

TENSORS, SHAPE = 12, (128, 512)
SIZE = TENSORS * 4 * SHAPE[0] * SHAPE[1]

COMMAND = """
import os, resource, shutil, sys, time
import fusekit.cli
from fusekit.checkpoint.safetensors import SafetensorsFile
from fusekit.engine import run

run.SYNC_SECONDS = 0.0
"""
NO_CHECK = """
usage = shutil.disk_usage("/")
shutil.disk_usage = lambda _: usage._replace(free=1 << 40)
"""
SMALL_FILES = "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
WHEN_HALF_IS_READ = """
read, reads = SafetensorsFile.read_into, []

def counted(self, *args):
    reads.append(self)
    if len(reads) == 14:
        happen(self.path)
    read(self, *args)

SafetensorsFile.read_into = counted
"""
TRUNCATED = "happen = lambda path: os.truncate(path, 5000)\n"
REPLACED = "happen = lambda path: os.utime(path, ns=(0, 0))\n"
UNREADABLE = """
def happen(path):
    def fail(*_):
        raise OSError(5, os.strerror(5))
    os.preadv = fail
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in "ab":
        tensors = {
            f"model.layers.{i}.w": rng.standard_normal(SHAPE).astype(np.float32)
            for i in range(TENSORS)
        }
        write_model(tmp_path / name, tensors, {"num_hidden_layers": TENSORS})
    (tmp_path / "recipe.yml").write_text(
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1.0}\n"
    )
    return tmp_path


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place))
    if not mounted:
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def mount(*arguments: str) -> bool:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


def merge(folder: Path, out: Path, faults: str = "", *options: str) -> str:
    """What a merge that ends with an error says: one line, exit status 2."""
    arguments = ["fusekit", "merge", str(folder / "recipe.yml"), str(out), "--threads", "1"]
    code = f"{COMMAND}{faults}sys.argv = {[*arguments, *options]!r}\nfusekit.cli.main()\n"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "Compiling" not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("fusekit: ")
    assert not out.exists()
    return lines[0]


def expect_to_go_on(folder: Path, out: Path, kept: bool = True) -> None:
    """Run again, it ends in what an undisturbed merge writes; with `kept` not from the start."""
    report = fusekit.merge(folder / "recipe.yml", out, threads=1)
    assert (report.resumed > 0) == kept
    assert report.resumed < TENSORS
    fusekit.merge(folder / "recipe.yml", folder / "whole", threads=2)
    for path in (folder / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    folder: Path, disk: Path
) -> None:
    message = merge(folder, disk / "out")
    assert message == f"fusekit: {disk}: 2.10 MB free, the output needs 3.15 MB"
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("options", [(), ("--out-shard-size", "300KB")])
def test_a_disk_that_fills_up_keeps_what_is_finished(
    folder: Path, disk: Path, options: tuple[str, ...]
) -> None:
    message = merge(folder, disk / "out", NO_CHECK, *options)
    assert "cannot be written: No space left on device" in message
    assert f"what is finished stays in {disk / 'out.partial'}, run again to continue" in message
    if options:
        return
    assert mount("-o", "remount,size=8m", str(disk))
    expect_to_go_on(folder, disk / "out")


def test_a_file_system_that_takes_no_files_of_that_size(folder: Path) -> None:
    message = merge(folder, folder / "out", SMALL_FILES)
    assert "out.partial: cannot be written: File too large" in message
    expect_to_go_on(folder, folder / "out", kept=False)


def test_a_read_only_target_is_refused_before_anything_is_read(folder: Path, disk: Path) -> None:
    assert mount("-o", "remount,ro", str(disk))
    message = merge(folder, disk / "deep/out")
    assert message == (
        f"fusekit: {disk}: not a writable folder, {disk / 'deep/out'} cannot be created"
    )


def test_a_file_that_is_cut_short_while_it_is_read(folder: Path) -> None:
    whole = (folder / "b/model.safetensors").read_bytes()
    fault = WHEN_HALF_IS_READ + TRUNCATED
    message = merge(folder, folder / "out", fault)
    assert "model.safetensors: tensor 'model.layers." in message
    assert "it was truncated after it had been opened" in message
    for name in "ab":
        path = folder / name / "model.safetensors"
        if path.stat().st_size == 5000:
            message = merge(folder, folder / "out")
            assert message.startswith(f"fusekit: {path}: ")
            if name == "b":
                path.write_bytes(whole)
                assert "has changed since this merge was begun" in merge(folder, folder / "out")
    assert (folder / "out.partial/journal.jsonl").is_file()


def test_a_source_that_is_replaced_while_it_is_read(folder: Path) -> None:
    message = merge(folder, folder / "out", WHEN_HALF_IS_READ + REPLACED)
    assert "model.safetensors: changed while it was being read" in message
    assert "--no-resume" in message
    again = merge(folder, folder / "out")
    assert "has changed since this merge was begun; pass --no-resume" in again
    assert fusekit.merge(folder / "recipe.yml", folder / "out", resume=False).resumed == 0


def test_a_disk_that_fails_while_it_is_read(folder: Path) -> None:
    message = merge(folder, folder / "out", UNREADABLE + WHEN_HALF_IS_READ)
    assert "model.safetensors: tensor 'model.layers." in message
    assert "cannot be read: Input/output error" in message
    expect_to_go_on(folder, folder / "out")


def sharded(folder: Path) -> tuple[Path, Path]:
    """Model `b` in shards: its folder and one of them."""
    copy = {"merge_method": "passthrough", "models": [{"model": str(folder / "b")}]}
    fusekit.merge(copy, folder / "shards", out_shard_size=600_000)
    for path in (folder / "b").glob("*"):
        path.unlink()
    (folder / "b").rmdir()
    (folder / "shards").rename(folder / "b")
    return folder / "b", folder / "b/model-00002-of-00006.safetensors"


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "shard 'model-00002-of-00006.safetensors' is missing"),
    "cut short": (lambda path: os.truncate(path, 5000), "model-00002-of-00006.safetensors: "),
    "empty": (lambda path: os.truncate(path, 0), "model-00002-of-00006.safetensors: "),
    "no weights": (lambda path: path.write_text("<html>not found</html>"), "not a safetensors"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "-00002-of-00006.safetensors' is mis"),
    "a dead link": (lambda path: (path.unlink(), path.symlink_to("gone")), "is missing from"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_shard_that_cannot_be_read_is_refused_before_anything_is_written(
    folder: Path, how: str
) -> None:
    _, shard = sharded(folder)
    spoil, message = SPOILT[how]
    spoil(shard)
    assert message in merge(folder, folder / "out")
    assert not (folder / "out.partial").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads
@pytest.mark.skipif(not hasattr(os, "fork"), reason="gives up rights in a forked process")
def test_files_that_may_not_be_opened_and_folders_that_may_not_be_written(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as open_to_all:
        place = Path(open_to_all) / "m"
        shutil.copytree(folder, place)
        Path(open_to_all).chmod(0o755)
        place.chmod(0o777)
        _, shard = sharded(place)
        for path in place.glob("*/*"):
            path.chmod(0o644)
        shard.chmod(0o000)
        assert f"{shard}: cannot be opened: Permission denied" in without_rights(place, "out")
        shard.chmod(0o644)
        (place / "closed").mkdir(mode=0o555)
        assert f"{place / 'closed'}: not a writable folder" in without_rights(place, "closed/out")


def without_rights(folder: Path, out: str) -> str:
    """What a merge says that is not run by root."""
    answer, question = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            fusekit.merge(folder / "recipe.yml", folder / out, threads=1)
            os.write(question, b"merged")
        except BaseException as error:
            os.write(question, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(question)
    with os.fdopen(answer, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said
