"""Models whose parts are sub-folders, on disk and where folders cannot be listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save, save_file

import fusekit
from fusekit.checkpoint.folder import open_checkpoint
from fusekit.checkpoint.pipelines import listed_parts, weight_stem
from fusekit.checkpoint.remote import fetch_companions, open_url
from fusekit.errors import CheckpointError
from tests.checkpoint.servers import FileServer, serving
from tests.checkpoint.zip_files import read

W = np.arange(6, dtype=np.float32)
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}
MODULES = [
    {"idx": 0, "path": "", "type": "Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "Pooling"},
    {"idx": 2, "path": "2_Dense", "type": "Dense"},
]
DIFFUSION = {
    "model_index.json": json.dumps(MODEL_INDEX).encode(),
    "whole.safetensors": save({"model.diffusion_model.w": W}),
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": save({"w": W + 1}),
    "scheduler/scheduler_config.json": b'{"beta": 1}',
}
SENTENCES = {
    "modules.json": json.dumps(MODULES).encode(),
    "config.json": b"{}",
    "model.safetensors": save({"w": W}),
    "1_Pooling/config.json": b"{}",
    "2_Dense/config.json": b"{}",
    "2_Dense/model.safetensors": save({"w": W + 2}),
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def offered(source: Any) -> dict[str, list[float]]:
    return {name: read(source, name).tolist() for name in source.tensors}


@pytest.mark.parametrize(
    ("files", "expected", "parts"),
    [
        (DIFFUSION, {"unet/w": (W + 1).tolist()}, {"unet": "diffusion_pytorch_model"}),
        (
            SENTENCES,
            {"w": W.tolist(), "2_Dense/w": (W + 2).tolist()},
            {"": "model", "2_Dense": "model"},
        ),
    ],
)
def test_a_folder_and_a_url_offer_the_same(
    files: dict[str, bytes], expected: Any, parts: Any, tmp_path: Path
) -> None:
    local = open_checkpoint(str(write(tmp_path / "m", files)))
    with serving(FileServer({f"/m/{name}": data for name, data in files.items()})) as server:
        remote = open_checkpoint(f"{server.url}/m?key=1")
        for checkpoint in (local, remote):
            assert offered(checkpoint.source) == expected
            assert checkpoint.parts() == parts
            assert checkpoint.folder is not None
            found = {p.relative_to(checkpoint.folder).as_posix() for p in checkpoint.companions()}
            assert found == {name for name in files if name.endswith(".json")}
            checkpoint.source.close()


def test_folders_that_a_pipeline_does_not_name_are_no_parts(tmp_path: Path) -> None:
    write(tmp_path, SENTENCES)
    write(tmp_path, {"checkpoint-500/model.safetensors": save({"w": W})})
    assert set(open_checkpoint(str(tmp_path)).source.tensors) == {"w", "2_Dense/w"}


def test_the_modules_of_a_router_are_parts(tmp_path: Path) -> None:
    files = {
        "modules.json": b'[{"path": ""}]',
        "router_config.json": b'{"types": {"query_0": "T", "document_0": "T"}}',
        "query_0/model.safetensors": save({"w": W}),
        "document_0/model.safetensors": save({"w": W}),
    }
    write(tmp_path, files)
    assert set(open_checkpoint(str(tmp_path)).source.tensors) == {"query_0/w", "document_0/w"}


def test_a_router_alone_makes_no_pipeline() -> None:
    files = {"router_config.json": b'{"types": {"a": "T"}}'}
    assert listed_parts(files.get, "m") == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model_index.json", b"[1]", "m/model_index.json: expected a JSON object with the pipel"),
        ("model_index.json", b"{", "m/model_index.json: expected a JSON object"),
        ("model_index.json", b'{"../up": ["d", "U"]}', "names the part '../up', expected a sub-f"),
        ("model_index.json", b'{"": ["d", "U"]}', "names the part ''"),
        ("modules.json", b'[{"path": "/etc"}]', "m/modules.json: names the part '/etc'"),
        ("modules.json", b'[{"path": ".."}]', r"names the part '..'"),
        ("modules.json", b'[{"path": "a\\u0000"}]', "names the part 'a\\x00'"),
        ("modules.json", b'[{"path": 3}]', "names the part 3"),
        ("modules.json", b'[{"type": "T"}]', "expected a JSON list of modules with their paths"),
        ("modules.json", b"[" * 100_000, "expected a JSON list of modules"),
    ],
)
def test_files_that_name_no_folders_of_the_pipeline_are_refused(
    name: str, content: bytes, message: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        listed_parts({name: content}.get, "m")
    assert message in str(caught.value)


def test_no_part_is_written_outside_of_the_companions_folder(tmp_path: Path) -> None:
    files = {"/m/modules.json": b'[{"path": "../up"}]', "/up/config.json": b"{}"}
    with serving(FileServer(files)) as server:
        with pytest.raises(CheckpointError, match=r"names the part '\.\./up'"):
            fetch_companions(f"{server.url}/m", tmp_path / "m")
        with pytest.raises(CheckpointError, match=r"names the part '\.\./up'"):
            open_url(f"{server.url}/m")
    assert not (tmp_path / "up").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickles_at_a_url_are_refused_with_advice(name: str) -> None:
    with (
        serving(FileServer({f"/m/{name}": b"{}"})) as server,
        pytest.raises(CheckpointError, match=rf"{name}: a PyTorch pickle, .* download the model"),
    ):
        open_url(f"{server.url}/m")


def test_a_pipeline_without_weights_is_refused() -> None:
    files = {f"/m/{name}": data for name, data in DIFFUSION.items() if name.endswith(".json")}
    with (
        serving(FileServer(files)) as server,
        pytest.raises(CheckpointError, match="no weights found in it or in its sub-folders"),
    ):
        open_url(f"{server.url}/m")


@pytest.mark.parametrize(
    ("files", "stem"),
    [
        (["m/diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model"),
        (["m/diffusion_pytorch_model-00001-of-00002.safetensors"], "diffusion_pytorch_model"),
        (["m/diffusion_pytorch_model.bin"], "diffusion_pytorch_model"),
        (["m/pytorch_model.bin"], "model"),
        (["m/diffusion_pytorch_model.safetensors", "m/other.safetensors"], "model"),
    ],
)
def test_weight_files_keep_the_name_their_library_looks_for(files: list[str], stem: str) -> None:
    assert weight_stem(files) == stem


def test_a_part_of_a_pipeline_keeps_its_file_name(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    save_file({"w": W}, tmp_path / "unet/diffusion_pytorch_model.safetensors")
    copy = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "unet")}]}
    fusekit.merge(copy, tmp_path / "out", threads=1)
    assert (tmp_path / "out/diffusion_pytorch_model.safetensors").is_file()
    assert fusekit.verify(tmp_path / "out").ok
