"""The finished chunks of one input file: a part is there completely or not at all.

A part is the files that the job wrote for the chunk, then `{chunk}.json`, its entry: the account of the chunk
and its problems. The entry comes last, and goes first where a part is replaced: whoever sees it may rely on the rest.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import orjson

from vistoken.jobs.counts import Account, Problem
from vistoken.jobs.files import remove_file, write_bytes


@dataclass
class Part:
    """What a job hands over for one chunk: files to write, the problems, and its account."""

    account: Account
    problems: list[Problem] = field(default_factory=list)
    files: Mapping[Path, bytes] = field(default_factory=dict)


class Parts:
    """The parts of one input file, in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, index: int, suffix: str) -> Path:
        return self.folder / f"{index:08d}{suffix}"

    def read(self, index: int) -> Part | None:
        """The finished part without its files, or None; a damaged entry is none."""
        try:
            stored = orjson.loads(self.path(index, ".json").read_bytes())
        except (FileNotFoundError, orjson.JSONDecodeError):
            return None
        return Part(Account.from_dict(stored["account"]), [Problem(**problem) for problem in stored["problems"]])

    def write(self, index: int, part: Part) -> None:
        """Complete the part. Raises `UserError` where the disk refuses; then the part does not exist."""
        part.account.check(f"{self.folder} part {index}")
        self.forget(index)
        for path, content in part.files.items():
            write_bytes(path, content)
        entry = {"account": part.account.as_dict(), "problems": [asdict(problem) for problem in part.problems]}
        write_bytes(self.path(index, ".json"), orjson.dumps(entry))

    def forget(self, index: int) -> None:
        """Have the part made anew, by this run or the next."""
        remove_file(self.path(index, ".json"))

    def read_all(self, count: int) -> Iterator[Part]:
        """Parts 0 to count - 1 in order, one at a time; all of them must be complete."""
        for index in range(count):
            part = self.read(index)
            if part is None:
                raise AssertionError(f"{self.folder}: part {index} of {count} is missing")
            yield part

    def remove(self) -> None:
        """Delete all parts, first their entries: what is left if we are killed is no part."""
        for entry in self.folder.glob("*.json"):
            entry.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)
