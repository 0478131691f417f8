"""Files on a disk or in an object store: read a range, stream, put a whole object, list, delete.

`location("s3://bucket/folder")` is a `Url`, `location("folder")` a `Path`; a flag takes either with `type=location`.

s3:// and gs:// and whatever else pyarrow reaches go through pyarrow; other schemes through fsspec, where it is
installed. file:// is the disk. Credentials, region and endpoint of S3 come from the usual variables and files
(AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL, ...).

A store has no appends, renames or locks. An object is put whole, and until then it is absent or the former one. How
requests fail: see `object_store.py`.
"""

import io
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from vistoken.errors import UserError
from vistoken.object_store import BLOCK, Ahead, ask, retries
from vistoken.url import SCHEME, Stat, Url, location

__all__ = [
    "BLOCK",
    "Location",
    "Stat",
    "Url",
    "folder_stats",
    "local_copy",
    "location",
    "read_ahead",
    "read_range",
    "remove_tree",
    "retries",
    "stream",
    "within",
]

A = TypeVar("A")
T = TypeVar("T")
Location = Path | Url


def within(folder: Location, name: str) -> Location:
    """`folder / name`, or what `name` says where it is a whole URL."""
    return location(name) if SCHEME.match(name) else folder / name


def read_range(where: Location, start: int, length: int) -> bytes:
    """`length` bytes from `start`; fewer at the end of the file."""
    with where.open("rb", buffering=0) as file:
        file.seek(start)
        return file.read(length)


def stream(where: Location) -> BinaryIO:
    """A file to be read once from front to back: of a store, the next blocks are on their way while one is used."""
    return where.open("rb") if isinstance(where, Path) else io.BufferedReader(Ahead(where), 1 << 20)


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


def folder_stats(folder: Url) -> dict[str, Stat]:
    """Every object in `folder` by its name: a thousand come with a request, where `stat` takes one each."""
    from pyarrow.fs import FileSelector

    found = ask(folder, lambda system, key: system.get_file_info(FileSelector(key, allow_not_found=True)))
    return {info.base_name: Stat(info.size, info.mtime_ns or 0) for info in found if info.type.name == "File"}


def remove_tree(where: Location) -> None:
    """Delete a folder and what is in it; one that is not there is no error."""
    if isinstance(where, Path):
        shutil.rmtree(where, ignore_errors=True)
        return
    with suppress(FileNotFoundError):
        ask(where, lambda system, key: system.delete_dir(key))


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
