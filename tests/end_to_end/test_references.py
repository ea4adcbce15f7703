"""Models as people name them: other formats, URLs, the hub, adapters. Each merged from a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

import fusekit
from fusekit import CheckpointError, RecipeError
from fusekit.checkpoint import ranges
from fusekit.checkpoint.references import ModelReference, parse_reference
from tests.adapters.support import make_adapter, make_module
from tests.checkpoint.servers import FileServer, add_hub_model, serving
from tests.checkpoint.zip_files import state_dict, storage, tensor, write_checkpoint
from tests.engine.support import write_model

constants = pytest.importorskip("huggingface_hub.constants")

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPE = (4, 6)
VALUES = np.arange(24, dtype=np.float32).reshape(SHAPE)
FILES = {"config.json": b'{"of": "remote"}', "model.safetensors": save({NAME: VALUES})}


@pytest.fixture(autouse=True)
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second model beside the recipe, of ones."""
    write_model(tmp_path / "ones", {NAME: np.ones(SHAPE, np.float32)}, {"of": "ones"})
    monkeypatch.setattr(ranges, "BACKOFF_SECONDS", 0.001)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving(FileServer()) as state:
        monkeypatch.setenv("HF_ENDPOINT", state.url)
        add_hub_model(state, "org/tiny", FILES)
        yield state


def merged(tmp_path: Path, model: Any, **options: Any) -> np.ndarray:
    """The mean of a model and one of ones."""
    recipe = {
        "merge_method": "linear",
        "models": [{"model": model}, {"model": str(tmp_path / "ones")}],
        "parameters": {"weight": 1.0},
    }
    fusekit.merge(recipe, tmp_path / "out", threads=1, **options)
    return load_file(tmp_path / "out/model.safetensors")[NAME]


def expect(found: np.ndarray, model: np.ndarray = VALUES) -> None:
    np.testing.assert_allclose(found, (model + 1) / 2, rtol=1e-6)


def pickled(path: Path) -> None:
    place = tensor(storage("0", 24), SHAPE, (6, 1))
    write_checkpoint(path, state_dict({NAME: place}), {"0": VALUES})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth"])
def test_pytorch_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "m").mkdir()
    pickled(tmp_path / "m" / name)
    is_folder = name == "pytorch_model.bin"
    expect(merged(tmp_path, str(tmp_path / "m" if is_folder else tmp_path / "m" / name)))


def test_a_sharded_pytorch_folder(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    pickled(tmp_path / "m/pytorch_model-00001-of-00001.bin")
    index = {"weight_map": {NAME: "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "m/pytorch_model.bin.index.json").write_text(json.dumps(index))
    expect(merged(tmp_path, str(tmp_path / "m")))


def test_safetensors_win_over_pickles_in_the_same_folder(tmp_path: Path) -> None:
    write_model(tmp_path / "m", {NAME: VALUES})
    (tmp_path / "m/pytorch_model.bin").write_bytes(b"not even a pickle")
    expect(merged(tmp_path, str(tmp_path / "m")))


def test_numpy_archives(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", **{NAME: VALUES})
    expect(merged(tmp_path, str(tmp_path / "m.npz")))


def test_a_url_brings_its_config(tmp_path: Path) -> None:
    with serving(FileServer({f"/m/{name}": data for name, data in FILES.items()})) as server:
        expect(merged(tmp_path, f"{server.url}/m"))
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"of": "remote"}


def test_an_fsspec_url(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/end/m/model.safetensors", FILES["model.safetensors"])
    try:
        expect(merged(tmp_path, "memory://end/m"))
    finally:
        files.rm("/end", recursive=True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reference", ["org/tiny", "org/tiny@main", "hf://org/tiny"])
def test_models_of_the_hub(tmp_path: Path, hub: FileServer, reference: str, stream: bool) -> None:
    expect(merged(tmp_path, reference, stream=stream))
    stored = list((tmp_path / "cache").rglob("model.safetensors"))
    assert bool(stored) != stream
    assert "base_model:\n- org/tiny" in (tmp_path / "out/README.md").read_text()


def test_the_long_form_names_revision_and_adapter(tmp_path: Path, hub: FileServer) -> None:
    long = {"model": {"path": "org/tiny", "revision": "main"}}
    expect(merged(tmp_path, long))


# -- adapters -------------------------------------------------------------------------------------


def adapter(folder: Path) -> np.ndarray:
    """An adapter on disk, and the update it stands for."""
    from fusekit.adapters import write_adapter

    rng = np.random.default_rng(0)
    A = rng.standard_normal((2, 6)).astype(np.float32)
    B = rng.standard_normal((4, 2)).astype(np.float32)
    write_adapter(make_adapter(make_module(NAME, A, B, 0.5)), folder)
    update: np.ndarray = 0.5 * B @ A
    return update


@pytest.mark.parametrize("long", [False, True])
def test_an_adapter_is_folded_in_while_the_model_is_read(tmp_path: Path, long: bool) -> None:
    write_model(tmp_path / "m", {NAME: VALUES}, {})
    update = adapter(tmp_path / "lora")
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    reference: Any = f"{tmp_path / 'm'}+{tmp_path / 'lora'}"
    if long:
        reference = {
            "model": {"path": str(tmp_path / "m")},
            "lora": {"path": str(tmp_path / "lora")},
        }
    expect(merged(tmp_path, reference), VALUES + update)
    after = [p for p in tmp_path.rglob("*") if p.is_file() and "out" not in p.parts]
    assert sorted(after) == before


def test_the_same_model_with_and_without_an_adapter_is_two_models(tmp_path: Path) -> None:
    write_model(tmp_path / "m", {NAME: VALUES}, {})
    update = adapter(tmp_path / "lora")
    plain = str(tmp_path / "m")
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": plain,
        "models": [{"model": f"{plain}+{tmp_path / 'lora'}", "parameters": {"weight": 2.0}}],
    }
    fusekit.merge(recipe, tmp_path / "out", threads=1)
    found = load_file(tmp_path / "out/model.safetensors")[NAME]
    np.testing.assert_allclose(found, VALUES + 2 * update, rtol=1e-5, atol=1e-5)


# -- references as text ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/m", ("org/m", None, None, None)),
        ("org/m@v1", ("org/m", "v1", None, None)),
        ("org/m+org/l", ("org/m", None, "org/l", None)),
        ("org/m@v1+./l@v2", ("org/m", "v1", "./l", "v2")),
        ("https://user@host/m", ("https://user@host/m", None, None, None)),
        ("hf://org/m@v1", ("hf://org/m", "v1", None, None)),
    ],
)
def test_references_are_taken_apart(text: str, parts: tuple[str | None, ...]) -> None:
    assert parse_reference(text) == ModelReference(*parts)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["a+b+c", "a@b@c", "a@", "+b", "a+", "@v1"])
def test_references_that_make_no_sense(text: str) -> None:
    with pytest.raises(RecipeError, match="expected"):
        parse_reference(text)


def test_a_path_with_a_plus_or_an_at_sign_is_a_path(tmp_path: Path) -> None:
    write_model(tmp_path / "m+v@2", {NAME: VALUES})
    expect(merged(tmp_path, str(tmp_path / "m+v@2")))


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "m", {NAME: VALUES})
    with pytest.raises(CheckpointError, match="is on this disk and has no revision 'v1'"):
        merged(tmp_path, f"{tmp_path / 'm'}@v1")


def test_links_out_of_a_pipeline_are_not_followed(tmp_path: Path) -> None:
    save_file({"secret": VALUES}, tmp_path / "other.safetensors")
    (tmp_path / "elsewhere").mkdir()
    save_file({"secret": VALUES}, tmp_path / "elsewhere/model.safetensors")
    write_model(tmp_path / "m", {NAME: VALUES})
    (tmp_path / "m/model_index.json").write_text("{}")
    (tmp_path / "m/unet").symlink_to(tmp_path / "elsewhere")
    expect(merged(tmp_path, str(tmp_path / "m")))
    assert not (tmp_path / "out/unet").exists()


def test_configs_of_a_pipelines_parts_state_the_new_dtype(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_model(tmp_path / name / "unet", {NAME: VALUES}, {"torch_dtype": "float32", "x": 1})
        write_model(tmp_path / name / "vae", {NAME: VALUES}, {"x": 2})
        (tmp_path / name / "model_index.json").write_text("{}")
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / name)} for name in ("a", "b")],
        "parameters": {"weight": 1.0},
        "out_dtype": "float16",
    }
    fusekit.merge(recipe, tmp_path / "out", threads=1)
    found = load_file(tmp_path / "out/unet/model.safetensors")[NAME]
    assert found.dtype == np.float16
    config = json.loads((tmp_path / "out/unet/config.json").read_text())
    assert config == {"torch_dtype": "float16", "x": 1}
    assert json.loads((tmp_path / "out/vae/config.json").read_text()) == {"x": 2}
