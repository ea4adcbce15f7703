"""Opening what a user names: folders, single files, configs and the files beside them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fusekit.checkpoint.folder import open_checkpoint
from fusekit.errors import CheckpointError


def write(folder: Path, *names: str) -> Path:
    """Empty files, and `.safetensors` ones with one tensor named after the file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name.endswith(".safetensors"):
            save_file({name: np.zeros(2, np.float32)}, folder / name)
        else:
            (folder / name).write_text("{}")
    return folder


def test_a_folder_with_one_file_whatever_its_name(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write(tmp_path / "m", "weights.safetensors")))
    assert list(checkpoint.source.tensors) == ["weights.safetensors"]
    assert checkpoint.folder == tmp_path / "m"


def test_several_files_without_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write(tmp_path, "a.safetensors", "b.safetensors")))
    assert list(checkpoint.source.tensors) == ["a.safetensors", "b.safetensors"]


def test_an_index_decides_which_files_belong(tmp_path: Path) -> None:
    write(tmp_path, "a.safetensors", "consolidated.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.safetensors": "a.safetensors"}}))
    for reference in (tmp_path, index):
        checkpoint = open_checkpoint(str(reference))
        assert list(checkpoint.source.tensors) == ["a.safetensors"]
        assert checkpoint.folder == tmp_path


def test_a_single_file_has_no_companions(tmp_path: Path) -> None:
    write(tmp_path, "m.safetensors", "config.json")
    checkpoint = open_checkpoint(str(tmp_path / "m.safetensors"))
    assert list(checkpoint.source.tensors) == ["m.safetensors"]
    assert checkpoint.config() is None
    assert checkpoint.companions() == []


def test_relative_paths_are_also_looked_up_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "recipes/m", "beside.safetensors")
    write(tmp_path / "work", "x.json")
    monkeypatch.chdir(tmp_path / "work")
    beside = open_checkpoint("m", tmp_path / "recipes")
    assert list(beside.source.tensors) == ["beside.safetensors"]
    write(tmp_path / "work/m", "here.safetensors")
    here = open_checkpoint("m", tmp_path / "recipes")
    assert list(here.source.tensors) == ["here.safetensors"]


def test_companions_are_the_small_files_that_make_a_model_usable(tmp_path: Path) -> None:
    wanted = ["config.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "code.py"]
    wanted += ["LICENSE", "LICENSE.md", "NOTICE", "USE_POLICY.md", "source.spm"]
    wanted += ["additional_chat_templates/tool_use.jinja"]
    others = ["model.safetensors", "m.safetensors.index.json", "training.bin", "manifest.json"]
    others += ["README.md", "onnx/config.json"]
    for folder in ("additional_chat_templates", "onnx"):
        (tmp_path / folder).mkdir()
    write(tmp_path, *wanted, *others)
    (tmp_path / "m.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.safetensors": "model.safetensors"}})
    )
    (tmp_path / "folder.json").mkdir()
    companions = open_checkpoint(str(tmp_path)).companions()
    assert [path.relative_to(tmp_path).as_posix() for path in companions] == sorted(wanted)


def test_the_config_is_parsed(tmp_path: Path) -> None:
    write(tmp_path, "m.safetensors")
    assert open_checkpoint(str(tmp_path)).config() is None
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert open_checkpoint(str(tmp_path)).config() == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[1]", "expected a JSON object")]
)
def test_a_broken_config_is_named(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, "m.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(tmp_path)).config()
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_link_to_nothing_is_not_offered_in_its_own_place(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"no such file or folder \(looked at [^()]*\)$"):
        open_checkpoint(str(tmp_path / "model"))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights found") as caught:
        open_checkpoint(str(write(tmp_path / "m", "config.json")))
    assert str(tmp_path / "m") in str(caught.value)


def test_the_folder_of_a_model_in_the_hubs_cache_names_its_snapshot(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"did you mean {snapshot}\?$"):
        open_checkpoint(str(tmp_path / "models--org--m"))


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_text("hello, I am not a checkpoint at all")
    with pytest.raises(CheckpointError, match="not a safetensors file") as caught:
        open_checkpoint(str(tmp_path / "m.safetensors"))
    assert str(tmp_path / "m.safetensors") in str(caught.value)


def test_a_reference_longer_than_any_path_is_not_there() -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint("./" + "x" * 5000)


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt", "config.json"])
def test_a_file_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "m", "model.safetensors", "vocab.txt", "config.json")
    write(tmp_path / "secrets", name)
    (tmp_path / "m" / name).unlink()
    (tmp_path / "m" / name).symlink_to(tmp_path / "secrets" / name)
    with pytest.raises(CheckpointError, match="a link out of the folder, to ") as caught:
        open_checkpoint(str(tmp_path / "m"))
    assert str(caught.value).startswith(str(tmp_path / "m" / name))


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m", "config.json")
    write(tmp_path / "secrets", "a.safetensors")
    (tmp_path / "m/a.safetensors").symlink_to("../secrets/a.safetensors")
    index = tmp_path / "m/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.safetensors": "a.safetensors"}}))
    for reference in (tmp_path / "m", index):
        with pytest.raises(CheckpointError, match="a link out of the folder"):
            open_checkpoint(str(reference))


def test_links_within_the_folder_and_to_the_folder_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "m", "weights.safetensors")
    (tmp_path / "m/model.safetensors").symlink_to("weights.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    assert list(open_checkpoint(str(tmp_path / "link")).source.tensors) == ["weights.safetensors"]


def test_snapshots_of_the_hubs_cache_hold_links(tmp_path: Path) -> None:
    blobs = write(tmp_path / "models--org--m/blobs", "0123.safetensors")
    snapshot = write(tmp_path / "models--org--m/snapshots/abc", "config.json")
    (snapshot / "model.safetensors").symlink_to(blobs / "0123.safetensors")
    assert list(open_checkpoint(str(snapshot)).source.tensors) == ["0123.safetensors"]
