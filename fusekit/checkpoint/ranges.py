"""Files elsewhere, read by byte range: over HTTP, or through any fsspec file system.

A reader checks on every read that the file is still the one it opened.
"""

from __future__ import annotations

import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urljoin, urlsplit

from fusekit.errors import CheckpointError

if TYPE_CHECKING:
    import urllib3

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
ATTEMPTS = 5
BACKOFF_SECONDS = 0.5
MAX_WAIT_SECONDS = 60.0

_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_EXPIRED = frozenset({401, 403, 404, 410})
_SECRETS = frozenset({"authorization", "cookie"})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_VALIDATORS = ("ETag", "Last-Modified")
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "oci": "ocifs",
    "oss": "ossfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
"""What brings a scheme's file system."""

_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created", "generation", "md5")


class MissingFileError(CheckpointError):
    """A remote file does not exist."""


class RangeReader(ABC):
    """A file whose bytes are read by position, from several threads at once."""

    label: str
    size: int

    @abstractmethod
    def read(self, begin: int, end: int) -> bytes:
        """The bytes `[begin, end)`, all of them.

        Raises:
            CheckpointError: they cannot be had, or the file has changed since it was opened.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What pins the file: address, size and the server's version mark."""


def open_ranges(url: str, headers: Mapping[str, str] | None = None) -> RangeReader:
    """The file at an HTTP(S) or fsspec URL (`s3://`, `gs://`, `memory://`, ...).

    Args:
        url: the file's address.
        headers: sent with every HTTP request to the address' own host.

    Raises:
        MissingFileError: nothing there.
        CheckpointError: unreachable, forbidden, or a server without byte ranges.
    """
    if urlsplit(url).scheme in {"http", "https"}:
        return HttpRanges(url, headers)
    return FsspecRanges(url)


class HttpRanges(RangeReader):
    """A file on a web server that answers Range requests.

    Connections are kept open and reused. A redirect (a hub's signed download address) is followed
    once and then used directly until it expires. Lost connections, timeouts and overload answers
    are retried with growing pauses.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(url)
        self.label = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        self._url = url
        self._location = url
        self._headers = {"Accept-Encoding": "identity", **(headers or {})}
        self._validators: dict[str, str] = {}
        self.size = -1
        self.read(0, 1)

    def read(self, begin: int, end: int) -> bytes:
        if begin == end:
            return b""
        problem = ""
        for attempt in range(ATTEMPTS):
            answer, pause = self._attempt(begin, end)
            if isinstance(answer, bytes):
                return answer
            problem = answer
            if attempt + 1 < ATTEMPTS:
                time.sleep(min(MAX_WAIT_SECONDS, max(pause, BACKOFF_SECONDS * 2**attempt)))
        raise CheckpointError(f"{self.label}: no answer after {ATTEMPTS} attempts: {problem}")

    def identity(self) -> dict[str, Any]:
        return {"url": self.label, "size": self.size, **self._validators}

    def _attempt(self, begin: int, end: int) -> tuple[bytes | str, float]:
        """The bytes; or what went wrong for now, and how long the server asks to wait."""
        import urllib3

        location = self._location
        try:
            response = self._request(location, begin, end)
        except urllib3.exceptions.HTTPError as error:
            return _reason(error), 0.0
        try:
            if response.status in _TRANSIENT:
                return f"status {response.status}", _retry_after(response.headers)
            if response.status in _EXPIRED and location != self._url:
                self._location = self._url
                return f"status {response.status} from {urlsplit(location).netloc}", 0.0
            self._check(response, begin, end)
            data: bytes = response.read(end - begin)
        except urllib3.exceptions.HTTPError as error:
            return _reason(error), 0.0
        finally:
            response.close()  # keeps the connection if the body was read to its end
        if len(data) != end - begin:
            return f"{len(data)} bytes of {end - begin}", 0.0
        self._location = _final_address(location, response)
        return data, 0.0

    def _request(self, url: str, begin: int, end: int) -> urllib3.BaseHTTPResponse:
        import urllib3

        own_host = urlsplit(url)[:2] == urlsplit(self._url)[:2]
        headers = {
            name: value
            for name, value in self._headers.items()
            if own_host or name.lower() not in _SECRETS
        }
        return _manager(urlsplit(url)).request(
            "GET",
            url,
            headers={**headers, "Range": f"bytes={begin}-{end - 1}"},
            preload_content=False,
            retries=urllib3.Retry(total=None, connect=0, read=0, other=0, status=0, redirect=8),
            timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
        )

    def _check(self, response: urllib3.BaseHTTPResponse, begin: int, end: int) -> None:
        """That the answer is the asked range of the same file."""
        status, headers = response.status, response.headers
        if status in {404, 410}:
            raise MissingFileError(f"{self.label}: not found (status {status})")
        if status in {401, 403}:
            raise CheckpointError(f"{self.label}: access denied (status {status})")
        if status == 200:
            raise CheckpointError(
                f"{self.label}: the server ignores byte ranges (status 200, expected 206); "
                "download the file instead"
            )
        if status == 416:
            raise CheckpointError(
                f"{self.label}: has no bytes {begin} to {end}: empty, or changed while it was read"
            )
        if status != 206:
            raise CheckpointError(f"{self.label}: status {status}, expected 206")
        found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
        if found is None or (int(found[1]), int(found[2]) + 1) != (begin, end):
            raise CheckpointError(
                f"{self.label}: asked for bytes {begin} to {end}, the server answered with "
                f"{headers.get('Content-Range')!r}"
            )
        if headers.get("Content-Encoding", "identity") != "identity":
            raise CheckpointError(
                f"{self.label}: sent with encoding {headers['Content-Encoding']!r}, "
                "expected the bytes as they are"
            )
        self._check_unchanged(int(found[3]), headers)

    def _check_unchanged(self, size: int, headers: Mapping[str, str]) -> None:
        validators = {name: headers[name] for name in _VALIDATORS if name in headers}
        if self.size < 0:
            self.size, self._validators = size, validators
            return
        if size != self.size:
            raise CheckpointError(
                f"{self.label}: changed while it was read: {self.size} bytes before, now {size}"
            )
        for name, before in self._validators.items():
            now = validators.get(name)
            if now != before:
                raise CheckpointError(
                    f"{self.label}: changed while it was read: {name} was {before}, now {now}"
                )


_managers: dict[str, urllib3.PoolManager] = {}
_managers_lock = threading.Lock()


def _manager(address: SplitResult) -> urllib3.PoolManager:
    """The connection pool for an address: direct, or through the proxy the environment names."""
    import urllib.request

    import urllib3

    proxy = urllib.request.getproxies().get(address.scheme, "")
    if proxy and urllib.request.proxy_bypass(address.hostname or ""):
        proxy = ""
    with _managers_lock:
        if proxy not in _managers:
            _managers[proxy] = (
                urllib3.ProxyManager(proxy, maxsize=32)
                if proxy
                else urllib3.PoolManager(maxsize=32)
            )
        return _managers[proxy]


def _final_address(url: str, response: urllib3.BaseHTTPResponse) -> str:
    for step in response.retries.history if response.retries else ():
        if step.redirect_location:
            url = urljoin(url, step.redirect_location)
    return url


def _retry_after(headers: Mapping[str, str]) -> float:
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", None) or error
    return f"{type(cause).__name__}: {cause}"


def open_file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, with its own configuration, and the path in it.

    Raises:
        CheckpointError: an unknown scheme, or one whose package is not installed.
    """
    try:
        import fsspec

        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        package = _PACKAGES.get(urlsplit(url).scheme)
        hint = f" (pip install {package})" if package and isinstance(error, ImportError) else ""
        raise CheckpointError(f"{url}: cannot be opened: {error}{hint}") from None
    return fs, str(path)


class FsspecRanges(RangeReader):
    """A file on any file system fsspec knows, with that file system's own configuration."""

    def __init__(self, url: str) -> None:
        self.label = url
        self._fs, self._path = open_file_system(url)
        self._stamps, self.size = self._info()

    def read(self, begin: int, end: int) -> bytes:
        if begin == end:
            return b""
        try:
            data: bytes = self._fs.cat_file(self._path, start=begin, end=end)
        except Exception as error:
            raise self._unreadable(error) from None
        stamps, size = self._info()
        if (stamps, size) != (self._stamps, self.size) or len(data) != end - begin:
            raise CheckpointError(
                f"{self.label}: changed while it was read: "
                f"{self.size} bytes {self._stamps} before, now {size} bytes {stamps}"
            )
        return data

    def identity(self) -> dict[str, Any]:
        return {"url": self.label, "size": self.size, **self._stamps}

    def _info(self) -> tuple[dict[str, str], int]:
        try:
            self._fs.invalidate_cache(self._path)
            info = self._fs.info(self._path)
        except Exception as error:
            raise self._unreadable(error) from None
        if info.get("type") == "directory" or not isinstance(info.get("size"), int):
            raise MissingFileError(f"{self.label}: not a file of known size")
        return {key: str(info[key]) for key in _STAMPS if info.get(key) is not None}, info["size"]

    def _unreadable(self, error: Exception) -> CheckpointError:
        """File systems raise errors of their own libraries, so any of them ends up here."""
        if isinstance(error, FileNotFoundError):
            return MissingFileError(f"{self.label}: not found")
        return CheckpointError(f"{self.label}: cannot be read: {type(error).__name__}: {error}")
