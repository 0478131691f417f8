"""Requests to an object store: which file system answers a URL, requests made again, objects read by ranges.

A request that fails as a store does now and then (500, slow down, a reset connection, an answer that does not come) is
made again after a while, and counted; one that fails for good raises an `OSError` whose `strerror` says why and whose
`filename` is the URL.
"""

import errno
import io
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from vistoken.errors import UserError

if TYPE_CHECKING:
    from vistoken.url import Url

T = TypeVar("T")

ATTEMPTS = 9  # with the pauses between them, a store may be away for about 20 seconds
PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds: the first pause, and what doubling leads to
TIMEOUT = 10.0  # seconds for a connection, and for which no byte comes before a request has failed
BLOCK = 8 << 20  # bytes of a range request where a file is read front to back
_AHEAD = 2  # blocks of a stream on their way while one is consumed
_BY_PYARROW = ("s3", "gs", "gcs")
_LASTING = re.compile(
    r"ACCESS_DENIED|NO_SUCH|INVALID|SIGNATURE|UNRECOGNIZED|MISSING|Permission|Unauthori[sz]ed|Forbidden"
    r"|credentials|HTTP status (3\d\d|4(?!08|29)\d\d)|resolve hostname",
    re.IGNORECASE,
)
_DENIED = re.compile(r"ACCESS_DENIED|INVALID_ACCESS|SIGNATURE|UNRECOGNIZED|Forbidden|Unauthori[sz]ed|credentials", re.I)


class Retries:
    """How many requests of this process were made again."""

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0

    def add(self) -> None:
        with self._lock:
            self._count += 1

    def take(self) -> int:
        """Those since the last call."""
        with self._lock:
            count, self._count = self._count, 0
        return count


retries = Retries()


class UnknownStore(UserError):
    """A URL of a kind that nothing here reads."""


def ask(url: "Url", request: Callable[[Any, str], T]) -> T:
    """`request(file system, key)`, again while it fails in a way that passes."""
    pause = PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request(*_resolve(url))
        except FileNotFoundError as error:
            raise absent(url) from error
        except UserError:
            raise
        except Exception as error:
            # pyarrow raises OSError; behind fsspec each client library raises what it likes
            if not isinstance(error, OSError) and url.scheme in _BY_PYARROW:
                raise
            why = re.sub(r"\s*\(Request ID.*?\)", "", str(error) or type(error).__name__)
            if _LASTING.search(why):
                code = errno.EACCES if _DENIED.search(why) else errno.ENOENT if "NO_SUCH" in why else errno.EIO
                if code == errno.EACCES and url.scheme == "s3":
                    why += " Are the credentials right (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)?"
                raise OSError(code, why, str(url)) from error
            if attempt == ATTEMPTS:
                raise OSError(errno.EIO, f"given up after {ATTEMPTS} attempts: {why}", str(url)) from error
        retries.add()
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, LONGEST_PAUSE)
    raise AssertionError("unreachable")


def absent(url: "Url") -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(url))


def _resolve(url: "Url") -> tuple[Any, str]:
    """The file system of `url`, and its key there."""
    if url.scheme in _BY_PYARROW:
        return file_system(url.scheme, url.parts[0], os.getpid()), url.url.partition("://")[2]
    return _any_file_system(url.url)


@lru_cache(maxsize=64)
def file_system(scheme: str, bucket: str, process: int) -> Any:
    """One for each process: after a fork two of them must not speak through one connection."""
    from pyarrow import fs

    if scheme != "s3":
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=1))  # ours are counted
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        region=region,
        endpoint_override=endpoint,
        connect_timeout=TIMEOUT,
        request_timeout=TIMEOUT,
        allow_delayed_open=True,  # a small object is one request
        background_writes=False,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),  # ours are counted
    )


def _any_file_system(url: str) -> tuple[Any, str]:
    from pyarrow import ArrowInvalid, fs

    with suppress(ArrowInvalid):
        return fs.FileSystem.from_uri(url)
    try:
        import fsspec

        system, key = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UnknownStore(f"{url}: neither pyarrow nor fsspec knows this kind of URL ({error})") from error
    return fs.PyFileSystem(fs.FSSpecHandler(system)), key


class RangeReader(io.RawIOBase):
    """A file of `size` bytes of which any range can be read: what a derived class has in `_read_at`."""

    def __init__(self, size: int):
        self._size, self._at = size, 0

    def _read_at(self, start: int, length: int) -> bytes:
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence], 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        content = self._read_at(self._at, min(len(buffer), self._size - self._at)) if self._at < self._size else b""
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


class Ranges(RangeReader):
    """An object by range requests."""

    def __init__(self, url: "Url"):
        self._url, self._file = url, None
        super().__init__(self._with_file(lambda file: file.size()))

    def _with_file(self, use: Callable[[Any], T]) -> T:
        def request(system: Any, key: str) -> T:
            if self._file is None:
                self._file = system.open_input_file(key)
            return use(self._file)

        return ask(self._url, request)

    def _read_at(self, start: int, length: int) -> bytes:
        return self._with_file(lambda file: file.read_at(length, start))

    def readall(self) -> bytes:
        content = self._read_at(self._at, self._size - self._at) if self._at < self._size else b""
        self._at += len(content)
        return content


class Ahead(Ranges):
    """The same front to back, `_AHEAD` blocks ahead of who reads."""

    def __init__(self, url: "Url"):
        super().__init__(url)
        self._pool = ThreadPoolExecutor(_AHEAD, "store")
        self._starts = iter(range(0, self._size, BLOCK))
        self._coming: deque[Future[bytes]] = deque()
        self._block = memoryview(b"")

    def seekable(self) -> bool:
        return False

    def readinto(self, buffer: Any) -> int:
        if not self._block:
            while len(self._coming) <= _AHEAD and (start := next(self._starts, None)) is not None:
                self._coming.append(self._pool.submit(self._read_at, start, min(BLOCK, self._size - start)))
            if not self._coming:
                return 0
            self._block = memoryview(self._coming.popleft().result())
        count = min(len(buffer), len(self._block))
        buffer[:count], self._block = self._block[:count], self._block[count:]
        self._at += count
        return count

    def readall(self) -> bytes:
        return io.RawIOBase.readall(self) or b""

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        super().close()
