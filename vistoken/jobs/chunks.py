"""An input file as ranges of items, the same however many processes share the work.

`.jsonl`: one object a line; blank lines, byte-order marks and CRLF are allowed. `.json`: one list. Neither is
ever held in memory: one pass finds where every chunk begins, and a chunk is read by its byte range.
"""

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson

from vistoken.errors import Failed, ItemError, UserError
from vistoken.files import check_regular, reading
from vistoken.jobs.files import cached
from vistoken.store import Location, read_range, stream

BLOCK = 1 << 20  # bytes of a .json list read at a time
_MAX_ELEMENT = 1 << 28  # of a .json list, in bytes: a broken one must not make us read the rest of the file
_DECODER = json.JSONDecoder(parse_int=str)  # only finds where an element of a list ends; orjson reads it


@dataclass(frozen=True)
class Chunk:
    """Items [first_item, first_item + items) of a file: bytes [start, end), beginning at line `first_line`."""

    index: int
    first_item: int
    items: int
    first_line: int
    start: int
    end: int


@dataclass(frozen=True)
class Item:
    """One item as read. `value` is the parsed JSON, or None where `error` says why it is not JSON."""

    index: int  # among the items of its file, from 0
    where: str  # for messages: "line 18" of a .jsonl, "item 17" of a .json
    raw: bytes  # the text itself, on one line
    value: Any
    error: ItemError | None = None
    id: Any = None  # the item's own, if it has one

    @classmethod
    def of(cls, index: int, where: str, raw: bytes, value: Any) -> "Item":
        """With the id that `value` has."""
        return cls(index, where, raw, value, id=value.get("id") if isinstance(value, dict) else None)


@dataclass(frozen=True)
class ChunkTable:
    path: Location
    sha256: str
    items: int
    rows: tuple[tuple[int, int, int, int, int], ...]  # Chunk without its index

    @property
    def fingerprint(self) -> str:
        return self.sha256

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Chunk:
        return Chunk(index, *self.rows[index])

    def read(self, chunk: Chunk) -> Iterator[Item]:
        """The items of `chunk`, in order. An item that is not JSON comes with its error instead of a value."""
        with reading(self.path, "the input"):
            check_regular(self.path)
            content = read_range(self.path, chunk.start, chunk.end - chunk.start)
        return (_list_items if _is_list(self.path) else _line_items)(chunk, content)


def chunk_table(path: Location, chunk_items: int, cache: Location) -> ChunkTable:
    """The table of `path`, from `cache` while the file is unchanged, else by one pass over it.

    Processes that ask at the same time wait for the first. Raises `UserError` for a file that is missing,
    empty, or a `.json` that is not a well-formed list.
    """
    with reading(path, "the input"):
        stat = path.stat()
        stamp = [path.name, stat.st_size, stat.st_mtime_ns, chunk_items]
        found = cached(cache, stamp, lambda: _survey(path, chunk_items))
    return ChunkTable(path, found["sha256"], found["items"], tuple(map(tuple, found["rows"])))


def _is_list(path: Location) -> bool:
    return path.suffix.lower() == ".json"


def _survey(path: Location, chunk_items: int) -> dict[str, Any]:
    spans = _list_spans if _is_list(path) else _line_spans
    check_regular(path)
    with stream(path) as file:
        digest = hashlib.sha256()
        rows = tuple(_chunk_rows(spans(_Hashing(file, digest), path), chunk_items))
    items = sum(row[1] for row in rows)
    if not items:
        raise UserError(f"{path}: no items in it. Expected one JSON object a line, or a .json list of objects.")
    return {"sha256": digest.hexdigest(), "items": items, "rows": rows}


def _chunk_rows(spans: Iterator[tuple[int, int, int]], chunk_items: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(line, start, end) of each item -> rows of a `ChunkTable`."""
    first_item = count = line = start = end = 0
    for item_line, item_start, item_end in spans:
        if count == chunk_items:
            yield first_item, count, line, start, end
            first_item, count = first_item + count, 0
        if count == 0:
            line, start = item_line, item_start
        count, end = count + 1, item_end
    if count:
        yield first_item, count, line, start, end


def _line_spans(file: "_Hashing", path: Location) -> Iterator[tuple[int, int, int]]:
    position = 0
    for number, line in enumerate(file.lines(), start=1):
        content = line.removeprefix(codecs.BOM_UTF8)  # on any line: files that were appended to one another have more
        if number == 1 and content[:1] == b"[" and content.rstrip()[-1:] in b"[{,":
            raise UserError(f"{path}, line 1: a JSON list that goes on over several lines. Name the file .json.")
        if not content.isspace() and content:
            yield number, position, position + len(line)
        position += len(line)


def _line_items(chunk: Chunk, content: bytes) -> Iterator[Item]:
    index = chunk.first_item
    for number, line in enumerate(content.split(b"\n"), start=chunk.first_line):
        raw = line.removeprefix(codecs.BOM_UTF8).strip()
        if not raw:
            continue
        yield _item(index, f"line {number}", raw)
        index += 1


def _item(index: int, where: str, raw: bytes) -> Item:
    raw = raw.replace(b"\r", b" ").replace(b"\n", b" ")  # unescaped, they are never inside a JSON string
    try:
        return Item.of(index, where, raw, orjson.loads(raw))
    except orjson.JSONDecodeError as error:
        try:
            raw.decode()
        except UnicodeDecodeError as wrong:
            found = f"{raw[wrong.start]:#04x} at byte {wrong.start + 1}"
            return Item(index, where, raw, None, Failed("not JSON", f"not UTF-8: {found}; save the file as UTF-8"))
        return Item(index, where, raw, None, Failed("not JSON", f"{error.msg} (column {error.colno})"))


def _list_spans(file: "_Hashing", path: Location) -> Iterator[tuple[int, int, int]]:
    """Walk a JSON list element by element with bounded memory."""
    text = _TextWindow(file, path)
    if text.skip_space() != "[":
        found = "nothing" if not text.peek() else f"{text.peek()!r}"
        raise text.error(f"expected a JSON list, found {found}. One object a line? Then name the file .jsonl.")
    text.advance(1)
    expects_element = text.skip_space() != "]"
    while expects_element:
        start, line = text.byte, text.line
        text.advance(text.element_end())
        yield line, start, text.byte
        separator = text.skip_space()
        expects_element = separator == ","
        if separator not in (",", "]"):
            raise text.error(
                f"expected ',' or ']' after the list's element, found {separator or 'the end of the file'}"
            )
        if expects_element:
            text.advance(1)
            if text.skip_space() == "]":
                raise text.error("not valid JSON: a comma after the last element")
    text.advance(1)
    if trailing := text.skip_space():
        raise text.error(f"expected nothing after the list, found {trailing!r}")


def _list_items(chunk: Chunk, content: bytes) -> Iterator[Item]:
    text, position = content.decode(), 0
    for index in range(chunk.first_item, chunk.first_item + chunk.items):
        while text[position] in " \t\r\n,":
            position += 1
        _, end = _DECODER.raw_decode(text, position)
        yield _item(index, f"item {index}", text[position:end].encode())
        position = end


class _Hashing:
    """Reads a file once, for its content and for its hash."""

    def __init__(self, file: BinaryIO, digest: Any):
        self._file, self._digest = file, digest

    def read(self, size: int) -> bytes:
        block = self._file.read(size)
        self._digest.update(block)
        return block

    def lines(self) -> Iterator[bytes]:
        for line in self._file:
            self._digest.update(line)
            yield line


class _TextWindow:
    """A sliding window of decoded text that knows the byte and the line it stands at."""

    def __init__(self, file: _Hashing, path: Location):
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = "", 0, False
        self.byte, self.line = 0, 1
        if self.peek() == "\ufeff":
            self.advance(1)

    def _grow(self) -> bool:
        if self._ended:
            return False
        block = self._file.read(max(BLOCK, len(self._text)))  # doubling keeps a long element linear
        self._ended = not block
        try:
            self._text = self._text[self._at :] + self._decoder.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            raise self.error(f"not valid UTF-8 ({error.reason})") from error
        self._at = 0
        return not self._ended

    def peek(self) -> str:
        while self._at >= len(self._text) and self._grow():
            pass
        return self._text[self._at : self._at + 1]

    def advance(self, count: int) -> None:
        passed = self._text[self._at : self._at + count]
        self._at += count
        self.byte += len(passed.encode())
        self.line += passed.count("\n")

    def skip_space(self) -> str:
        while (character := self.peek()) and character in " \t\r\n":
            self.advance(1)
        return character

    def element_end(self) -> int:
        """Length in characters of the element that begins here."""
        while True:
            try:
                _, end = _DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or not self._grow():  # a number may go on in the next block
                    return end - self._at
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > _MAX_ELEMENT or not self._grow():
                    line = self.line + self._text.count("\n", self._at, error.pos)
                    cut = "; the file ends before the list does" if error.pos >= len(self._text.rstrip()) else ""
                    raise UserError(f"{self._path}, line {line}: not valid JSON: {error.msg}{cut}") from error
            except RecursionError as error:
                raise self.error("brackets are nested too deeply") from error

    def error(self, message: str) -> UserError:
        return UserError(f"{self._path}, line {self.line}: {message}")
