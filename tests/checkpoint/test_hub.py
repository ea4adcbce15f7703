"""Hub references against a local server that answers as the hub does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from fusekit.checkpoint import ranges
from fusekit.checkpoint.hub import _weight_files, is_hub_reference, resolve_hub
from fusekit.checkpoint.safetensors import SafetensorsFile
from fusekit.errors import CheckpointError
from tests.checkpoint.servers import COMMIT, FileServer, add_hub_error, add_hub_model, serving
from tests.checkpoint.zip_files import read

constants = pytest.importorskip("huggingface_hub.constants")

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)
INDEX = {
    "weight_map": {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }
}
FILES = {
    "config.json": b'{"model_type": "tiny"}',
    "tokenizer.model": b"\0\1",
    "README.md": b"# tiny",
    "modeling_tiny.py": b"# copied, never run",
    "LICENSE": b"do what you want",
    "model.safetensors": save({"w": WEIGHT}),
    "consolidated.safetensors": b"a second copy",
    "pytorch_model.bin": b"a third copy",
}
SHARDS = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-00001-of-00002.safetensors": save({"a": WEIGHT}),
    "model-00002-of-00002.safetensors": save({"b": WEIGHT + 1}),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(ranges, "BACKOFF_SECONDS", 0.001)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with serving(FileServer()) as state:
        monkeypatch.setenv("HF_ENDPOINT", state.url)
        add_hub_model(state, "org/tiny", FILES)
        yield state


@pytest.mark.parametrize(
    "reference", ["org/tiny", "hf://org/tiny", "hf://models/org/tiny", "org/tiny@main"]
)
def test_a_model_is_downloaded_into_the_cache_at_one_commit(
    hub: FileServer, reference: str
) -> None:
    model = resolve_hub(reference)
    assert (model.repo, model.commit, model.weights) == ("org/tiny", COMMIT, None)
    assert sorted(path.name for path in model.folder.iterdir()) == [
        "LICENSE",
        "config.json",
        "model.safetensors",
        "modeling_tiny.py",
        "tokenizer.model",
    ]
    source = SafetensorsFile(model.folder / "model.safetensors")
    np.testing.assert_array_equal(read(source, "w"), WEIGHT)


def test_the_cache_serves_when_the_hub_is_away(
    hub: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve_hub("org/tiny")
    hub.json_routes.clear()
    hub.fault = lambda handler, number: handler.send(503, b"", {}) or True
    assert resolve_hub("org/tiny").folder == first.folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = resolve_hub("org/tiny")
    assert (again.folder, again.commit) == (first.folder, COMMIT)
    with pytest.raises(CheckpointError, match=r"'org/new': the hub cannot be reached and .*cache"):
        resolve_hub("org/new")
    with pytest.raises(CheckpointError, match="cannot be reached, so not streamed"):
        resolve_hub("org/tiny", stream=True)


def test_a_snapshot_without_weights_is_no_cached_model(hub: FileServer) -> None:
    streamed = resolve_hub("org/tiny", stream=True)
    assert streamed.weights is not None
    streamed.weights.close()
    hub.fault = lambda handler, number: handler.send(503, b"", {}) or True
    with pytest.raises(CheckpointError, match="the model is not in the cache"):
        resolve_hub("org/tiny")


def test_a_branch_that_moves_during_the_download_is_noticed(hub: FileServer) -> None:
    other = COMMIT[::-1]
    listed = hub.json_routes["/api/models/org/tiny"]

    def move(handler: object, number: int) -> bool:
        if number == 2:
            add_hub_model(hub, "org/tiny", FILES, other)
        return False

    hub.fault = move
    assert listed[1]["sha"] == COMMIT
    with pytest.raises(CheckpointError, match=f"moved from commit {COMMIT} to {other}"):
        resolve_hub("org/tiny")


def test_streaming_leaves_the_weights_on_the_server(hub: FileServer) -> None:
    model = resolve_hub("org/tiny", stream=True)
    assert not (model.folder / "model.safetensors").exists()
    assert (model.folder / "config.json").read_bytes() == FILES["config.json"]
    assert model.weights is not None
    np.testing.assert_array_equal(read(model.weights, "w"), WEIGHT)
    assert f"/resolve/{COMMIT}/" in model.weights.where("w")
    assert model.weights.label == f"hf://org/tiny@{COMMIT}"
    model.weights.close()


def test_streaming_a_sharded_model(hub: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_local")
    add_hub_model(hub, "org/sharded", SHARDS)
    model = resolve_hub("org/sharded", stream=True)
    assert model.weights is not None
    np.testing.assert_array_equal(read(model.weights, "b"), WEIGHT + 1)
    model.weights.close()
    headers = [sent for _, path, sent in hub.requests if path.endswith("2.safetensors")]
    assert headers
    assert all(sent["Authorization"] == "Bearer hf_local" for sent in headers)


def test_repositories_and_revisions_that_are_not_there(hub: FileServer) -> None:
    add_hub_error(hub, "/api/models/org/none", 401, "RepoNotFound")
    with pytest.raises(CheckpointError, match=r"'org/none': no such file or folder, and not on"):
        resolve_hub("org/none")
    add_hub_error(hub, "/api/models/org/tiny/revision/v9", 404, "RevisionNotFound")
    with pytest.raises(CheckpointError, match=r"'org/tiny' at 'v9': the repository has no such"):
        resolve_hub("org/tiny@v9")
    add_hub_error(hub, "/api/models/org/gated", 403, "GatedRepo")
    with pytest.raises(CheckpointError, match=r"'org/gated' is gated: accept its terms"):
        resolve_hub("org/gated")


def test_gated_files_say_how_to_get_access(hub: FileServer) -> None:
    add_hub_model(hub, "org/terms", FILES)
    for name in FILES:
        del hub.files[f"/org/terms/resolve/{COMMIT}/{name}"]
        add_hub_error(hub, f"/org/terms/resolve/{COMMIT}/{name}", 403, "GatedRepo")
    with pytest.raises(CheckpointError, match=r"'org/terms'.* is gated: accept its terms"):
        resolve_hub("org/terms")


def test_repositories_without_readable_weights(hub: FileServer) -> None:
    add_hub_model(hub, "org/gguf", {"model.gguf": b"", "config.json": b"{}"})
    with pytest.raises(CheckpointError, match=r"no weights in safetensors.*model\.gguf"):
        resolve_hub("org/gguf")
    add_hub_model(hub, "org/old", {"pytorch_model.bin": b"", "training_args.bin": b""})
    with pytest.raises(CheckpointError, match="only PyTorch pickles, which are not streamed"):
        resolve_hub("org/old", stream=True)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
        (
            ["pytorch_model.bin.index.json", "pytorch_model-1.bin", "optimizer.bin"],
            ["pytorch_model-1.bin"],
        ),
        (["model-1.safetensors", "consolidated.safetensors"], None),
        (
            ["model.safetensors.index.json", "model-1.safetensors", "consolidated.safetensors"],
            ["model-1.safetensors"],
        ),
        (
            [
                "model_index.json",
                "whole-pipeline.safetensors",
                "unet/diffusion_pytorch_model.safetensors",
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "vae/diffusion_pytorch_model.safetensors",
            ],
            ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"],
        ),
        (["a.safetensors", "b.safetensors", "model.bin"], ["a.safetensors", "b.safetensors"]),
        (["model.safetensors", "onnx/model.safetensors"], ["model.safetensors"]),
        (
            ["modules.json", "model.safetensors", "2_Dense/model.safetensors"],
            ["model.safetensors", "2_Dense/model.safetensors"],
        ),
    ],
)
def test_one_copy_of_the_weights_is_fetched(names: list[str], wanted: list[str] | None) -> None:
    assert _weight_files("org/m", names) == (names if wanted is None else wanted)


def test_references_of_the_hub_are_recognised() -> None:
    for reference in ("gpt2", "org/name", "org/name@v1", "hf://org/name"):
        assert is_hub_reference(reference)
    for reference in ("./folder", "/abs", "a/b/c", "s3://bucket/x", "org/name@", "a b"):
        assert not is_hub_reference(reference)
    with pytest.raises(CheckpointError, match=r"expected organisation/name or hf://"):
        resolve_hub("a/b/c")
