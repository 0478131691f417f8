"""Shards read in place: tar files in WebDataset's form and parquet files, as streams, never extracted.

A tar file is a list of members; neighbours that share a key, their name up to its first dot, are one sample. A row of
a parquet file is one. What the members and columns mean is for the caller.
"""

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow
from pyarrow.parquet import ParquetFile

from vistoken.errors import Failed, UserError
from vistoken.object_store import RangeReader
from vistoken.store import BLOCK, Location, stream

TAR, PARQUET = (".tar", ".tar.gz", ".tgz"), (".parquet",)
MAX_MEMBER = 1 << 28  # bytes; what is larger is no image or text, and not read into memory
_BLOCK = 512  # of a tar file
_BUFFER, _SMALL = 1 << 18, 1 << 13  # bytes read at a time: of a store, of a disk where most of it is passed over
_ABOUT_THE_NEXT = (  # headers that say more of the member after them
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_ROWS = 32  # of a parquet file, held in memory at a time
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_BRACES = re.compile(r"\{([^{}]*)\}")


def expand(pattern: str) -> list[str]:
    """`a/{000..002}.tar`, `{a,b}.tar` -> the names, in order; others stay as they are."""
    pieces = _BRACES.split(pattern)  # text, what stands in braces, text, ...
    choices = [_choices(piece) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in product(*choices)]


def _choices(inside: str) -> list[str]:
    if not (numbers := _RANGE.fullmatch(inside)):
        return inside.split(",")
    first, last = numbers.groups()
    if int(last) < int(first):
        raise UserError(f"{{{inside}}}: a range of shards must not go backwards")
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]


def shard_stem(name: str) -> str:
    """`a` of `a.tar.gz`, `a.parquet` or a folder `a`."""
    return name.removesuffix(".gz").rpartition(".")[0] or name


class NamedBytes:
    """A member that was read. Goes by its name in messages."""

    def __init__(self, name: str, content: bytes):
        self.name, self.size, self._content = name, len(content), content

    def __str__(self) -> str:
        return self.name

    def open(self) -> BinaryIO:
        return io.BytesIO(self._content)

    def read(self) -> bytes:
        return self._content


class Window(RangeReader):
    """Bytes [offset, offset + size) of a file that others read, too."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        super().__init__(size)
        self._file, self._offset = file, offset

    def _read_at(self, start: int, length: int) -> bytes:
        self._file.seek(self._offset + start)
        return self._file.read(length)


class Member(NamedTuple):
    """A member where it stands in a tar file that is open."""

    name: str
    size: int
    offset: int
    file: BinaryIO

    def __str__(self) -> str:
        return self.name

    def open(self) -> BinaryIO:
        return io.BufferedReader(Window(self.file, self.offset, self.size), 1 << 13)

    def read(self) -> bytes:
        """The content. Raises `Failed` where it is too large, or the file ends before it does."""
        if self.size > MAX_MEMBER:
            raise Failed("member too large", f"{self.name}: {self.size:,} bytes, of at most {MAX_MEMBER:,}")
        _go_to(self.file, self.offset)
        content = self.file.read(self.size)
        if len(content) < self.size:
            raise self.cut_off(self.size - len(content))
        return content

    def cut_off(self, missing: int) -> Failed:
        return Failed("shard damaged", f"the file ends {missing:,} bytes before {self.name} does")


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: its members by suffix, or its row by column; or what is wrong with the shard here."""

    index: int  # in the shard, from 0
    where: str  # the name of the first member, "row 17"
    key: str | None
    parts: list[tuple[str, Any]]  # (".jpg", a `NamedBytes` or `Member`), or (column, value)
    error: Failed | None = None


def tar_samples(path: Location, whole: bool) -> Iterator[Sample]:
    """The samples of a tar file; at the end, where it is damaged, one that says so.

    With `whole` members are read as they come, each image once; without, only headers are, and members are left to be
    looked into until the next sample is asked for. What is compressed is read whole in any case.
    """
    parts: list[tuple[str, Any]] = []
    index, where, open_key, damage = 0, "", None, None
    packed = path.name.lower().endswith((".gz", ".tgz"))
    whole = whole or packed
    try:
        source = stream(path) if whole else path.open("rb", _SMALL if isinstance(path, Path) else _BUFFER)
    except OSError as error:
        damage = Failed("shard unreadable", f"{path}: {error.strerror or error}")
        yield Sample(0, "after 0 samples", None, [], damage)
        return
    with source:  # stays open while the caller looks into the members of the last sample
        try:
            end = None if whole else source.seek(0, io.SEEK_END)
            for member in tar_members(cast(BinaryIO, gzip.GzipFile(fileobj=source)) if packed else source):
                if end is not None and member.offset + member.size > end:
                    raise member.cut_off(member.offset + member.size - end)
                key, suffix = split_name(member.name)
                if parts and key != open_key:
                    yield Sample(index, where, open_key, parts)
                    index, parts = index + 1, []
                if not parts:
                    where, open_key = member.name, key
                held = whole and member.size <= MAX_MEMBER
                parts.append((suffix, NamedBytes(member.name, member.read()) if held else member))
        except Failed as error:
            damage = Failed(error.reason, f"{path}: {error.detail}; what follows is lost. Fetch the file again.")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            damage = Failed("shard damaged", f"{path}: {error}; what follows is lost. Fetch the file again.")
        except OSError as error:  # of the disk, or of a store that was asked again and again
            damage = Failed("shard unreadable", f"{path}: {error.strerror or error}; what follows is yet to be done")
        if parts:
            yield Sample(index, where, open_key, parts)
            index += 1
        if not index and not damage:
            damage = Failed("empty shard", f"{path}: there is no sample in it")
        if damage:
            yield Sample(index, f"after {index} samples", None, [], damage)


def split_name(name: str) -> tuple[str, str]:
    """A member's key and, in lower case, its suffix: all from the first dot of its base name on."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, dot, rest = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, (dot + rest).lower()


def tar_members(file: BinaryIO) -> Iterator[Member]:
    """The regular files of a tar file, found by their headers: content is passed over unless somebody reads it.

    Unlike `tarfile` it keeps no list of them, and raises `Failed` for every end but the two zero blocks' own.
    """
    position = 0
    longer: dict[str, Any] = {}  # what the headers before a member's own say of it
    while True:
        _go_to(file, position)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise Failed("shard damaged", f"the file ends at byte {position + len(block):,} without an end mark")
        if block.count(0) == _BLOCK:
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except tarfile.HeaderError as error:
            raise Failed("shard damaged", f"no header at byte {position:,} ({error})") from error
        content, size = position + _BLOCK, info.size
        if size < 0 or (info.type in _ABOUT_THE_NEXT and size > MAX_MEMBER):
            raise Failed("shard damaged", f"no header at byte {position:,} (a size of {size:,})")
        if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            longer |= _pax(file.read(size))
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            longer["path"] = file.read(size).rstrip(b"\0").decode("utf-8", "replace")
        elif info.type not in _ABOUT_THE_NEXT:
            size = longer.get("size", size)
            if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
                yield Member(longer.get("path", info.name), size, content, file)
            elif info.type in tarfile.SUPPORTED_TYPES and not info.isreg():
                size = 0  # links and folders have a size now and then, but no content
            longer = {}
        position = content + -(-size // _BLOCK) * _BLOCK


def _go_to(file: BinaryIO, position: int) -> None:
    """Of a stream that cannot seek, pass over what lies between."""
    if file.seekable():
        file.seek(position)
        return
    while (gap := position - file.tell()) > 0 and file.read(min(gap, _BUFFER)):
        pass


def _pax(content: bytes) -> dict[str, Any]:
    """`path` and `size` of an extended header: records `{length} {keyword}={value}\\n`."""
    found: dict[str, Any] = {}
    while content[:1] not in (b"", b"\0"):
        length, _, rest = content.partition(b" ")
        if not length.isdigit() or not int(length):
            raise Failed("shard damaged", "an extended header that is none")
        keyword, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if keyword == b"path":
            found["path"] = value.decode("utf-8", "replace")
        elif keyword == b"size" and value.isdigit():
            found["size"] = int(value)
        content = content[int(length) :]
    return found


@lru_cache(maxsize=4)
def parquet_file(path: Location) -> ParquetFile:
    """Open a parquet file. Raises `UserError` where it is none."""
    try:
        if isinstance(path, Path):
            return ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
        return ParquetFile(path.open("rb", _BUFFER), buffer_size=BLOCK, pre_buffer=False)  # of a column; few requests
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a parquet file, or a damaged one ({error})") from error


def parquet_groups(file: ParquetFile, least_rows: int) -> list[tuple[int, int, range]]:
    """(first row, rows, row groups) of every chunk: one row group, or neighbours that have `least_rows` together."""
    metadata = file.metadata
    chunks, first, rows, start = [], 0, 0, 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows and (rows >= least_rows or group == metadata.num_row_groups - 1):
            chunks.append((first, rows, range(start, group + 1)))
            first, rows, start = first + rows, 0, group + 1
    return chunks


def parquet_samples(path: Location, columns: Sequence[str], first: int, rows: int, groups: range) -> Iterator[Sample]:
    """The rows of one chunk; where they cannot be read, a failed sample for each."""
    row = first
    try:
        for batch in parquet_file(path).iter_batches(_ROWS, row_groups=list(groups), columns=list(columns)):
            for values in batch.to_pylist():
                yield Sample(row, f"row {row}", f"{row:08d}", list(values.items()))
                row += 1
    except (OSError, pyarrow.ArrowException) as error:
        damage = Failed("shard damaged", f"{path}: {error}; fetch it again")
        for lost in range(row, first + rows):
            yield Sample(lost, f"row {lost}", None, [], damage)
