"""The output folder of pre_tokenize.py, and how its files come to be.

`files/` holds the token files, `manifest.json` what decided them. For each rank there are
`{rank}-of-{splits}-record.jsonl` and, beside it, `*.rejected.jsonl` (the items without a sequence, and why) and
`*.summary.json`. `.work/` holds what is known of every chunk. Chunks do not depend on the number of processes, so a
run may go on with any number of them; a rank's record is derived from its chunks, written when all of them are
complete, and removed where a run begins.
"""

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

from pre_tokenize.record import Lengths, companions, entry_line, manifest_id, read_entries, sub_record
from pre_tokenize.text import TextTokenizer
from pre_tokenize.token_file import TokenSample, pickle_bytes, read_pickle, read_shard, shard_bytes
from vistoken.errors import UserError
from vistoken.jobs.chunks import Chunk, ChunkTable, chunk_table
from vistoken.jobs.counts import Account
from vistoken.jobs.files import atomic_write, remove_leftovers
from vistoken.jobs.lock import exclusive, run_lock
from vistoken.jobs.manifest import MANIFEST, check_manifest, read_manifest
from vistoken.jobs.results import Parts
from vistoken.jobs.run import Source
from vistoken.jobs.summary import write_summary
from vistoken.jobs.workers import Claims

_ANY_RECORD = re.compile(r"(\d+)-of-(\d+)-record\.(jsonl|rejected\.jsonl|summary\.json)")
_ENTRIES = ".record.jsonl"  # of one chunk, beside its part


def open_source(path: Path, folder: Path, chunk_items: int) -> Source:
    """The input file by chunks, with what `folder` knows of them already."""
    work = folder / ".work"
    return Source(chunk_table(path, chunk_items, work / "chunks.json"), Parts(work / "parts"))


def common_manifest(
    table: ChunkTable,
    text: TextTokenizer,
    image_tokenizer: Mapping[str, str | None],
    more: Mapping[str, Any],
    packages: Iterable[str],
) -> dict[str, Any]:
    """What every manifest tells, and `more`; concat_record.py counts on the items of `input`."""
    return {
        "format": "vistoken-tokens-1",
        "image_tokenizer": image_tokenizer,
        "text_tokenizer": text.sha256,
        "vocab_size": text.size,
        "vocabulary": text.vocabulary,
        **more,
        "input": {"name": table.path.name, "sha256": table.sha256, "items": table.items},
        "versions": {name: version(name) for name in packages},
    }


@dataclass(frozen=True)
class OutputFolder:
    """Where and how token files are written. `manifest` has at least `input`, `image_dir` and `token_files`."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def _as_pickles(self) -> bool:
        return self.manifest["token_files"] == "pkl"

    @contextmanager
    def begin(self, source: Source, claims: Claims, *, overwrite: bool) -> Iterator[None]:
        """Take this process's seat and settle with what is in the folder; leaving the block gives the seat back.

        Raises `UserError` if another run is at work here, or if what is here was made in another way.
        """
        work = self.folder / ".work"
        with run_lock(work, *claims.seat):
            with exclusive(work / "manifest.lock"):
                if overwrite:
                    remove_output(self.folder)
                elif read_manifest(self.folder) is None:
                    _require_no_token_files(self.folder)
                check_manifest(self.folder, self.manifest)
            for path, rank, splits in _records(self.folder):
                if (rank, splits) == claims.seat or splits != claims.seat[1]:
                    path.unlink(missing_ok=True)
            for folder in (self.folder, self.folder / "files", work):
                remove_leftovers(folder)
            self._forget_lost(source, claims.chunk_range(len(source.table)))
            yield

    def _forget_lost(self, source: Source, chunks: Iterable[int]) -> None:
        """Count chunks as not done whose token files are gone: who finds a damaged one may delete it and run again."""
        for index in chunks:
            entries = source.parts.path(index, _ENTRIES)
            if source.parts.read(index) and not all((self.folder / name).exists() for name in self._names(entries)):
                source.parts.forget(index)

    def _names(self, entries: Path) -> Iterator[str]:
        """The token files that a chunk's lines of the record name, an Arrow file once."""
        for entry in read_entries(entries):
            yield entry["file"]
            if not self._as_pickles:
                return

    def chunk_files(self, chunk: Chunk, samples: Sequence[TokenSample], parts: Parts) -> dict[Path, bytes]:
        """What is written for a chunk's samples: its token files, and its lines of the record."""
        if self._as_pickles:
            contents = {f"files/{sample.id}.pkl": self._pickle(sample) for sample in samples}
            lines = [entry_line(name, None, len(s.tokens), s.id) for name, s in zip(contents, samples, strict=True)]
        else:
            contents = {_shard(chunk): shard_bytes(samples, self.manifest)} if samples else {}
            lines = [entry_line(_shard(chunk), row, len(s.tokens), s.id) for row, s in enumerate(samples)]
        files = {self.folder / name: content for name, content in contents.items()}
        files[parts.path(chunk.index, _ENTRIES)] = b"".join(line + b"\n" for line in lines)
        return files

    def read_back(self, chunk: Chunk, items: Sequence[int]) -> dict[int, TokenSample]:
        """The samples of these items of a complete chunk, by item."""
        if self._as_pickles:
            return {item: read_pickle(self.folder / f"files/{item}.pkl") for item in items}
        wanted = set(items)
        samples = read_shard(self.folder / _shard(chunk)) if items else []
        return {sample.id: sample for sample in samples if sample.id in wanted}

    def _pickle(self, sample: TokenSample) -> bytes:
        """A pickle knows no manifest: its images are named by their whole paths."""
        folder = self.manifest["image_dir"]
        return pickle_bytes(sample._replace(images=tuple(str(Path(folder, image)) for image in sample.images)))

    def write_record(self, source: Source, claims: Claims) -> tuple[Path, Account, Lengths]:
        """List what this seat's chunks, all of them complete, hold; the record is there last."""
        record = sub_record(self.folder, *claims.seat)
        rejected_path, summary_path = companions(record)
        account, lengths = Account(), Lengths()
        with atomic_write(record) as out:
            with atomic_write(rejected_path) as rejected:
                for index in claims.chunk_range(len(source.table)):
                    part = source.parts.read(index)
                    if part is None:
                        raise AssertionError(f"{source.parts.folder}: chunk {index} is missing")
                    account.add(part.account)
                    rejected.writelines(orjson.dumps(asdict(problem)) + b"\n" for problem in part.problems)
                    entries = source.parts.path(index, _ENTRIES)
                    out.write(entries.read_bytes())
                    for entry in read_entries(entries):
                        lengths.add(entry["len"])
            account.check(str(record))
            write_summary(
                summary_path,
                manifest=manifest_id(self.manifest),
                account=account.as_dict(),
                lengths=lengths.as_dict(),
            )
        if not account.rejected + account.failed:
            rejected_path.unlink()
        return record, account, lengths


def remove_output(folder: Path) -> None:
    """Delete all that earlier runs made in `folder`, but for the chunk table and locks.

    The manifest goes last: whatever is still there when we are killed is never taken for the work of other settings.
    """
    for path, _, _ in _records(folder):
        path.unlink(missing_ok=True)
    Parts(folder / ".work" / "parts").remove()
    shutil.rmtree(folder / "files", ignore_errors=True)
    (folder / MANIFEST).unlink(missing_ok=True)


def _shard(chunk: Chunk) -> str:
    return f"files/{chunk.first_item}-{chunk.first_item + chunk.items}.arrow"


def _records(folder: Path) -> Iterator[tuple[Path, int, int]]:
    for path in folder.glob("*-of-*-record.*"):
        if match := _ANY_RECORD.fullmatch(path.name):
            yield path, int(match[1]), int(match[2])


def _require_no_token_files(folder: Path) -> None:
    found = [path for path, _, _ in _records(folder)] + list((folder / "files").glob("*"))[:1]
    if found:
        raise UserError(
            f"{folder}: holds {found[0].relative_to(folder)} but no {MANIFEST}, so nobody knows how its token files "
            "were made. Choose another --out_dir, or delete them with --overwrite."
        )
