"""The results of one input's chunks, in a folder: a result is there completely or not at all.

A result is the files that the job wrote for the chunk, then `{chunk}.json`, its entry: the counts of the chunk, its
problems, and the names and sizes of the files. The entry is written last and, where a result is replaced, removed
first, so it vouches for the files. A result of which a power cut took a file is made again, so folders need no sync,
which is slow on a shared disk.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import orjson

from vistoken.jobs.counts import Counts, Problem
from vistoken.jobs.files import atomic_write, remove_file, write_bytes
from vistoken.store import Location, Url, read_ahead, remove_tree


@dataclass
class Result:
    """What a job has to say of one chunk: its counts, the problems in input order, and files to write."""

    counts: Counts
    problems: list[Problem] = field(default_factory=list)
    files: Mapping[Location, bytes] = field(default_factory=dict)


class ResultMissing(AssertionError):
    """A chunk has no result where all must have one."""


class Results:
    """The results of one input, in `folder`."""

    def __init__(self, folder: Location):
        self.folder = folder
        self._earlier: set[str] | None = None  # in a store: the entries that were there when the run began

    @property
    def mark(self) -> Location:
        """Exists while the file that these results are joined into is complete; holds its counts, size and hash."""
        return self.folder.with_name(f"{self.folder.name}.done.json")

    def path(self, index: int, suffix: str) -> Location:
        return self.folder / f"{index:08d}{suffix}"

    def read(self, index: int) -> Result | None:
        """The finished result without its files, or None; one with a damaged entry or lost files is none."""
        try:
            stored = orjson.loads(self.path(index, ".json").read_bytes())
            for name, size in stored["files"].items():
                if (self.folder / name).stat().st_size != size:
                    return None
        except (FileNotFoundError, orjson.JSONDecodeError):
            return None
        return Result(Counts.from_dict(stored["counts"]), [Problem(**problem) for problem in stored["problems"]])

    def found(self, index: int) -> Result | None:
        """The finished result of an earlier run, or None. Of a store, one listing tells which there are."""
        if isinstance(self.folder, Url):
            if self._earlier is None:
                self._earlier = {path.name for path in self.folder.glob("*.json")}
            if self.path(index, ".json").name not in self._earlier:
                return None
        return self.read(index)

    def write(self, index: int, result: Result) -> None:
        """Complete the result. Raises `UserError` where the disk refuses; then the result does not exist."""
        result.counts.check(f"{self.folder} chunk {index}")
        if self._earlier is None or self.path(index, ".json").name in self._earlier:
            self.forget(index)
        for path, content in result.files.items():
            write_bytes(path, content, sync_name=False)
        entry = {
            "counts": result.counts.as_dict(),
            "problems": [asdict(problem) for problem in result.problems],
            "files": {os.path.relpath(str(p), str(self.folder)): len(content) for p, content in result.files.items()},
        }
        write_bytes(self.path(index, ".json"), orjson.dumps(entry), sync_name=False)

    def forget(self, index: int) -> None:
        """Have the result made anew, by this run or the next; what it was joined into is no longer complete."""
        remove_file(self.mark)
        remove_file(self.path(index, ".json"))

    def count(self) -> int:
        """How many chunks have a result."""
        return sum(1 for _ in self.folder.glob("[0-9]*.json"))

    def remove(self) -> None:
        """Delete all results, their entries first: what is left if we are killed is no result."""
        for entry in self.folder.glob("*.json"):
            entry.unlink()
        remove_tree(self.folder)

    def contents(self, chunks: Iterable[int], suffix: str) -> Iterator[tuple[Result, bytes]]:
        """The results of `chunks`, all of them complete, one at a time, each with its file of this suffix."""

        def load(index: int) -> tuple[Result, bytes]:
            result = self.read(index)
            if result is None:
                raise ResultMissing(f"{self.folder}: the result of chunk {index} is missing")
            return result, self.path(index, suffix).read_bytes()

        return read_ahead(load, chunks) if isinstance(self.folder, Url) else map(load, chunks)


@dataclass
class Joined:
    """What was joined into a file."""

    counts: Counts = field(default_factory=Counts)
    bytes: int = 0
    sha256: str = ""


@contextmanager
def joining(contents: Iterable[tuple[Result, bytes]], output: Location, rejected: Location) -> Iterator[Joined]:
    """Join results into `output`, and their problems into `rejected`, which is removed where there are none.

    What is written inside the block is there before `output` is.
    """
    joined, digest = Joined(), hashlib.sha256()
    with atomic_write(output) as lines:
        with atomic_write(rejected) as problems:
            for result, content in contents:
                joined.counts.add(result.counts)
                joined.bytes += lines.write(content)
                digest.update(content)
                problems.writelines(orjson.dumps(asdict(problem)) + b"\n" for problem in result.problems)
        joined.counts.check(str(output))
        joined.sha256 = digest.hexdigest()
        yield joined
    if not joined.counts.rejected + joined.counts.failed:
        rejected.unlink()
