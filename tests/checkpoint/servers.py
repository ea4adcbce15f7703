"""Real local HTTP servers for the remote tests: byte ranges, faults on request, a small hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    import pytest


@dataclass
class FileServer:
    """What a local server serves, what goes wrong, and what it was asked.

    `fault(handler, number)` may answer the n-th GET itself and return True.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    etags: bool = True
    fault: Callable[[Any, int], bool] | None = None
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    connections: int = 0
    url: str = ""
    json_routes: dict[str, tuple[int, Any, dict[str, str]]] = field(default_factory=dict)

    def asked(self, path: str) -> int:
        return sum(1 for method, found, _ in self.requests if method == "GET" and found == path)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.state.connections += 1

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        state = self.server.state
        path = unquote(urlsplit(self.path).path)
        state.requests.append((self.command, path, dict(self.headers)))
        number = sum(1 for method, *_ in state.requests if method == "GET")
        if state.fault is not None and self.command == "GET" and state.fault(self, number):
            return
        if path in state.json_routes:
            status, body, extra = state.json_routes[path]
            self.send(
                status, json.dumps(body).encode(), {"Content-Type": "application/json"} | extra
            )
        elif path in state.redirects:
            self.send(302, b"", {"Location": state.redirects[path]})
        elif path in state.files:
            self.send_file(state.files[path])
        else:
            self.send(404, b"not here", {})

    def send_file(self, data: bytes) -> None:
        state = self.server.state
        extra = dict(state.headers)
        if state.etags:
            extra["ETag"] = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        asked = self.headers.get("Range")
        if asked is None or not state.ranges:
            self.send(200, data, extra)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        begin, end = int(first), min(int(last) + 1, len(data))
        if begin >= len(data):
            self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        extra["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        self.send(206, data[begin:end], extra)

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    state: FileServer

    def handle_error(self, *_: Any) -> None:
        """Dropped connections are part of the tests."""


@contextmanager
def serving(state: FileServer) -> Iterator[FileServer]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.state = state
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def add_hub_model(
    state: FileServer, repo: str, files: dict[str, bytes], commit: str = COMMIT
) -> None:
    """The hub's answers for one repository: information, tree and files at a commit."""
    information = {
        "id": repo,
        "modelId": repo,
        "sha": commit,
        "siblings": [{"rfilename": name} for name in files],
        "tags": [],
    }
    tree = [
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name, data in files.items()
    ]
    for address in (
        f"/api/models/{repo}",
        f"/api/models/{repo}/revision/main",
        f"/api/models/{repo}/revision/{commit}",
    ):
        state.json_routes[address] = (200, information, {})
    state.json_routes[f"/api/models/{repo}/tree/{commit}"] = (200, tree, {})
    for name, data in files.items():
        state.files[f"/{repo}/resolve/{commit}/{name}"] = data
    state.headers["X-Repo-Commit"] = commit


def add_hub_error(state: FileServer, path: str, status: int, code: str) -> None:
    state.json_routes[path] = (
        status,
        {"error": code},
        {"X-Error-Code": code, "X-Error-Message": code},
    )


@contextmanager
def s3_bucket(environment: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket of a local S3 server, to which the environment leads."""
    import pytest

    s3fs = pytest.importorskip("s3fs")
    boto3 = pytest.importorskip("boto3")
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment.setenv("AWS_ACCESS_KEY_ID", "test")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
    environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
    environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="models")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield "s3://models"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
