"""A memory-mapped index of a record, so that 20 million entries cost neither memory nor start-up time.

The index is a folder of plain arrays named by the record's content and the index's own layout,
`record.json.index-0123456789abcdef/`: a record that has changed gets another one. All processes of a node
share its pages.
"""

import hashlib
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from pre_tokenize.record import COLUMNS, Record, column_blocks
from vistoken.errors import UserError
from vistoken.files import reading
from vistoken.jobs.files import sha256_of
from vistoken.store import Location


def fingerprint(record: Location) -> str:
    """Of a record's content: a gigabyte takes about a second."""
    with reading(record, "this record"):
        return sha256_of(record)[:16]


def open_indexed(record: Location, digest: str, parent: Path) -> Record:
    """A record, mapped from its index in `parent`, which is written if it is not there. `digest` is its fingerprint.

    Raises `UserError` for a record that is damaged or empty, or a folder that cannot be written.
    """
    prefix = f"{record.name}.index-"
    target = parent / f"{prefix}{hashlib.sha256(f'{digest} {COLUMNS}'.encode()).hexdigest()[:16]}"
    if target.is_dir():
        return Record.mapped(record, target)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{prefix}tmp-", dir=parent, ignore_cleanup_errors=True) as temporary:
            _write(record, Path(temporary))
            Path(temporary).chmod(0o755)
            try:
                Path(temporary).rename(target)
            except OSError:
                if not target.is_dir():  # otherwise another node was faster, with the same content
                    raise
    except OSError as error:  # of writing: the record's own are UserErrors
        raise UserError(f"{target}: cannot write the index of {record} ({error.strerror or error})") from error
    for stale in parent.glob(f"{prefix}????????????????"):
        if stale != target:
            shutil.rmtree(stale, ignore_errors=True)
    return Record.mapped(record, target)


def _write(record: Location, folder: Path) -> None:
    """Stream the record's columns into raw files, then give each its array header."""
    with ExitStack() as closing:
        files = {name: closing.enter_context((folder / f"{name}.raw").open("wb")) for name in COLUMNS}
        for block in column_blocks(record):
            for name, file in files.items():
                file.write(block[name].tobytes())
    if not (folder / "names.raw").stat().st_size:
        raise UserError(f"{record}: this record is empty. Run pre_tokenize.py and concat_record.py first.")
    for name, dtype in COLUMNS.items():
        raw = folder / f"{name}.raw"
        np.save(folder / f"{name}.npy", np.memmap(raw, dtype, "r") if raw.stat().st_size else np.empty(0, dtype))
        raw.unlink()
