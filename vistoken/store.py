"""Files on a disk or in an object store, by one interface: pathlib's.

`location("s3://bucket/folder")` is a `Url`, `location("folder")` a `Path`; a flag takes either with
`type=location`. A `Url` has what this project uses of `Path` (`/`, `name`, `parent`, `open("rb")`, `read_bytes`,
`exists`, `iterdir`, `glob`, `stat`, `unlink`, ...), so most code never asks which of the two it holds. Where it must
(locks, renames, memory maps), `isinstance(where, Url)` says it.

s3:// and gs:// and whatever else pyarrow reaches go through pyarrow; other schemes through fsspec, where it is
installed. file:// is the disk. Credentials, region and endpoint of S3 come from the usual variables and files
(AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL, ...).

A store has no appends, renames or locks. An object is put whole, and until then it is absent or the former one. A
request that fails as a store does now and then (500, slow down, a reset connection) is made again after a while, and
counted; one that fails for good raises an `OSError` whose `strerror` says why and whose `filename` is the URL.
"""

import errno
import fnmatch
import io
import os
import posixpath
import random
import re
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

from vistoken.errors import UserError

A = TypeVar("A")
T = TypeVar("T")

ATTEMPTS = 9  # with the pauses between them, a store may be away for about 20 seconds
PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds: the first pause, and what doubling leads to
BLOCK = 8 << 20  # bytes of a range request where a file is read front to back
_AHEAD = 2  # blocks of a stream on their way while one is consumed
_LASTING = re.compile(
    r"ACCESS_DENIED|NO_SUCH|INVALID|SIGNATURE|UNRECOGNIZED|MISSING|Permission|Unauthori[sz]ed|Forbidden"
    r"|credentials|HTTP status (3\d\d|4(?!08|29)\d\d)|resolve hostname",
    re.IGNORECASE,
)
_DENIED = re.compile(r"ACCESS_DENIED|INVALID_ACCESS|SIGNATURE|UNRECOGNIZED|Forbidden|Unauthori[sz]ed|credentials", re.I)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def location(text: "str | Path | Url") -> "Path | Url":
    """What `text` names: a `Url` where it has a scheme (but file://), else a `Path`."""
    if isinstance(text, Path | Url) or not _SCHEME.match(text):
        return text if isinstance(text, Url) else Path(text)
    if text.startswith("file://"):
        return Path(unquote(urlsplit(text).path))
    return Url(text)


def within(folder: "Path | Url", name: str) -> "Path | Url":
    """`folder / name`, or what `name` says where it is a whole URL."""
    return location(name) if _SCHEME.match(name) else folder / name


class Stat(NamedTuple):
    """What a store knows of an object, under the names of `os.stat_result`."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True, order=True)
class Url:
    """An object, or a folder of objects, in a store; the part of `pathlib.Path`'s interface that a store can keep."""

    url: str

    def __post_init__(self) -> None:
        scheme, _, rest = self.url.partition("://")
        object.__setattr__(self, "url", f"{scheme.lower()}://{posixpath.normpath(rest).lstrip('/')}")

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, other: "str | PurePath | Url") -> "Path | Url":
        """As with paths, what stands for itself (a URL, an absolute path) stays what it is."""
        where = other if isinstance(other, Url) else location(str(other))
        if isinstance(where, Url) or where.is_absolute():
            return where
        return Url(f"{self.url}/{where.as_posix()}")

    @property
    def scheme(self) -> str:
        return self.url.partition("://")[0]

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.url.partition("://")[2].split("/"))

    @property
    def name(self) -> str:
        return self.parts[-1]

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> "Url":
        return self if len(self.parts) == 1 else Url(self.url.rpartition("/")[0])

    @property
    def parents(self) -> "list[Url]":
        found, at = [], self
        while at.parent != at:
            at = at.parent
            found.append(at)
        return found

    def with_name(self, name: str) -> "Url":
        return Url(f"{self.parent.url}/{name}")

    def with_suffix(self, suffix: str) -> "Url":
        return self.with_name(Path(self.name).with_suffix(suffix).name)

    def is_absolute(self) -> bool:
        return True

    def absolute(self) -> "Url":
        return self

    resolve = expanduser = absolute

    def is_relative_to(self, other: object) -> bool:
        return isinstance(other, Url) and (self == other or other in self.parents)

    def relative_to(self, other: "Url") -> Path:
        if not self.is_relative_to(other):
            raise ValueError(f"{self} does not lie in {other}")
        return Path(self.url[len(other.url) + 1 :])

    def exists(self) -> bool:
        return self._kind() != "NotFound"

    def is_file(self) -> bool:
        return self._kind() == "File"

    def is_dir(self) -> bool:
        """Whether any object lies below."""
        return self._kind() == "Directory"

    def _kind(self) -> str:
        return self._info().type.name

    def _info(self) -> Any:
        return _ask(self, lambda system, key: system.get_file_info(key))

    def stat(self) -> Stat:
        info = self._info()
        if info.type.name == "NotFound":
            raise _absent(self)
        return Stat(info.size or 0, info.mtime_ns or 0)

    def iterdir(self) -> "Iterator[Url]":
        """What lies in this folder, in name order. Raises `FileNotFoundError` where nothing does."""
        from pyarrow.fs import FileSelector

        found = _ask(self, lambda system, key: system.get_file_info(FileSelector(key)))
        return iter(sorted(Url(f"{self.url}/{info.base_name}") for info in found))

    def glob(self, pattern: str) -> "Iterator[Url]":
        """As `Path.glob`, without `**`."""
        name, _, below = pattern.partition("/")
        try:
            children = [child for child in self.iterdir() if fnmatch.fnmatchcase(child.name, name)]
        except FileNotFoundError:
            return
        for child in children:
            if below:
                yield from child.glob(below)
            else:
                yield child

    def read_bytes(self) -> bytes:
        def read(system: Any, key: str) -> bytes:
            with system.open_input_file(key) as file:
                return file.read()

        return _ask(self, read)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb", buffering: int = BLOCK) -> BinaryIO:
        """To read and to seek; a request is for `buffering` bytes or more (0: as many as are read).

        Writing is `put`, whole.
        """
        if mode != "rb":
            raise ValueError(f"{self}: mode {mode!r}: an object is opened to be read; it is written whole, with `put`")
        return io.BufferedReader(_Ranges(self), buffering) if buffering else _Ranges(self)  # type: ignore[return-value]

    def write_bytes(self, content: bytes) -> None:
        put(self, content)

    def mkdir(self, *args: object, **options: object) -> None:
        """A store has no folders of its own."""

    def unlink(self, missing_ok: bool = False) -> None:
        attempts = 0

        def delete(system: Any, key: str) -> None:
            nonlocal attempts
            attempts += 1
            system.delete_file(key)

        try:
            _ask(self, delete)
        except FileNotFoundError:
            if not missing_ok and attempts == 1:  # a later attempt finds that the one before did its work
                raise


Location = Path | Url


def read_range(where: Location, start: int, length: int) -> bytes:
    """`length` bytes from `start`; fewer at the end of the file."""
    with where.open("rb", buffering=0) as file:
        file.seek(start)
        return file.read(length)


def stream(where: Location) -> BinaryIO:
    """A file to be read once from front to back: of a store, the next blocks are on their way while one is used."""
    return where.open("rb") if isinstance(where, Path) else io.BufferedReader(_Ahead(where), 1 << 20)


def read_ahead(read: Callable[[A], T], things: Iterable[A], threads: int = 16) -> Iterator[T]:
    """`map(read, things)` with this many requests on their way: a store answers slowly, but many at a time."""
    with ThreadPoolExecutor(threads, "store") as pool:
        coming: deque[Future[T]] = deque()
        for thing in things:
            coming.append(pool.submit(read, thing))
            if len(coming) == 2 * threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def put(url: Url, content: bytes | BinaryIO) -> None:
    """Put an object whole; a file as `content` is read from its beginning, again for every attempt.

    For the disk, see `jobs.files.atomic_write`, which takes either kind of place.
    """

    def write(system: Any, key: str) -> None:
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        file.seek(0)
        with system.open_output_stream(key) as out:  # an upload that fails, or whose process dies, leaves nothing
            while block := file.read(BLOCK):
                out.write(block)

    _ask(url, write)


def folder_stats(folder: Url) -> dict[str, Stat]:
    """Every object in `folder` by its name: a thousand come with a request, where `stat` takes one each."""
    from pyarrow.fs import FileSelector

    found = _ask(folder, lambda system, key: system.get_file_info(FileSelector(key, allow_not_found=True)))
    return {info.base_name: Stat(info.size, info.mtime_ns or 0) for info in found if info.type.name == "File"}


def remove_tree(where: Location) -> None:
    """Delete a folder and what is in it; one that is not there is no error."""
    if isinstance(where, Path):
        shutil.rmtree(where, ignore_errors=True)
        return
    with suppress(FileNotFoundError):
        _ask(where, lambda system, key: system.delete_dir(key))


@contextmanager
def local_copy(where: Location) -> Iterator[Path]:
    """The file or folder as one on the disk: a path is itself; of a URL a copy, which goes at the end of the block.

    A file that was memory-mapped in the block stays readable after it. Raises `UserError` where the store does not give
    it.
    """
    if isinstance(where, Path):
        yield where
        return
    with tempfile.TemporaryDirectory(prefix="vistoken-") as folder:
        copy = Path(folder) / where.name
        try:
            _download(where, copy)
        except OSError as error:
            raise UserError(f"{where}: cannot read it ({error.strerror or error})") from error
        yield copy


def _download(url: Url, copy: Path) -> None:
    if url.is_dir():
        copy.mkdir()
        for child in url.iterdir():
            _download(child, copy / child.name)
        return
    with stream(url) as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target, BLOCK)


class _Retries:
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


retries = _Retries()


def _ask(url: Url, request: Callable[[Any, str], T]) -> T:
    """`request(file system, key)`, again while it fails in a way that passes."""
    pause = PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request(*_resolve(url))
        except FileNotFoundError as error:
            raise _absent(url) from error
        except OSError as error:
            why = re.sub(r"\s*\(Request ID.*?\)", "", str(error))
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


def _absent(url: Url) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(url))


def _resolve(url: Url) -> tuple[Any, str]:
    """The file system of `url`, and its key there."""
    rest = url.url.partition("://")[2]
    if url.scheme in ("s3", "gs", "gcs"):
        return _file_system(url.scheme, url.parts[0], os.getpid()), rest
    return _any_file_system(url.url)


@lru_cache(maxsize=64)
def _file_system(scheme: str, bucket: str, process: int) -> Any:
    """One for each process: after a fork two of them must not speak through one connection."""
    from pyarrow import fs

    if scheme != "s3":
        return fs.GcsFileSystem()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        region=region,
        endpoint_override=endpoint,
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
        raise UserError(f"{url}: neither pyarrow nor fsspec knows this kind of URL ({error})") from error
    return fs.PyFileSystem(fs.FSSpecHandler(system)), key


class _Ranges(io.RawIOBase):
    """An object by range requests."""

    def __init__(self, url: Url):
        self._url, self._at, self._file = url, 0, None
        self._size = self._with_file(lambda file: file.size())

    def _with_file(self, use: Callable[[Any], T]) -> T:
        def request(system: Any, key: str) -> T:
            if self._file is None:
                self._file = system.open_input_file(key)
            return use(self._file)

        return _ask(self._url, request)

    def _read_at(self, start: int, length: int) -> bytes:
        return self._with_file(lambda file: file.read_at(length, start))

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

    def readall(self) -> bytes:
        content = self._read_at(self._at, self._size - self._at) if self._at < self._size else b""
        self._at += len(content)
        return content


class _Ahead(_Ranges):
    """The same front to back, `_AHEAD` blocks ahead of who reads."""

    def __init__(self, url: Url):
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
