"""Models in a bucket of an S3 server are merged without being stored."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

import fusekit
from fusekit import CheckpointError

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")

KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
VALUES = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import boto3
    import s3fs

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    endpoint = f"http://127.0.0.1:{port}"
    for key, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(key, value)
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="models")
    for i, name in enumerate("ab"):
        body = save({"w": VALUES + i})
        client.put_object(Bucket="models", Key=f"{name}/model.safetensors", Body=body)
        client.put_object(Bucket="models", Key=f"{name}/config.json", Body=b'{"of": "s3"}')
    s3fs.S3FileSystem.clear_instance_cache()
    yield "s3://models"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_models_in_a_bucket_are_merged(bucket: str, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": f"{bucket}/{name}"} for name in "ab"],
        "parameters": {"weight": 1.0},
    }
    fusekit.merge(recipe, tmp_path / "out", threads=2)
    np.testing.assert_allclose(load_file(tmp_path / "out/model.safetensors")["w"], VALUES + 0.5)
    assert (tmp_path / "out/config.json").read_text().split() == ["{", '"of":', '"s3"', "}"]
    assert fusekit.verify(tmp_path / "out").ok


def test_a_pipeline_in_a_bucket_is_merged(bucket: str, tmp_path: Path) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    files = {
        "model_index.json": b'{"_class_name": "P", "unet": ["diffusers", "U"], "x": [null, null]}',
        "unet/config.json": b'{"of": "s3"}',
        "unet/diffusion_pytorch_model.safetensors": save({"w": VALUES}),
    }
    for name, body in files.items():
        client.put_object(Bucket="models", Key=f"p/{name}", Body=body)
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{bucket}/p"}]}
    fusekit.merge(recipe, tmp_path / "out", threads=2)
    for name in files:
        assert (tmp_path / "out" / name).is_file()
    merged = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    np.testing.assert_array_equal(merged["w"], VALUES)
    client.put_object(Bucket="models", Key="q/unet/diffusion_pytorch_model.bin", Body=b"pickle")
    client.put_object(Bucket="models", Key="q/model_index.json", Body=files["model_index.json"])
    with pytest.raises(CheckpointError, match="a PyTorch pickle, and at URLs only safetensors"):
        fusekit.plan({**recipe, "models": [{"model": f"{bucket}/q"}]})
