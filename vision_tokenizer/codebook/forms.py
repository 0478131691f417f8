"""The two forms of codebook inference's output: the document's JSON lines, and Arrow, which is smaller.

An Arrow file is an IPC file of these columns, a row an item: `item`, the annotation as JSON text; `image_sizes` and
`matched_ratios`, [h, w] for each image; and one for each branch, the codes of each image row by row, in the smallest
type that holds them. What they say is what the JSON line says, so whoever reads lines can read them, too.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import orjson
import pyarrow as pa

from vision_tokenizer.codebook.annotations import OUTPUT_FIELDS
from vision_tokenizer.images.anchors import model_size
from vision_tokenizer.models.dualvitok.model import grid_sizes
from vistoken.errors import UserError
from vistoken.jobs.chunks import Chunk, Item
from vistoken.jobs.counts import Counts
from vistoken.jobs.files import sha256_of
from vistoken.jobs.results import Result
from vistoken.store import Location

BATCH_ROWS = 256  # of an Arrow file: read at a time

Pair = tuple[int, int]


class Row(NamedTuple):
    """An item with its codes."""

    raw: bytes  # the item's own text
    sizes: list[Pair]  # (h, w) of each image
    codes: list[tuple[np.ndarray, ...]]  # of each image, a grid or flat array per branch
    anchors: list[Pair]

    def line(self) -> bytes:
        """The item's own text with the three fields spliced in."""
        values = (self.sizes, self.codes, self.anchors)
        added = orjson.dumps(dict(zip(OUTPUT_FIELDS, values, strict=True)), option=orjson.OPT_SERIALIZE_NUMPY)
        return self.raw[: self.raw.rindex(b"}")].rstrip() + b", " + added[1:] + b"\n"

    def value(self) -> dict[str, Any]:
        """The parsed line, with arrays where it has lists of rows."""
        grids = [[grid.astype(np.int32) for grid in image] for image in self.codes]
        fields = ([list(size) for size in self.sizes], grids, [list(anchor) for anchor in self.anchors])
        return {**orjson.loads(self.raw), **dict(zip(OUTPUT_FIELDS, fields, strict=True))}


class Form(Protocol):
    """How the rows of a chunk are kept, and those of all chunks made into a file."""

    suffix: str

    def kept(self, row: Row) -> Any:
        """What is held of a row until its chunk is written."""
        ...

    def pack(self, rows: Iterable[Any]) -> bytes:
        """A file of these rows."""
        ...

    def unpack(self, content: bytes) -> list[Any]: ...
    def joined(self, contents: Iterable[tuple[Result, bytes]]) -> Iterator[tuple[Result, bytes]]:
        """The chunks' results with what each adds to the file of all."""
        ...


class JsonLines:
    suffix = ".jsonl"

    def kept(self, row: Row) -> bytes:
        return row.line()

    def pack(self, rows: Iterable[bytes]) -> bytes:
        return b"".join(rows)

    def unpack(self, content: bytes) -> list[bytes]:
        return [line + b"\n" for line in content.split(b"\n")[:-1]]

    def joined(self, contents: Iterable[tuple[Result, bytes]]) -> Iterator[tuple[Result, bytes]]:
        yield from contents


class ArrowRows:
    suffix = ".arrow"

    def __init__(self, branches: Sequence[str], codebook_sizes: Sequence[int]):
        self._types = [pa.uint16() if size <= 1 << 16 else pa.int32() for size in codebook_sizes]
        pairs = pa.list_(pa.list_(pa.int32(), 2))
        codes = [(name, pa.list_(pa.list_(kind))) for name, kind in zip(branches, self._types, strict=True)]
        self._schema = pa.schema(
            [("item", pa.large_binary()), (OUTPUT_FIELDS[0], pairs), (OUTPUT_FIELDS[2], pairs), *codes]
        )

    def kept(self, row: Row) -> Row:
        return row

    def pack(self, rows: Iterable[Row]) -> bytes:
        rows, sink = list(rows), pa.BufferOutputStream()
        with pa.ipc.new_file(sink, self._schema) as writer:
            for start in range(0, len(rows), BATCH_ROWS):
                writer.write_batch(self._batch(rows[start : start + BATCH_ROWS]))
        return sink.getvalue().to_pybytes()

    def _batch(self, rows: Sequence[Row]) -> pa.RecordBatch:
        items = _offsets(len(row.codes) for row in rows)
        columns = [pa.array([row.raw for row in rows], pa.large_binary())]
        for field in ("sizes", "anchors"):
            flat = np.array([pair for row in rows for pair in getattr(row, field)], np.int32).ravel()
            columns.append(pa.ListArray.from_arrays(items, pa.FixedSizeListArray.from_arrays(pa.array(flat), 2)))
        for branch, kind in enumerate(self._types):
            codes = [image[branch].ravel() for row in rows for image in row.codes]
            flat = np.concatenate(codes) if codes else np.empty(0, np.int32)
            images = pa.ListArray.from_arrays(_offsets(map(len, codes)), pa.array(flat.astype(kind.to_pandas_dtype())))
            columns.append(pa.ListArray.from_arrays(items, images))
        return pa.record_batch(columns, self._schema)

    def unpack(self, content: bytes) -> list[Row]:
        return [row for batch in _batches(content) for row in _rows(batch)]

    def joined(self, contents: Iterable[tuple[Result, bytes]]) -> Iterator[tuple[Result, bytes]]:
        sink = _Drained()
        with pa.ipc.new_file(pa.PythonFile(sink, "w"), self._schema) as writer:
            for result, content in contents:
                for batch in _batches(content):
                    writer.write_batch(batch)
                yield result, sink.drain()
        yield Result(Counts()), sink.drain()  # the file's index, which belongs to no chunk


def output_form(output_format: str, branches: Sequence[str], codebook_sizes: Sequence[int]) -> Form:
    return ArrowRows(branches, codebook_sizes) if output_format == "arrow" else JsonLines()


class _Drained(io.RawIOBase):
    """A file to be written, of which others take what has come so far."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self._at = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def write(self, content: Any) -> int:
        self._blocks.append(bytes(content))
        self._at += len(content)
        return len(content)

    def drain(self) -> bytes:
        taken, self._blocks = b"".join(self._blocks), []
        return taken


def _batches(content: bytes) -> Iterator[pa.RecordBatch]:
    reader = pa.ipc.open_file(content)
    return (reader.get_batch(index) for index in range(reader.num_record_batches))


def _offsets(lengths: Iterable[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *lengths]).astype(np.int32))


def _rows(batch: pa.RecordBatch) -> Iterator[Row]:
    """The rows of a batch; an image's codes as grids, or flat where they are not as many as its anchor has."""
    texts, sizes, anchors = (batch[name].to_pylist() for name in ("item", OUTPUT_FIELDS[0], OUTPUT_FIELDS[2]))
    items = batch[OUTPUT_FIELDS[0]].offsets.to_numpy()
    branches = [batch.column(index) for index in range(3, batch.num_columns)]
    bounds = [column.values.offsets.to_numpy() for column in branches]
    flat = [column.values.values.to_numpy() for column in branches]
    for number, raw in enumerate(texts):
        codes = []
        for image, anchor in zip(range(items[number], items[number + 1]), anchors[number], strict=True):
            shapes = grid_sizes(*model_size(*anchor)) if min(anchor) > 0 else [(0, 0)] * len(flat)
            codes.append(
                tuple(
                    _shaped(values[starts[image] : starts[image + 1]], shape)
                    for values, starts, shape in zip(flat, bounds, shapes, strict=True)
                )
            )
        yield Row(raw, [tuple(size) for size in sizes[number]], codes, [tuple(anchor) for anchor in anchors[number]])


def _shaped(codes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return codes.reshape(shape) if codes.size == shape[0] * shape[1] else codes


def read_rows(path: Location) -> Iterator[Row]:
    """The rows of an Arrow file of codes. Raises `UserError` where it is none."""
    reader = _open_arrow(path)
    for index in range(reader.num_record_batches):
        yield from _rows(_batch_of(reader, path, index))


def _open_arrow(path: Location) -> pa.RecordBatchFileReader:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)) if isinstance(path, Path) else path.open("rb"))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not an Arrow file, or a damaged one ({error})") from error
    if reader.schema.names[:3] != ["item", OUTPUT_FIELDS[0], OUTPUT_FIELDS[2]]:
        raise UserError(f"{path}: not the codes of codebook inference; its columns are {reader.schema.names}")
    return reader


def _batch_of(reader: pa.RecordBatchFileReader, path: Location, index: int) -> pa.RecordBatch:
    try:
        batch = reader.get_batch(index)
        batch.validate(full=True)
        return batch
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged ({error})") from error


class CodeTable:
    """An Arrow file of codes in chunks of items: what a `ChunkTable` is for JSON lines."""

    def __init__(self, path: Location, chunk_items: int):
        reader = _open_arrow(path)
        self.path, self._chunk_items = path, chunk_items
        self._ends = np.cumsum([_batch_of(reader, path, i).num_rows for i in range(reader.num_record_batches)])
        self.items = int(self._ends[-1]) if len(self._ends) else 0
        self.fingerprint = sha256_of(path)
        if not self.items:
            raise UserError(f"{path}: no items in it")

    def __len__(self) -> int:
        return -(-self.items // self._chunk_items)

    def __getitem__(self, index: int) -> Chunk:
        first = index * self._chunk_items
        return Chunk(index, first, min(self._chunk_items, self.items - first), 0, 0, 0)

    def read(self, chunk: Chunk) -> Iterator[Item]:
        """The items of `chunk`, in order."""
        reader, end = _open_arrow(self.path), chunk.first_item + chunk.items
        for index in range(int(np.searchsorted(self._ends, chunk.first_item, "right")), reader.num_record_batches):
            first = int(self._ends[index - 1]) if index else 0
            if first >= end:
                return
            for number, row in enumerate(_rows(_batch_of(reader, self.path, index)), start=first):
                if chunk.first_item <= number < end:
                    yield Item.of(number, f"row {number}", row.raw, row.value())
