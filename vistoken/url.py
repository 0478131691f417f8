"""An object in a store under the names of `pathlib.Path`, so that most code never asks which of the two it holds.

Where it must (locks, renames, memory maps), `isinstance(where, Url)` says it.
"""

import fnmatch
import io
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import unquote, urlsplit

from vistoken.object_store import BLOCK, Ranges, absent, ask

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def location(text: "str | Path | Url") -> "Path | Url":
    """What `text` names: a `Url` where it has a scheme (but file://), else a `Path`."""
    if isinstance(text, Path | Url) or not SCHEME.match(text):
        return text if isinstance(text, Url) else Path(text)
    if text.startswith("file://"):
        return Path(unquote(urlsplit(text).path))
    return Url(text)


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
        return ask(self, lambda system, key: system.get_file_info(key))

    def stat(self) -> Stat:
        info = self._info()
        if info.type.name == "NotFound":
            raise absent(self)
        return Stat(info.size or 0, info.mtime_ns or 0)

    def iterdir(self) -> "Iterator[Url]":
        """What lies in this folder, in name order. Raises `FileNotFoundError` where nothing does."""
        from pyarrow.fs import FileSelector

        found = ask(self, lambda system, key: system.get_file_info(FileSelector(key)))
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

        return ask(self, read)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb", buffering: int = BLOCK) -> BinaryIO:
        """To read and to seek; a request is for `buffering` bytes or more (0: as many as are read). To write: `put`."""
        if mode != "rb":
            raise ValueError(f"{self}: mode {mode!r}: an object is opened to be read; it is written whole, with `put`")
        ranges = Ranges(self)
        return io.BufferedReader(ranges, buffering) if buffering else cast(BinaryIO, ranges)

    def put(self, content: bytes | BinaryIO) -> None:
        """Put the object whole; a file as `content` is read from its beginning, again for every attempt."""

        def write(system: Any, key: str) -> None:
            file = io.BytesIO(content) if isinstance(content, bytes) else content
            file.seek(0)
            with system.open_output_stream(key) as out:  # an upload that fails, or whose process dies, leaves nothing
                while block := file.read(BLOCK):
                    out.write(block)

        ask(self, write)

    write_bytes = put

    def mkdir(self, *args: object, **options: object) -> None:
        """A store has no folders of its own."""

    def unlink(self, missing_ok: bool = False) -> None:
        attempts = 0

        def delete(system: Any, key: str) -> None:
            nonlocal attempts
            attempts += 1
            system.delete_file(key)

        try:
            ask(self, delete)
        except FileNotFoundError:
            if not missing_ok and attempts == 1:  # a later attempt finds that the one before did its work
                raise
