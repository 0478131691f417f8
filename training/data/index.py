"""A memory-mapped index of a record, so that 20 million entries cost neither memory nor start-up time.

The index is a folder of plain arrays named by the record's content, `record.json.index-0123456789abcdef/`: a record
that has changed gets another one. All processes of a node share its pages.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pre_tokenize.record import Record, read_entries
from vistoken.errors import UserError
from vistoken.jobs.files import sha256_of

BLOCK = 1 << 16
COLUMNS = {"file_numbers": "<u4", "rows": "<i4", "lengths": "<i4", "ids": "<i8"}
NAMES, NAME_ENDS = "names.bin", "name_ends"


class RecordIndex(Record):
    """A record whose columns lie on disk. Pickling it (data-loader workers) sends paths only."""

    def __init__(self, path: Path, folder: Path):
        self.path, self.folder = path, folder
        self.files = _Names(folder)
        for column in COLUMNS:
            setattr(self, column, _column(folder, column))

    def __reduce__(self):
        return RecordIndex, (self.path, self.folder)


class _Names(Sequence[str]):
    """File names by number: one text and where each name ends in it."""

    def __init__(self, folder: Path):
        self._ends = _column(folder, NAME_ENDS)
        self._text = np.memmap(folder / NAMES, np.uint8, "r")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> str:
        start = int(self._ends[number - 1]) if number else 0
        return self._text[start : int(self._ends[number])].tobytes().decode()


def _column(folder: Path, name: str) -> np.ndarray:
    return np.load(folder / f"{name}.npy", mmap_mode="r")


def fingerprint(record: Path) -> str:
    """Of a record's content: a gigabyte takes about a second."""
    try:
        return sha256_of(record)[:16]
    except OSError as error:
        raise UserError(f"{record}: cannot read this record ({error.strerror})") from error


def ensure_index(record: Path, digest: str, parent: Path) -> Path:
    """The folder in `parent` with the index of `record`, whose fingerprint is `digest`; made if it is not there.

    Raises `UserError` for a record that is damaged or empty, or a folder that cannot be written.
    """
    prefix = f"{record.name}.index-"
    target = parent / f"{prefix}{digest}"
    if target.is_dir():
        return target
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{prefix}tmp-", dir=parent, ignore_cleanup_errors=True) as temporary:
            _build(record, Path(temporary))
            _publish(Path(temporary), target)
    except OSError as error:  # of writing: the record's own are UserErrors
        raise UserError(f"{target}: cannot write the index of {record} ({error.strerror or error})") from error
    for stale in parent.glob(f"{prefix}????????????????"):
        if stale != target:
            shutil.rmtree(stale, ignore_errors=True)
    return target


def _publish(temporary: Path, target: Path) -> None:
    temporary.chmod(0o755)
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another node was faster, with the same content
            raise


def _build(record: Path, folder: Path) -> None:
    """Stream the record's entries into raw columns, then give these their array headers."""
    raw = {column: (folder / f"{column}.raw").open("wb") for column in (*COLUMNS, NAME_ENDS)}
    numbers: dict[str, int] = {}  # of token files that hold many items; a pickle's name occurs once
    names, end, count, block = (folder / NAMES).open("wb"), 0, 0, []
    for entry in read_entries(record):
        name = entry["file"]
        if name not in numbers:
            end += names.write(name.encode())
            raw[NAME_ENDS].write(np.int64(end).tobytes())
            number, count = count, count + 1
            if "row" in entry:
                numbers[name] = number
        else:
            number = numbers[name]
        block.append((number, entry.get("row", -1), entry["len"], entry["id"]))
        if len(block) == BLOCK:
            _write(raw, block)
            block = []
    _write(raw, block)
    for file in (names, *raw.values()):
        file.close()
    if not end:
        raise UserError(f"{record}: this record is empty. Run pre_tokenize.py and concat_record.py first.")
    for column, dtype in (COLUMNS | {NAME_ENDS: "<i8"}).items():
        source = np.memmap(folder / f"{column}.raw", dtype, "r")
        np.save(folder / f"{column}.npy", source)
        (folder / f"{column}.raw").unlink()


def _write(raw: dict, block: list[tuple[int, int, int, int]]) -> None:
    if block:
        for values, (column, dtype) in zip(zip(*block, strict=True), COLUMNS.items(), strict=True):
            raw[column].write(np.array(values, dtype).tobytes())
