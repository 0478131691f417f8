"""Members of tar files by name, `shard-00012.tar/0001234.jpg`, through an index that is made once for each tar file."""

import hashlib
import io
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vistoken.errors import Failed
from vistoken.jobs.files import cached
from vistoken.jobs.shards import MAX_MEMBER, tar_members
from vistoken.store import Location, read_range

_KEPT = 64  # indexes in memory: some megabytes each for ten thousand members
_SMALL, _BUFFER = 1 << 13, 1 << 18  # bytes read at a time while headers are looked for: on a disk, in a store


class StoredMember(NamedTuple):
    """A member of a tar file: bytes [offset, offset + size)."""

    tar: Location
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"

    def open(self) -> BinaryIO:
        """Raises `Failed` where it is too large, or the tar file ends before it does."""
        if self.size > MAX_MEMBER:
            raise Failed("member too large", f"{self}: {self.size:,} bytes, of at most {MAX_MEMBER:,}")
        content = read_range(self.tar, self.offset, self.size)
        if len(content) < self.size:
            raise Failed("shard damaged", f"{self.tar}: ends before {self.name} does. Fetch the file again.")
        return io.BytesIO(content)


class MemberIndexes:
    """The indexes of tar files. With a `folder` they are kept there, for other processes and the next run."""

    def __init__(self) -> None:
        self.folder: Location | None = None
        self._read: OrderedDict[Location, dict[str, tuple[int, int]]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, path: Location) -> StoredMember | None:
        """The member that `path` names; None where no part of it is a tar file. Raises `Failed` if it has no such."""
        for tar in path.parents:
            if tar.name.lower().endswith(".tar") and (tar in self._read or tar.is_file()):
                name = str(path)[len(str(tar)) + 1 :]
                place = self.of(tar).get(name)
                if place is None:
                    raise Failed("image not found", f"{tar} has no member {name}")
                return StoredMember(tar, name, *place)
        return None

    def of(self, tar: Location) -> dict[str, tuple[int, int]]:
        """Name -> (offset, size) of what lies before the tar file's end, or before its damage."""
        with self._lock:
            if tar not in self._read:
                self._read[tar] = self._kept(tar)
                if len(self._read) > _KEPT:
                    self._read.popitem(last=False)
            self._read.move_to_end(tar)
            return self._read[tar]

    def _kept(self, tar: Location) -> dict[str, tuple[int, int]]:
        if self.folder is None:
            return _survey(tar)
        path = self.folder / f"index-{tar.name}-{hashlib.sha256(str(tar.absolute()).encode()).hexdigest()[:12]}.json"
        stat = tar.stat()
        found = cached(path, [stat.st_size, stat.st_mtime_ns], lambda: {"members": _survey(tar)})
        return {name: (offset, size) for name, (offset, size) in found["members"].items()}


def _survey(tar: Location) -> dict[str, tuple[int, int]]:
    members: dict[str, tuple[int, int]] = {}
    # what lies before damage is there; who asks for more is told that it is not
    with tar.open("rb", _SMALL if isinstance(tar, Path) else _BUFFER) as file, suppress(Failed):
        for member in tar_members(file):
            members[member.name.removeprefix("./")] = member.offset, member.size
    return members


indexes = MemberIndexes()  # of this process
