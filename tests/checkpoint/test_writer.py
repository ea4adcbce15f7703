"""Publishing an output over another one: at every moment one of the two is complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusekit.checkpoint import writer
from fusekit.checkpoint.writer import PartialFolder
from fusekit.errors import FusekitError


class KilledError(BaseException):
    """Stands for the end of the process."""


def output(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(content)
    return folder


def begun(target: Path, content: str) -> PartialFolder:
    partial = PartialFolder(target, overwrite=True)
    partial.clear()
    (partial.path / "manifest.json").write_text(content)
    return partial


def content(folder: Path) -> str:
    return (folder / "manifest.json").read_text()


def killed(*_: object) -> None:
    raise KilledError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return output(tmp_path / "out", "old")


@pytest.fixture
def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot swap two names."""
    monkeypatch.setattr(writer, "_exchanged", lambda *_: False)


def test_the_replaced_output_is_swapped_for_the_new_one_in_a_single_step(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = [output(out.parent / name, name) for name in ("one", "other")]
    if not writer._exchanged(*probes):
        pytest.skip("this file system cannot exchange names")
    assert [content(probe) for probe in probes] == ["other", "one"]
    partial = begun(out, "new")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        patched.setattr(writer, "_remove", killed)
        with pytest.raises(KilledError):
            partial.publish()
    assert content(out) == "new"
    partial.close()
    begun(out, "newer").publish()  # what the kill left is no obstacle
    assert content(out) == "newer"
    assert sorted(path.name for path in out.parent.iterdir()) == ["one", "other", "out"]


def test_nothing_is_renamed_where_one_of_two_names_is_missing(tmp_path: Path) -> None:
    one, other = output(tmp_path / "one", "1"), tmp_path / "absent"
    assert not writer._exchanged(one, other)
    assert content(one) == "1"


def test_nobody_claims_what_is_being_removed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, refused = writer._remove, []

    def claimed_meanwhile(path: Path) -> None:
        if path.is_dir():
            with pytest.raises(FusekitError, match="another process is writing") as caught:
                PartialFolder(path.with_name("out"), overwrite=True)
            refused.append(caught.value)
        remove(path)

    partial = begun(out, "new")
    monkeypatch.setattr(writer, "_remove", claimed_meanwhile)
    if writer._exchanged(partial.path, out):  # and back: only where the names can be swapped
        writer._exchanged(partial.path, out)
        partial.publish()
        assert len(refused) == 1
        assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.usefixtures("without_exchange")
def test_without_a_swap_the_new_output_still_replaces_the_old(out: Path) -> None:
    output(out.with_name("out.replaced"), "left by a kill")
    begun(out, "new").publish()
    assert content(out) == "new"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.usefixtures("without_exchange")
def test_without_a_swap_a_kill_between_the_renames_loses_neither_output(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = begun(out, "new")
    rename = Path.rename
    with monkeypatch.context() as patched:

        def first_only(path: Path, target: Path) -> Path:
            return rename(path, target) if path == out else killed()  # type: ignore[return-value]

        patched.setattr(Path, "rename", first_only)
        with pytest.raises(KilledError):
            partial.publish()
    assert content(out.with_name("out.replaced")) == "old"
    assert content(out.with_name("out.partial")) == "new"
    partial.publish()
    assert content(out) == "new"


@pytest.mark.usefixtures("without_exchange")
def test_a_folder_that_only_has_the_name_of_a_replaced_output_is_kept(out: Path) -> None:
    photos = out.with_name("out.replaced")
    photos.mkdir()
    (photos / "beach.jpg").write_bytes(b"")
    with pytest.raises(FusekitError, match="out: cannot be written: Directory not empty"):
        begun(out, "new").publish()
    assert (photos / "beach.jpg").exists()
    assert content(out) == "old"


@pytest.mark.parametrize("swap", [True, False])
def test_a_link_is_replaced_and_not_what_it_leads_to(
    out: Path, monkeypatch: pytest.MonkeyPatch, swap: bool
) -> None:
    if not swap:
        monkeypatch.setattr(writer, "_exchanged", lambda *_: False)
    link = out.with_name("latest")
    link.symlink_to(out)
    begun(link, "new").publish()
    assert content(link) == "new"
    assert not link.is_symlink()
    assert content(out) == "old"
    assert {path.name for path in out.parent.iterdir()} == {"out", "latest"}
