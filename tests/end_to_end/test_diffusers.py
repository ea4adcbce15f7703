"""Tiny diffusion pipelines: saved by diffusers, merged, loaded back by diffusers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

import fusekit
from fusekit import CheckpointError
from tests.checkpoint.servers import FileServer, add_hub_model, serving

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
constants = pytest.importorskip("huggingface_hub.constants")

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers, of its own defaults
]

PARTS = ("unet", "vae", "text_encoder")
UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
VAE = {
    "block_out_channels": (8,),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "latent_channels": 4,
    "norm_num_groups": 4,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 55,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def unet(seed: int) -> Any:
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(**UNET)


def pipeline(seed: int, folder: Path) -> Any:
    """A text-to-image pipeline of random parts; `folder` gets its tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = ["!", "<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(seed)
    return diffusers.StableDiffusionPipeline(
        unet=unet(seed),
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(str(folder), model_max_length=16),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Two pipelines in folders `a` and `b`."""
    folder = tmp_path_factory.mktemp("pipelines")
    pipelines = [pipeline(seed, folder / "tokenizer") for seed in range(2)]
    for name, made in zip("ab", pipelines, strict=True):
        made.save_pretrained(folder / name)
    return folder, pipelines


def mean_of(*models: object, **options: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": str(model)} for model in models],
        "parameters": {"weight": 1.0},
        **options,
    }


def check_means(merged: Any, first: Any, second: Any) -> None:
    found = dict(merged.named_parameters())
    theirs = dict(second.named_parameters())
    assert found
    for name, values in first.named_parameters():
        torch.testing.assert_close(found[name], (values + theirs[name]) / 2, msg=name)


def check_pipeline(out: Path, pipelines: list[Any]) -> Any:
    merged = diffusers.StableDiffusionPipeline.from_pretrained(out)
    for part in PARTS:
        check_means(getattr(merged, part), *(getattr(each, part) for each in pipelines))
    return merged


def test_a_merged_pipeline_is_loaded_and_draws(
    saved: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    folder, pipelines = saved
    fusekit.merge(mean_of(folder / "a", folder / "b"), tmp_path / "out", threads=2)
    merged = check_pipeline(tmp_path / "out", pipelines)
    merged.set_progress_bar_config(disable=True)
    image = merged("a b c", num_inference_steps=1, output_type="np", height=8, width=8).images
    assert image.shape == (1, 8, 8, 3)
    assert np.isfinite(image).all()
    assert fusekit.verify(tmp_path / "out").ok


def test_parts_in_several_files_and_another_type(
    saved: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    folder, pipelines = saved
    pipelines[0].save_pretrained(tmp_path / "a", max_shard_size="20KB")
    recipe = mean_of(tmp_path / "a", folder / "b", out_dtype="float16")
    fusekit.merge(recipe, tmp_path / "out", threads=2, out_shard_size=20_000)
    assert (tmp_path / "out/unet/diffusion_pytorch_model.safetensors.index.json").is_file()
    merged = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "out", torch_dtype=torch.float16
    )
    for part in PARTS:
        theirs = dict(getattr(pipelines[1], part).named_parameters())
        found = dict(getattr(merged, part).named_parameters())
        for name, values in getattr(pipelines[0], part).named_parameters():
            assert torch.equal(found[name], ((values + theirs[name]) / 2).half()), name


def test_filters_and_modules_choose_parts(saved: tuple[Path, list[Any]], tmp_path: Path) -> None:
    folder, pipelines = saved
    recipe = mean_of(folder / "a", folder / "b")
    recipe["parameters"] = {}
    recipe["models"][0]["parameters"] = {"weight": [{"filter": "unet/", "value": 1}, {"value": 0}]}
    recipe["models"][1]["parameters"] = {"weight": [{"filter": "unet/", "value": 0}, {"value": 1}]}
    fusekit.merge(recipe, tmp_path / "filters", threads=2)
    chosen = {
        "merge_method": "passthrough",
        "modules": {
            "unet": {"models": [{"model": str(folder / "a")}]},
            "default": {"models": [{"model": str(folder / "b")}]},
        },
    }
    fusekit.merge(chosen, tmp_path / "modules", threads=2)
    for out in ("filters", "modules"):
        merged = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / out)
        for part in PARTS:
            source = getattr(pipelines[part != "unet"], part).state_dict()
            for name, values in getattr(merged, part).state_dict().items():
                assert torch.equal(values, source[name]), name


@pytest.mark.parametrize("shards", [None, "20KB"])
def test_a_part_alone_is_loaded_by_its_class(shards: str | None, tmp_path: Path) -> None:
    models = [unet(seed) for seed in range(2)]
    options = {} if shards is None else {"max_shard_size": shards}
    for name, model in zip("ab", models, strict=True):
        model.save_pretrained(tmp_path / name, **options)
    size = {} if shards is None else {"out_shard_size": 20_000}
    fusekit.merge(mean_of(tmp_path / "a", tmp_path / "b"), tmp_path / "out", threads=2, **size)
    merged = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out", use_safetensors=True)
    check_means(merged, *models)


# -- elsewhere than in a folder -------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def server(saved: tuple[Path, list[Any]]) -> Iterator[FileServer]:
    files = {f"/a/{name}": content for name, content in contents(saved[0] / "a").items()}
    with serving(FileServer(files)) as state:
        yield state


def test_a_pipeline_on_a_web_server(
    server: FileServer, saved: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    folder, pipelines = saved
    fusekit.merge(mean_of(f"{server.url}/a", folder / "b"), tmp_path / "out", threads=2)
    check_pipeline(tmp_path / "out", pipelines)


def test_a_pipeline_goes_to_a_url_and_is_read_and_verified_there(
    saved: tuple[Path, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, pipelines = saved
    memory = fsspec.filesystem("memory")
    try:
        copy = {"merge_method": "passthrough", "models": [{"model": str(folder / "a")}]}
        fusekit.merge(copy, "memory://pipelines/a", threads=2)
        assert fusekit.verify("memory://pipelines/a").ok
        recipe = mean_of("memory://pipelines/a", folder / "b")
        fusekit.merge(recipe, tmp_path / "out", threads=2)
    finally:
        memory.rm("/pipelines", recursive=True)
    check_pipeline(tmp_path / "out", pipelines)


@pytest.mark.parametrize("stream", [False, True])
def test_a_pipeline_of_the_hub_without_the_copy_beside_its_parts(
    saved: tuple[Path, list[Any]], stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, pipelines = saved
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving(FileServer()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        extra = {"whole-pipeline.safetensors": b"the same weights, for other programs"}
        add_hub_model(hub, "org/drawing", {**contents(folder / "a"), **extra})
        recipe = mean_of("org/drawing", folder / "b")
        fusekit.merge(recipe, tmp_path / "out", threads=2, stream=stream)
    check_pipeline(tmp_path / "out", pipelines)


def test_a_part_with_only_pickles_at_a_url_is_refused_while_planning(server: FileServer) -> None:
    server.files["/a/vae/diffusion_pytorch_model.bin"] = server.files.pop(
        "/a/vae/diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"vae/diffusion_pytorch_model\.bin: a PyTorch"):
        fusekit.plan(mean_of(f"{server.url}/a", f"{server.url}/a"))
