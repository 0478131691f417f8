"""The output folder of pre_tokenize.py, and how its files come to be.

`files/` holds the token files, `manifest.json` what decided them. For each rank there are
`{rank}-of-{splits}-record.jsonl` and, beside it, `*.rejected.jsonl` (the items without a sequence, and why) and
`*.summary.json`. `.work/` holds what is known of every chunk. Chunks do not depend on the number of processes, so a
run may go on with any number of them; a rank's record is derived from its chunks, written when all of them are
complete, and removed where a run begins.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from pre_tokenize.record import Lengths, companions, entry_line, manifest_id, read_entries, sub_record
from pre_tokenize.text import TextTokenizer
from pre_tokenize.token_file import TokenSample, hash_of, pickle_bytes, read_pickle, read_shard, shard_bytes
from vision_tokenizer.codebook.forms import CodeTable
from vistoken.errors import UserError
from vistoken.jobs.chunks import Chunk, chunk_table
from vistoken.jobs.counts import Counts
from vistoken.jobs.files import write_json
from vistoken.jobs.manifest import MANIFEST, read_manifest
from vistoken.jobs.results import Results, joining
from vistoken.jobs.run import WORK, Output, Source, Table
from vistoken.jobs.workers import Workers
from vistoken.store import Location, location, within

_ANY_RECORD = re.compile(r"(\d+)-of-(\d+)-record\.(jsonl|rejected\.jsonl|summary\.json)")
_ENTRIES = ".record.jsonl"  # of one chunk, beside its result


def open_source(path: Location, folder: Location, chunk_items: int) -> Source:
    """The input file by chunks, with what `folder` knows of them already."""
    work = folder / WORK
    return Source(open_table(path, chunk_items, work / "chunks.json"), Results(work / "results"))


def open_table(path: Location, chunk_items: int, cache: Location) -> Table:
    """The items of a `.json` or `.jsonl`, or of codes in an `.arrow`."""
    return CodeTable(path, chunk_items) if path.suffix == ".arrow" else chunk_table(path, chunk_items, cache)


def common_manifest(
    table: Table,
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
        "input": {"name": table.path.name, "sha256": table.fingerprint, "items": table.items},
        "versions": {name: version(name) for name in packages},
    }


class TokenOutput(Output):
    """Where and how token files are written. `manifest` has at least `input`, `image_dir` and `token_files`."""

    def __init__(self, folder: Location, manifest: Mapping[str, Any], source: Source):
        super().__init__(folder, manifest, [source])
        self.source = source

    @property
    def _as_pickles(self) -> bool:
        return self.manifest["token_files"] == "pkl"

    def folders(self) -> list[Location]:
        return [*super().folders(), self.folder / "files"]

    def made(self) -> list[Location]:
        return [*(path for path, _, _ in _records(self.folder)), *(self.folder / "files").glob("*")]

    def check_folder(self) -> None:
        if read_manifest(self.folder) is None and (found := self.made()):
            name = os.path.relpath(str(found[0]), str(self.folder))
            raise UserError(
                f"{self.folder}: holds {name} but no {MANIFEST}, so nobody knows how its "
                "token files were made. Choose another --out_dir, or delete them with --overwrite."
            )

    def prepare(self, workers: Workers) -> None:
        """Remove records that this run will write anew."""
        for path, rank, splits in _records(self.folder):
            if (rank, splits) == workers.share or splits != workers.share[1]:
                path.unlink(missing_ok=True)

    def chunk_files(self, chunk: Chunk, samples: Sequence[TokenSample]) -> dict[Location, bytes]:
        """What is written for a chunk's samples: its token files, and its lines of the record."""
        places: list[tuple[str, int | None, str | None]]  # of each sample: file, row, and where it is the first, hash
        if self._as_pickles:
            folder = location(self.manifest["image_dir"])  # a pickle knows no manifest: it has whole paths
            whole = [s._replace(images=tuple(str(within(folder, image)) for image in s.images)) for s in samples]
            contents = {f"files/{sample.id}.pkl": pickle_bytes(sample) for sample in whole}
            places = [(name, None, hash_of(content)) for name, content in contents.items()]
        else:
            name = _shard(chunk)
            contents = {name: shard_bytes(samples, self.manifest)} if samples else {}
            places = [(name, row, None if row else hash_of(contents[name])) for row in range(len(samples))]
        entries = zip(places, samples, strict=True)
        lines = [entry_line(name, row, len(s.tokens), s.id, sha, s.image_sizes) for (name, row, sha), s in entries]
        files = {self.folder / name: content for name, content in contents.items()}
        files[self.source.results.path(chunk.index, _ENTRIES)] = b"".join(line + b"\n" for line in lines)
        return files

    def read_back(self, chunk: Chunk, items: Sequence[int]) -> dict[int, TokenSample]:
        """The samples of these items of a complete chunk, by item."""
        entries = read_entries(self.source.results.path(chunk.index, _ENTRIES)) if items else ()
        sizes = {entry["id"]: entry.get("image_sizes") for entry in entries}
        if self._as_pickles:
            samples = [read_pickle(self.folder / f"files/{item}.pkl") for item in items]
        else:
            samples = read_shard(self.folder / _shard(chunk)) if items else []
        wanted = set(items)
        return {s.id: s._replace(image_sizes=sizes.get(s.id)) for s in samples if s.id in wanted}

    def write_record(self, workers: Workers) -> tuple[Location, Counts, Lengths]:
        """List what the chunks of this worker's share, all of them complete, hold; the record is there last."""
        record = sub_record(self.folder, *workers.share)
        rejected, summary = companions(record)
        chunks, lengths = workers.chunk_range(len(self.source.table)), Lengths()
        with joining(self.source.results.contents(chunks, _ENTRIES), record, rejected) as joined:
            for index in chunks:
                for entry in read_entries(self.source.results.path(index, _ENTRIES)):
                    lengths.add(entry["len"])
            account = joined.counts.as_dict()
            told = {"manifest": manifest_id(self.manifest), "account": account, "lengths": lengths.as_dict()}
            write_json(summary, told)
        return record, joined.counts, lengths


def _shard(chunk: Chunk) -> str:
    return f"files/{chunk.first_item}-{chunk.first_item + chunk.items}.arrow"


def _records(folder: Location) -> Iterator[tuple[Location, int, int]]:
    for path in folder.glob("*-of-*-record.*"):
        if match := _ANY_RECORD.fullmatch(path.name):
            yield path, int(match[1]), int(match[2])
