"""The results of one input's chunks, in a folder: a result is there completely or not at all.

A result is the files that the job wrote for the chunk, then `{chunk}.json`, its entry: the counts of the chunk, its
problems, and the names and sizes of the files. The entry is written last and, where a result is replaced, removed
first, so it vouches for the files. A result of which a power cut took a file is made again, so folders need no sync,
which is slow on a shared disk.

The results of an input are joined into its final file, for which a mark vouches in the same way. An input of one chunk,
as a tar file is, needs no joining: its result is the final file (`WholeResult`).
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import orjson

from vistoken.errors import UserError
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


@dataclass
class Final:
    """What is known of a final file: what its mark holds."""

    counts: Counts = field(default_factory=Counts)
    bytes: int = 0
    sha256: str = ""


class Results:
    """The results of one input, in `folder`."""

    def __init__(self, folder: Location):
        self.folder = folder
        self._earlier: set[str] | None = None  # in a store: the entries that were there when the run began

    @property
    def mark(self) -> Location:
        """Exists while the file that these results are joined into is complete; holds its counts, size and hash."""
        return self.folder.with_name(f"{self.folder.name}.done.json")

    def final(self) -> Final | None:
        """What the mark holds; None where there is none. Raises `UserError` where it is damaged."""
        try:
            stored = orjson.loads(self.mark.read_bytes())
            return Final(Counts.from_dict(stored["counts"]), stored["bytes"], stored["sha256"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{self.mark}: damaged ({error}). Run with --no-resume to make the data set anew."
            raise UserError(message) from error

    def write_mark(self, final: Final) -> None:
        stored = {"counts": final.counts.as_dict(), "bytes": final.bytes, "sha256": final.sha256}
        write_bytes(self.mark, orjson.dumps(stored))

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


class WholeResult(Results):
    """The result of an input of one chunk: `output`, the final file, with `rejected`; the mark is its entry."""

    def __init__(self, folder: Location, output: Location):
        super().__init__(folder)
        self.output, self.rejected = output, output.with_suffix(".rejected.jsonl")

    def path(self, index: int, suffix: str) -> Location:
        return self.output

    def read(self, index: int) -> Result | None:
        final = self.final()
        if final is None:
            return None
        problems: list[Problem] = []
        try:
            if final.counts.rejected + final.counts.failed:
                lines = self.rejected.read_bytes().splitlines()
                problems = [Problem(**orjson.loads(line)) for line in lines]
            whole = self.output.stat().st_size == final.bytes
        except (FileNotFoundError, orjson.JSONDecodeError, TypeError):
            return None
        whole = whole and len(problems) == final.counts.rejected + final.counts.failed
        return Result(final.counts, problems) if whole else None

    found = read

    def write(self, index: int, result: Result) -> None:
        result.counts.check(str(self.output))
        (content,) = result.files.values()
        self.forget(index)
        write_bytes(self.output, content)
        if result.problems:
            write_bytes(self.rejected, problem_lines(result.problems))
        else:
            remove_file(self.rejected)
        self.write_mark(Final(result.counts, len(content), hashlib.sha256(content).hexdigest()))

    def forget(self, index: int) -> None:
        remove_file(self.mark)

    def remove(self) -> None:
        """Of an input that is finished nothing is to go."""


def problem_lines(problems: Iterable[Problem]) -> bytes:
    """As they stand in a `*.rejected.jsonl`."""
    return b"".join(orjson.dumps(asdict(problem)) + b"\n" for problem in problems)


@contextmanager
def joining(contents: Iterable[tuple[Result, bytes]], output: Location, rejected: Location) -> Iterator[Final]:
    """Join results into `output`, and their problems into `rejected`, which is removed where there are none.

    What is written inside the block is there before `output` is.
    """
    final, digest = Final(), hashlib.sha256()
    with atomic_write(output) as lines:
        with atomic_write(rejected) as problems:
            for result, content in contents:
                final.counts.add(result.counts)
                final.bytes += lines.write(content)
                digest.update(content)
                problems.write(problem_lines(result.problems))
        final.counts.check(str(output))
        final.sha256 = digest.hexdigest()
        yield final
    if not final.counts.rejected + final.counts.failed:
        rejected.unlink()
