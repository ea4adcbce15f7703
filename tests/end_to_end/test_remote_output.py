"""Outputs to a URL: made on this machine, uploaded with the manifest last, and verified there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from safetensors.numpy import load_file

import fusekit
from fusekit import FusekitError
from fusekit.engine.remote_output import working_folder
from tests.checkpoint.servers import s3_bucket
from tests.engine.support import write_model

VALUES = np.arange(24, dtype=np.float32).reshape(4, 6)
URL = "memory://outputs/model"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose working folder is in the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i, name in enumerate("ab"):
        tensors = {f"layers.{n}.w": VALUES + i + n for n in range(3)}
        write_model(tmp_path / name, tensors, {"of": name})
    path = tmp_path / "recipe.yml"
    path.write_text(
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1.0}\n"
    )
    return path


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    yield files
    if files.exists("/outputs"):
        files.rm("/outputs", recursive=True)


def names(memory: Any) -> list[str]:
    return sorted(path.removeprefix("/outputs/model/") for path in memory.find("/outputs/model"))


def test_an_output_to_a_url_is_the_local_one_and_leaves_nothing_here(
    recipe: Path, memory: Any, tmp_path: Path
) -> None:
    sent: list[str] = []
    report = fusekit.merge(recipe, URL, threads=2, out_shard_size=100, on_upload=sent.append)
    assert (report.out, report.tensors, report.resumed) == (URL, 3, 0)
    fusekit.merge(recipe, tmp_path / "out", threads=2, out_shard_size=100)
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {name: memory.cat(f"/outputs/model/{name}") for name in names(memory)} == local
    assert [name.endswith(".safetensors") for name in sent] == [True] * 3 + [False] * 4
    assert sent[-3:] == ["config.json", "model.safetensors.index.json", "manifest.json"]
    assert not working_folder(URL).exists()


def test_an_output_at_a_url_is_verified_there(recipe: Path, memory: Any) -> None:
    fusekit.merge(recipe, URL, threads=2)
    assert fusekit.verify(URL).ok
    weights = bytearray(memory.cat("/outputs/model/model.safetensors"))
    weights[-1] ^= 1
    memory.pipe("/outputs/model/model.safetensors", bytes(weights))
    assert fusekit.verify(URL).problems == (
        "layers.2.w: the bytes differ from those that were written",
    )
    memory.pipe("/outputs/model/model.safetensors", bytes(weights[:-1]) + bytes([weights[-1] ^ 1]))
    memory.rm("/outputs/model/config.json")
    assert fusekit.verify(URL).problems == ("config.json: missing",)
    memory.rm("/outputs/model/manifest.json")
    with pytest.raises(FusekitError, match=r"memory://outputs/model/manifest\.json: not found"):
        fusekit.verify(URL)


def test_what_is_at_the_url_is_refused_before_anything_is_merged(recipe: Path, memory: Any) -> None:
    memory.pipe("/outputs/model/config.json", b"{}")
    with pytest.raises(FusekitError, match=r"found 'config\.json' and no manifest\.json"):
        fusekit.merge(recipe, URL)
    memory.pipe("/outputs/model/manifest.json", b"{}")
    with pytest.raises(FusekitError, match="already exists; choose another output or pass"):
        fusekit.merge(recipe, URL)
    assert not working_folder(URL).exists()


def test_overwrite_replaces_the_files_of_the_other_output_only(recipe: Path, memory: Any) -> None:
    fusekit.merge(recipe, URL, threads=2, out_shard_size=100)
    memory.pipe("/outputs/model/notes/mine.json", b"{}")
    fusekit.merge(recipe, URL, threads=2, overwrite=True)
    assert names(memory) == [
        "README.md",
        "config.json",
        "manifest.json",
        "model.safetensors",
        "notes/mine.json",
    ]
    assert fusekit.verify(URL).ok


def test_an_interrupted_upload_goes_on_where_it_was(
    recipe: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = type(memory).put_file

    def fail_late(self: Any, local: str, remote: str, **options: Any) -> None:
        if remote.endswith("config.json"):
            raise OSError("the network is down")
        put(self, local, remote, **options)

    with monkeypatch.context() as broken:
        broken.setattr(type(memory), "put_file", fail_late)
        with pytest.raises(FusekitError, match=r"config\.json: cannot be written: OSError: the"):
            fusekit.merge(recipe, URL, threads=2, out_shard_size=100)
    assert "manifest.json" not in names(memory)
    memory.pipe("/outputs/model/model-00002-of-00003.safetensors", b"changed meanwhile")

    sent: list[str] = []
    report = fusekit.merge(recipe, URL, out_shard_size=100, on_upload=sent.append)
    assert (report.resumed, report.bytes_read) == (3, 0)
    assert sent == [
        "model-00002-of-00003.safetensors",
        "config.json",
        "model.safetensors.index.json",
        "manifest.json",
    ]
    assert fusekit.verify(URL).ok
    assert not working_folder(URL).exists()


def test_a_changed_recipe_is_merged_again_after_an_interrupted_upload(
    recipe: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, local: str, remote: str, **options: Any) -> None:
        raise PermissionError("Forbidden")

    with monkeypatch.context() as broken:
        broken.setattr(type(memory), "put_file", fail)
        with pytest.raises(FusekitError, match="PermissionError: Forbidden; set credentials"):
            fusekit.merge(recipe, URL, threads=2)
    recipe.write_text(recipe.read_text().replace("1.0", "2.0").replace("{model: b}", "{model: a}"))
    assert fusekit.merge(recipe, URL, threads=2).resumed == 0
    manifest = json.loads(memory.cat("/outputs/model/manifest.json"))
    assert manifest["recipe"]["parameters"] == {"weight": 2.0}
    assert fusekit.verify(URL).ok


def test_a_file_of_another_size_after_the_upload_is_an_error(
    recipe: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(self: Any, local: str, remote: str, **options: Any) -> None:
        self.pipe_file(remote, Path(local).read_bytes()[:-1])

    monkeypatch.setattr(type(memory), "put_file", cut)
    with pytest.raises(FusekitError, match=r"model\.safetensors: \d+ bytes after the upload, exp"):
        fusekit.merge(recipe, URL, threads=2)


def test_a_working_folder_of_the_users_keeps_their_files(
    recipe: Path, memory: Any, tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/mine.txt").write_text("kept")
    fusekit.merge(recipe, URL, threads=2, work=tmp_path / "work")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "cache").exists()
    with pytest.raises(FusekitError, match="work: only outputs to a URL"):
        fusekit.merge(recipe, tmp_path / "out", work=tmp_path / "work")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("https://host/model", "https addresses are only read"),
        ("hf://org/model", "hf addresses are only read"),
        ("nonsense://model", "nonsense://model: cannot be opened: Protocol not known"),
    ],
)
def test_addresses_that_cannot_be_written_to_are_refused(
    recipe: Path, url: str, problem: str
) -> None:
    with pytest.raises(FusekitError, match=problem):
        fusekit.merge(recipe, url)


def test_a_missing_package_is_named(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(FusekitError, match=r"gs://b/m: cannot be opened: .*\(pip install gcsfs\)"):
        fusekit.merge(recipe, "gs://b/m")


def test_continual_merging_needs_a_folder_here(recipe: Path) -> None:
    recipe.write_text("merge_method: opcm\nbase_model: a\nmodels: [{model: b}]\n")
    with pytest.raises(FusekitError, match="continual merging keeps its update beside the output"):
        fusekit.merge(recipe, URL)


def test_the_stages_of_a_recipe_stay_out_of_the_url(recipe: Path, memory: Any) -> None:
    recipe.write_text(
        recipe.read_text().replace("{model: a}", "{model: first}")
        + "---\nname: first\nmerge_method: linear\nmodels: [{model: a}]\n"
        + "parameters: {weight: 1.0}\n"
    )
    fusekit.merge(recipe, URL, threads=2)
    assert names(memory) == ["README.md", "config.json", "manifest.json", "model.safetensors"]
    assert not working_folder(URL).exists()


def test_the_command_line_writes_to_a_bucket(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_bucket(monkeypatch) as bucket:
        for arguments, status in (
            (["merge", str(recipe), f"{bucket}/out", "--threads", "2"], 0),
            (["verify", f"{bucket}/out"], 0),
            (["merge", str(recipe), f"{bucket}/out"], 2),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "fusekit", *arguments],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == status, done.stderr
        assert "s3://models/out: already exists" in done.stderr
        files = fsspec.filesystem("s3")
        files.get_file("models/out/model.safetensors", str(tmp_path / "w.safetensors"))
        np.testing.assert_allclose(
            load_file(tmp_path / "w.safetensors")["layers.0.w"], VALUES + 0.5
        )
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        type(files).clear_instance_cache()
        with pytest.raises(FusekitError, match=r"(?s)cannot be .*; set credentials that may do so"):
            fusekit.merge(recipe, f"{bucket}/other", threads=2)
