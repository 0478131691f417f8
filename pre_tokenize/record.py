"""Record files: which token file holds which item.

One entry an item, `{"file": "files/0-1024.arrow", "row": 17, "len": 1094, "id": 17}`; pickles have no `row`. `file`
is relative to the record's folder, so that a data set can be moved, or absolute. The first entry of a file has its
hash, too, `"sha256": "8f2c..."`: the first 16 digits, which is plenty to tell damage. Where the sizes of an item's
images are known it has `"image_sizes": [[480, 640]]`, (h, w): continuous tokens are counted from them. A record is a
`.jsonl`, or a `.json` list; ours has an entry on each line, which is what lets it be read without holding it.
"""

import hashlib
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from vistoken.errors import DataError
from vistoken.files import open_file, read_file, reading
from vistoken.store import Location, within

_HASH = re.compile("[0-9a-f]{16}")
BLOCK = 1 << 16  # entries that are Python objects at a time: as arrays they take a twentieth of the memory
OF_ENTRIES = {  # one value an entry
    "file_numbers": "<u4",
    "rows": "<i4",
    "lengths": "<i4",
    "ids": "<i8",
    "image_starts": "<i8",
    "image_counts": "<i2",
}
COLUMNS = OF_ENTRIES | {
    "image_heights": "<i4",  # of each image
    "image_widths": "<i4",
    "hashes": "<u8",  # of each token file
    "name_ends": "<i8",  # its name is all names' text up to here
    "names": "u1",
}


class Record:
    """A record as columns: 30 bytes an item and 8 an image, plus each file's name and hash once.

    `ids` (N,) int64, `lengths` (N,) int32, `rows` (N,) int32 (-1 for a pickle), `file_numbers` (N,) uint32,
    `image_counts` (N,) int16 (-1 where the sizes of the images are not known). They are in memory, or arrays that
    `training.data.index` has put into a folder; these are mapped, and a pickle of the record (for data-loader
    processes) holds paths only.
    """

    def __init__(self, path: Location, columns: Mapping[str, np.ndarray], folder: Path | None = None):
        self.path, self.folder, self._columns = path, folder, columns
        self.file_numbers, self.rows = columns["file_numbers"], columns["rows"]
        self.lengths, self.ids, self.image_counts = columns["lengths"], columns["ids"], columns["image_counts"]
        self._name_ends, self._names, self._hashes = columns["name_ends"], columns["names"], columns["hashes"]

    @classmethod
    def load(cls, path: Location) -> "Record":
        """Read a record of ours or a published one. Raises `UserError` naming the line that is not an entry."""
        blocks = list(column_blocks(path))
        columns = {name: [np.empty(0, dtype), *(b[name] for b in blocks)] for name, dtype in COLUMNS.items()}
        return cls(path, {name: np.concatenate(arrays) for name, arrays in columns.items()})

    def part(self, chosen: np.ndarray) -> "Record":
        """The entries of these numbers, as a record in memory."""
        return Record(self.path, {**self._columns, **{name: self._columns[name][chosen] for name in OF_ENTRIES}})

    @classmethod
    def mapped(cls, path: Location, folder: Path) -> "Record":
        """A record whose columns lie in `folder`."""
        return cls(path, {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}, folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Record.mapped, (self.path, self.folder)) if self.folder else (Record, (self.path, self._columns))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def files(self) -> int:
        """How many token files there are."""
        return len(self._name_ends)

    def sha256(self, index: int) -> str | None:
        """The first 16 digits of the hash of the file that holds item `index`; None in records that have none."""
        stored = int(self._hashes[self.file_numbers[index]])
        return f"{stored:016x}" if stored else None

    def file(self, index: int) -> Location:
        """The token file that holds item `index`."""
        number = int(self.file_numbers[index])
        start = int(self._name_ends[number - 1]) if number else 0
        return within(self.path.parent, self._names[start : int(self._name_ends[number])].tobytes().decode())

    def image_sizes(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of all images of the entries of these numbers: the place in `chosen` of each one's entry, heights, widths."""
        starts, counts = self._columns["image_starts"][chosen], np.maximum(self.image_counts[chosen], 0)
        owners = np.repeat(np.arange(len(chosen)), counts)
        images = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts) + starts[owners]
        return owners, self._columns["image_heights"][images], self._columns["image_widths"][images]

    def where(self, index: int) -> str:
        """The place of item `index`, for messages."""
        return f"{self.file(index)}, row {self.rows[index]}, item {self.ids[index]}"


def column_blocks(path: Location) -> Iterator[dict[str, np.ndarray]]:
    """The columns of a record, block by block, to be put one after another."""
    entries, files, end, images = read_entries(path), 0, 0, 0
    numbers: dict[str, int] = {}  # of token files that hold many items; a pickle's name occurs once
    while block := list(islice(entries, BLOCK)):
        file_numbers, names, name_ends, hashes = [], [], [], []
        for entry in block:
            number = numbers.get(entry["file"])
            if number is None:
                number, files = files, files + 1
                names.append(entry["file"].encode())
                end += len(names[-1])
                name_ends.append(end)
                hashes.append(int(entry.get("sha256", "0"), 16))
                if "row" in entry:
                    numbers[entry["file"]] = number
            file_numbers.append(number)
        sizes = [entry.get("image_sizes") for entry in block]
        counts = np.array([-1 if known is None else len(known) for known in sizes], "<i2")
        known = np.array([size for of_entry in sizes for size in of_entry or ()], "<i4").reshape(-1, 2)
        starts = images + np.cumsum(np.maximum(counts, 0), dtype="<i8")
        images += len(known)
        yield {
            "file_numbers": np.array(file_numbers, "<u4"),
            "rows": np.array([entry.get("row", -1) for entry in block], "<i4"),
            "lengths": np.array([entry["len"] for entry in block], "<i4"),
            "ids": np.array([entry["id"] for entry in block], "<i8"),
            "image_starts": starts - np.maximum(counts, 0),
            "image_counts": counts,
            "image_heights": known[:, 0],
            "image_widths": known[:, 1],
            "hashes": np.array(hashes, "<u8"),
            "name_ends": np.array(name_ends, "<i8"),
            "names": np.frombuffer(b"".join(names), "u1"),
        }


def read_entries(path: Location) -> Iterator[dict[str, Any]]:
    """Checked entries of a record, one at a time. Only a list that is written on one line is held as a whole."""
    with reading(path, "the record"), open_file(path) as file:
        first = file.readline()
        listed = first.lstrip().startswith(b"[")
        if listed and first.strip() != b"[":
            entries = _parsed(read_file(path), path, 1)
            yield from (_checked(entry, path, f"entry {i}") for i, entry in enumerate(entries))
            return
        if not listed:
            file.seek(0)
        closed = not listed
        for number, line in enumerate(file, start=2 if listed else 1):
            content = line.strip().removesuffix(b",") if listed else line.strip()
            if listed and content == b"]":
                closed = True
            elif content:
                yield _checked(_parsed(content, path, number), path, f"line {number}")
        if not closed:
            raise DataError(f"{path}: the list is not closed: the file was cut off. Run concat_record.py again.")


def entry_line(
    file: str,
    row: int | None,
    length: int,
    item: int,
    sha256: str | None = None,
    image_sizes: Sequence[Sequence[int]] | None = None,
) -> bytes:
    """An entry as JSON, without a line end. `sha256` belongs to the first entry of a file; sizes are (h, w)."""
    entry = {"file": file, "row": row, "len": length, "id": item, "image_sizes": image_sizes, "sha256": sha256}
    return orjson.dumps({name: value for name, value in entry.items() if value is not None})


def _parsed(content: bytes, path: Location, line: int) -> Any:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}, line {line}: not a record entry ({error})") from error


def _fits(number: Any, end: int) -> bool:
    return type(number) is int and 0 <= number < end


def _checked(entry: Any, path: Location, where: str) -> dict[str, Any]:
    right = (
        isinstance(entry, dict)
        and isinstance(entry.get("file"), str)
        and _fits(entry.get("len"), 2**31)  # the index' columns are int32, but for the id's
        and _fits(entry.get("row", 0), 2**31)
        and _fits(entry.get("id"), 2**63)
        and ("sha256" not in entry or (isinstance(entry["sha256"], str) and _HASH.fullmatch(entry["sha256"])))
        and ("image_sizes" not in entry or _are_sizes(entry["image_sizes"]))
    )
    if not right:
        raise DataError(f'{path}, {where}: expected {{"file", "len", "id"}} and perhaps "row", found {entry!r:.80}')
    return entry


def _are_sizes(sizes: Any) -> bool:
    return (
        isinstance(sizes, list)
        and len(sizes) < 2**15
        and all(isinstance(size, list) and len(size) == 2 for size in sizes)
        and all(_fits(side, 2**31) and side for size in sizes for side in size)
    )


class Lengths:
    """The distribution of sequence lengths, exact and in bounded memory (one counter per distinct length)."""

    def __init__(self) -> None:
        self.items = 0
        self._counts: Counter[int] = Counter()

    def add(self, length: int) -> None:
        self.items += 1
        self._counts[length] += 1

    def longer_than(self, limit: int) -> int:
        return sum(count for length, count in self._counts.items() if length > limit)

    def as_dict(self) -> dict[str, int | float]:
        """Items, tokens, and the lengths at the usual shares of the items."""
        lengths = sorted(self._counts)
        counts = [self._counts[length] for length in lengths]
        tokens = sum(length * count for length, count in zip(lengths, counts, strict=True))
        if not self.items:
            return {"items": 0, "tokens": 0}
        reached = list(accumulate(counts))
        shares = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
        at = {name: lengths[bisect_left(reached, max(share * self.items, 1))] for name, share in shares.items()}
        return {"items": self.items, "tokens": tokens, "mean": round(tokens / self.items, 1), **at}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:,}" for name, value in self.as_dict().items())


def sub_record(folder: Location, rank: int, splits: int) -> Location:
    """Where rank `rank` of `splits` lists its items, under the published name."""
    return folder / f"{rank}-of-{splits}-record.jsonl"


def companions(record: Location) -> tuple[Location, Location]:
    """Beside a record: the items that are not in it (`*.rejected.jsonl`), and its summary (`*.summary.json`)."""
    return record.with_suffix(".rejected.jsonl"), record.with_suffix(".summary.json")


def manifest_id(manifest: Mapping[str, Any]) -> str:
    """A short name for a manifest, by content."""
    return hashlib.sha256(orjson.dumps(manifest, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]
