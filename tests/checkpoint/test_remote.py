"""Checkpoints read over HTTP and fsspec from real local servers."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save

from fusekit.checkpoint import ranges, remote
from fusekit.checkpoint.ranges import FsspecRanges, HttpRanges, MissingFileError
from fusekit.checkpoint.remote import fetch_companions, is_url, open_url
from fusekit.errors import CheckpointError
from tests.checkpoint.servers import FileServer, serving
from tests.checkpoint.zip_files import read

ARRAYS = {
    "a": np.arange(5000, dtype=np.float32),
    "b": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
    "c": np.zeros((0, 3), np.float32),
}
MODEL = save(ARRAYS)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving(FileServer({"/m/model.safetensors": MODEL})) as state:
        yield state


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(ranges, "MAX_WAIT_SECONDS", 0.01)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1000)


def check_arrays(source: Any) -> None:
    assert set(source.tensors) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(read(source, name), array)


# ---- HTTP -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["/m/model.safetensors", "/m", "/m/"])
def test_single_file_is_read_from_a_file_or_folder_address(server: FileServer, place: str) -> None:
    source = open_url(server.url + place)
    check_arrays(source)
    assert source.label == f"{server.url}/m/model.safetensors"
    source.close()


def test_only_the_header_and_the_wanted_chunks_travel(
    server: FileServer, small_chunks: None
) -> None:
    source = open_url(f"{server.url}/m/model.safetensors")
    asked_to_open = server.asked("/m/model.safetensors")
    assert asked_to_open == 3
    out = bytearray(40)
    source.read_into("a", 100, 110, memoryview(out))
    source.close()
    np.testing.assert_array_equal(np.frombuffer(out, np.float32), np.arange(100, 110))
    assert server.asked("/m/model.safetensors") <= asked_to_open + 1 + remote.READ_AHEAD


def test_any_range_is_assembled_from_chunks(server: FileServer, small_chunks: None) -> None:
    source = open_url(f"{server.url}/m/model.safetensors")
    for start, stop in ((0, 5000), (249, 251), (4999, 5000), (7, 7), (1000, 3001)):
        out = bytearray((stop - start) * 4)
        source.read_into("a", start, stop, memoryview(out))
        np.testing.assert_array_equal(np.frombuffer(out, np.float32), ARRAYS["a"][start:stop])
    source.close()


def test_threads_share_chunks_and_connections(server: FileServer, small_chunks: None) -> None:
    source = open_url(f"{server.url}/m/model.safetensors")

    def part(start: int) -> np.ndarray:
        out = bytearray(200)
        source.read_into("a", start, start + 50, memoryview(out))
        return np.frombuffer(out, np.float32)

    starts = range(0, 5000, 50)
    with ThreadPoolExecutor(8) as pool:
        for start, found in zip(starts, pool.map(part, starts), strict=True):
            np.testing.assert_array_equal(found, ARRAYS["a"][start : start + 50])
    source.close()
    requests = server.asked("/m/model.safetensors")
    assert requests <= 3 + -(-len(MODEL) // 1000) + 4
    assert server.connections <= 14 < requests


def test_sequential_requests_reuse_one_connection(server: FileServer) -> None:
    reader = HttpRanges(f"{server.url}/m/model.safetensors")
    before = server.connections
    for begin in range(20):
        assert reader.read(begin, begin + 100) == MODEL[begin : begin + 100]
    assert server.connections == before


def test_prefetched_chunks_are_there_before_the_read(
    server: FileServer, small_chunks: None
) -> None:
    source = open_url(f"{server.url}/m/model.safetensors")
    source.prefetch("a", 0, 1000)
    source.close()  # waits for what has begun
    fetched = server.asked("/m/model.safetensors")
    assert fetched > 3


def test_sharded_checkpoint_through_its_index(server: FileServer) -> None:
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors", "c": "y.safetensors"}}
    server.files = {
        "/s/model.safetensors.index.json": json.dumps(index).encode(),
        "/s/x.safetensors": save({"a": ARRAYS["a"]}),
        "/s/y.safetensors": save({"b": ARRAYS["b"], "c": ARRAYS["c"]}),
    }
    for place in ("/s", "/s/model.safetensors.index.json"):
        source = open_url(server.url + place)
        check_arrays(source)
        assert source.where("b") == f"{server.url}/s/y.safetensors"
        files = source.identity()["files"]
        assert [file["url"].rpartition("/")[2] for file in files] == [
            "x.safetensors",
            "y.safetensors",
        ]
        source.close()

    del server.files["/s/y.safetensors"]
    with pytest.raises(MissingFileError, match=r"/s/y\.safetensors: not found"):
        open_url(f"{server.url}/s")
    server.files["/s/y.safetensors"] = save({"b": ARRAYS["b"]})
    with pytest.raises(CheckpointError, match=r"tensor 'c' is not in 'y\.safetensors'"):
        open_url(f"{server.url}/s")


def test_query_of_a_signed_address_is_sent_and_not_shown(server: FileServer) -> None:
    source = open_url(f"{server.url}/m/model.safetensors?signature=secret")
    assert "secret" not in source.label
    assert "secret" not in json.dumps(source.identity())
    check_arrays(source)
    source.close()
    assert remote.beside("https://h/a/b.json?s=1", "c") == "https://h/a/c?s=1"


def test_a_server_without_byte_ranges_is_refused_at_once(server: FileServer) -> None:
    server.ranges = False
    with pytest.raises(CheckpointError, match=r"ignores byte ranges \(status 200, expected 206\)"):
        open_url(f"{server.url}/m/model.safetensors")
    assert server.asked("/m/model.safetensors") == 1


@pytest.mark.parametrize("etags", [True, False])
def test_a_file_that_changes_while_it_is_read_is_noticed(
    server: FileServer, small_chunks: None, etags: bool
) -> None:
    server.etags = etags
    if not etags:
        server.headers["Last-Modified"] = "Mon, 01 Jan 2024 00:00:00 GMT"
    source = open_url(f"{server.url}/m/model.safetensors")
    server.files["/m/model.safetensors"] = save(ARRAYS | {"a": ARRAYS["a"] + 1})
    server.headers.update({} if etags else {"Last-Modified": "Tue, 02 Jan 2024 00:00:00 GMT"})
    changed = "ETag" if etags else "Last-Modified"
    with pytest.raises(CheckpointError, match=f"changed while it was read: {changed} was"):
        read(source, "a")
    source.close()


def test_a_file_that_grows_or_shrinks_is_noticed(server: FileServer) -> None:
    reader = HttpRanges(f"{server.url}/m/model.safetensors")
    server.files["/m/model.safetensors"] = MODEL + b"more"
    with pytest.raises(CheckpointError, match=f"{len(MODEL)} bytes before, now {len(MODEL) + 4}"):
        reader.read(0, 10)
    server.files["/m/model.safetensors"] = MODEL[:100]
    with pytest.raises(CheckpointError, match="changed while it was read"):
        reader.read(200, 210)


def drop(handler: Any, number: int) -> bool:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True
    return True


def overload(handler: Any, number: int) -> bool:
    handler.send(503, b"later", {"Retry-After": "1"})
    return True


def cut_short(handler: Any, number: int) -> bool:
    asked = handler.headers["Range"].removeprefix("bytes=")
    first, _, last = asked.partition("-")
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {asked}/{len(MODEL)}")
    handler.send_header("Content-Length", str(int(last) - int(first) + 1))
    handler.end_headers()
    handler.wfile.flush()
    return drop(handler, number)


def chunked_and_short(handler: Any, number: int) -> bool:
    asked = handler.headers["Range"].removeprefix("bytes=")
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {asked}/{len(MODEL)}")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"0\r\n\r\n")
    return True


@pytest.mark.parametrize("trouble", [drop, overload, cut_short, chunked_and_short])
def test_passing_trouble_is_retried(server: FileServer, trouble: Any) -> None:
    server.fault = lambda handler, number: number in {1, 2, 4} and trouble(handler, number)
    source = open_url(f"{server.url}/m/model.safetensors")
    check_arrays(source)
    source.close()


def test_lasting_trouble_is_reported_with_its_cause(server: FileServer) -> None:
    server.fault = overload
    with pytest.raises(CheckpointError, match="no answer after 5 attempts: status 503"):
        HttpRanges(f"{server.url}/m/model.safetensors")
    assert server.asked("/m/model.safetensors") == 5
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(CheckpointError, match=r"after 5 attempts.*refused"):
        HttpRanges(f"http://127.0.0.1:{port}/model.safetensors")


@pytest.mark.parametrize(
    ("status", "problem"),
    [(403, "access denied"), (401, "access denied"), (418, "status 418, expected 206")],
)
def test_refusals_are_not_retried(server: FileServer, status: int, problem: str) -> None:
    server.fault = lambda handler, number: handler.send(status, b"", {}) or True
    with pytest.raises(CheckpointError, match=problem):
        HttpRanges(f"{server.url}/m/model.safetensors")
    assert server.asked("/m/model.safetensors") == 1


def test_wrong_answers_are_refused(server: FileServer) -> None:
    reader = HttpRanges(f"{server.url}/m/model.safetensors")

    def shifted(handler: Any, number: int) -> bool:
        size = len(MODEL)
        handler.send(206, b"x" * 10, {"Content-Range": f"bytes 1-10/{size}"})
        return True

    server.fault = shifted
    with pytest.raises(CheckpointError, match="asked for bytes 0 to 10, the server answered with"):
        reader.read(0, 10)

    def packed(handler: Any, number: int) -> bool:
        extra = {"Content-Range": f"bytes 0-9/{len(MODEL)}", "Content-Encoding": "gzip"}
        handler.send(206, b"x" * 10, extra)
        return True

    server.fault = packed
    with pytest.raises(CheckpointError, match="sent with encoding 'gzip'"):
        reader.read(0, 10)
    server.fault = None
    assert reader.read(0, 10) == MODEL[:10]


def test_missing_and_empty_files(server: FileServer) -> None:
    with pytest.raises(CheckpointError, match=r"no weights found, expected model\.safetensors or"):
        open_url(f"{server.url}/nothing")
    with pytest.raises(MissingFileError, match="not found"):
        open_url(f"{server.url}/m/other.safetensors")
    server.files["/m/model.safetensors"] = b""
    with pytest.raises(CheckpointError, match="empty"):
        open_url(f"{server.url}/m/model.safetensors")
    server.files["/m/model.safetensors"] = b"abc"
    with pytest.raises(CheckpointError, match="expected at least 8"):
        open_url(f"{server.url}/m/model.safetensors")
    server.files["/m/model.safetensors"] = MODEL[:-1]
    with pytest.raises(CheckpointError, match="truncated"):
        open_url(f"{server.url}/m/model.safetensors")


def test_redirects_are_followed_once_and_renewed_when_they_expire(server: FileServer) -> None:
    with serving(FileServer({"/signed/1": MODEL, "/signed/2": MODEL})) as storage:
        server.redirects["/r/model.safetensors"] = f"{storage.url}/signed/1"
        reader = HttpRanges(f"{server.url}/r/model.safetensors", {"Authorization": "Bearer key"})
        for _ in range(3):
            assert reader.read(5, 9) == MODEL[5:9]
        assert server.asked("/r/model.safetensors") == 1
        assert storage.asked("/signed/1") == 4
        assert server.requests[0][2]["Authorization"] == "Bearer key"
        assert all("Authorization" not in headers for _, _, headers in storage.requests)

        del storage.files["/signed/1"]
        server.redirects["/r/model.safetensors"] = f"{storage.url}/signed/2"
        assert reader.read(5, 9) == MODEL[5:9]
        assert storage.asked("/signed/2") == 1


def test_the_environments_proxy_is_used(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    server.fault = lambda handler, number: seen.append(handler.path)  # type: ignore[func-returns-value]
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    reader = HttpRanges("http://models.invalid/m/model.safetensors")
    assert reader.read(0, 4) == MODEL[:4]
    assert seen[0] == "http://models.invalid/m/model.safetensors"


# ---- fsspec -----------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    files.pipe("/models/m/model.safetensors", MODEL)
    yield files
    files.rm("/models", recursive=True)


@pytest.mark.parametrize("place", ["/model.safetensors", "", "/"])
def test_fsspec_urls_are_read_by_range(memory: Any, small_chunks: None, place: str) -> None:
    source = open_url(f"memory://models/m{place}")
    check_arrays(source)
    source.close()


def test_fsspec_file_that_changes_is_noticed(memory: Any) -> None:
    source = open_url("memory://models/m/model.safetensors")
    memory.pipe("/models/m/model.safetensors", save(ARRAYS | {"a": ARRAYS["a"] + 1}))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        read(source, "a")
    source.close()


def test_fsspec_trouble_names_the_address(memory: Any) -> None:
    with pytest.raises(MissingFileError, match=r"memory://models/m/x\.safetensors: not found"):
        open_url("memory://models/m/x.safetensors")
    with pytest.raises(CheckpointError, match="no weights found"):
        open_url("memory://models/none")
    with pytest.raises(CheckpointError, match="nonsense://m: cannot be opened"):
        FsspecRanges("nonsense://m")
    memory.pipe("/models/dir.safetensors/x", b"")
    with pytest.raises(MissingFileError, match="not a file"):
        FsspecRanges("memory://models/dir.safetensors")


def test_companion_files_are_copied_from_beside_the_weights(memory: Any, tmp_path: Path) -> None:
    memory.pipe("/models/m/config.json", b"{}")
    memory.pipe("/models/m/tokenizer.model", b"\0\1")
    for number, place in enumerate(("", "/model.safetensors")):
        folder = fetch_companions(f"memory://models/m{place}", tmp_path / str(number))
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer.model"]
        assert (folder / "tokenizer.model").read_bytes() == b"\0\1"


def test_companion_files_over_http(server: FileServer, tmp_path: Path) -> None:
    server.files["/m/config.json"] = b"{}"
    folder = fetch_companions(f"{server.url}/m", tmp_path / "m")
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_urls_are_told_from_paths_and_hub_references() -> None:
    assert is_url("s3://bucket/model")
    assert is_url("https://host/model.safetensors")
    assert is_url("memory://m")
    for reference in ("org/name", "./folder", "hf://org/name", "file:///x", "a:/b", "C:\\x"):
        assert not is_url(reference)


# ---- S3 ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    pytest.importorskip("s3fs")
    boto3 = pytest.importorskip("boto3")
    moto_server = pytest.importorskip("moto.server")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="models")
        yield client
        server.stop()


def test_s3_checkpoint_is_read_by_range(s3: Any, small_chunks: None, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors", "c": "y.safetensors"}}
    for name, data in {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "x.safetensors": save({"a": ARRAYS["a"]}),
        "y.safetensors": save({"b": ARRAYS["b"], "c": ARRAYS["c"]}),
        "config.json": b"{}",
    }.items():
        s3.put_object(Bucket="models", Key=f"m/{name}", Body=data)
    source = open_url("s3://models/m")
    barrier = threading.Barrier(4)

    def whole(_: int) -> np.ndarray:
        barrier.wait(10)
        return read(source, "a")

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(whole, range(4)):
            np.testing.assert_array_equal(found, ARRAYS["a"])
    check_arrays(source)
    assert "ETag" in source.identity()["files"][0]
    source.close()
    folder = fetch_companions("s3://models/m", tmp_path)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_s3_object_that_changes_is_noticed(s3: Any) -> None:
    s3.put_object(Bucket="models", Key="c/model.safetensors", Body=MODEL)
    source = open_url("s3://models/c/model.safetensors")
    changed = save(ARRAYS | {"a": ARRAYS["a"] + 1})
    s3.put_object(Bucket="models", Key="c/model.safetensors", Body=changed)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        read(source, "a")
    source.close()
    with pytest.raises(MissingFileError, match=r"s3://models/c/no\.safetensors: not found"):
        open_url("s3://models/c/no.safetensors")
