"""Files that are either whole or absent (temporary name, fsync, `os.replace`; a store's objects are put whole), and
locks on folders (`flock`), which a store does not have.

The kernel drops a lock however its process ends. The workers of one run (torchrun's ranks, or the `--rank=i --splits=n`
of a bash loop) let each other in; anybody else is refused and told who is there.
"""

import errno
import fcntl
import hashlib
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson

from vistoken.errors import UserError
from vistoken.store import Location, Url, stream

_IN_MEMORY = 64 << 20  # bytes of what is to be put into a store; more waits on the disk
# a file system without locks (some Lustre mounts): the job stays correct, only the warning is lost
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def atomic_write(path: Location, sync: bool = True, sync_name: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary neighbour of `path`; leaving the block gives it the name, an exception removes it.

    Without `sync` the file survives a killed process, but a power cut only once the caller has called `os.sync`.
    Without `sync_name` a power cut may leave the content without its name: then the file is absent, or the former one.
    Raises `UserError` where the disk is full or not writable; nothing is left under the final name. An `OSError` of
    the block that names another file is none of ours: it passes. Of a `Url` the block writes a file on the disk, which
    is put when the block ends.
    """
    if isinstance(path, Url):
        with tempfile.SpooledTemporaryFile(_IN_MEMORY) as spool:
            file = cast(BinaryIO, spool)  # what one has and this lacks, nobody uses
            yield file
            _put(path, file)
        return
    # two writers of one file never share a temporary name; nor does a fork with its parent
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.replace(path)
        if sync and sync_name:
            sync_folder(path.parent)
    except OSError as error:
        if error.filename is not None and not temporary.is_relative_to(error.filename):  # a failed write names none
            raise
        raise UserError(
            f"{path}: cannot write ({error.strerror or error}). What was finished before is kept: "
            "make room or fix the permissions, then run the same command again."
        ) from error
    finally:
        with suppress(OSError):  # after success it is gone already
            temporary.unlink()


def _put(url: Url, content: bytes | BinaryIO) -> None:
    try:
        url.put(content)
    except OSError as error:
        raise UserError(
            f"{url}: cannot write ({error.strerror or error}). What was finished before is kept: see that the store "
            "can be reached and written, then run the same command again."
        ) from error


def write_bytes(path: Location, content: bytes, sync: bool = True, sync_name: bool = True) -> None:
    if isinstance(path, Url):
        _put(path, content)
        return
    with atomic_write(path, sync, sync_name) as file:
        file.write(content)


def write_json(path: Location, content: Any) -> None:
    """For people to read: indented."""
    write_bytes(path, orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def remove_file(path: Location) -> None:
    """Remove `path`, if it is there, before anything that is written from now on."""
    if isinstance(path, Url):
        path.unlink(missing_ok=True)
        return
    if path.exists():
        path.unlink()
        sync_folder(path.parent)


def sha256_of(path: Location) -> str:
    """Of the content, read in blocks."""
    digest = hashlib.sha256()
    with stream(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Location) -> None:
    """Delete temporary files whose writer, on this machine, is dead. Other machines' are left to them."""
    if isinstance(folder, Url):
        return
    for path in folder.glob(f"*.{socket.gethostname()}-[0-9]*.tmp"):
        try:
            os.kill(int(path.suffixes[-2].rpartition("-")[2]), 0)  # only looks
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except PermissionError:  # somebody else's lives
            pass


@contextmanager
def exclusive(path: Location) -> Iterator[None]:
    """Wait for `path`'s lock and hold it: for a short step whose outcome the other workers then read.

    In a store all may do the step at the same time: what they put must be equal.
    """
    if isinstance(path, Url):
        yield
        return
    with _open(path) as file:
        _flock(file, fcntl.LOCK_EX)
        yield


def cached(path: Location, stamp: list[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, kept at `path` while `stamp` stays the same. Who asks at the same time waits for the first."""
    with exclusive(path.with_suffix(".lock")):
        with suppress(OSError, ValueError, KeyError, TypeError):  # absent or damaged: it is made again
            stored = orjson.loads(path.read_bytes())
            if stored["stamp"] == stamp:
                return stored
        made = make()
        write_bytes(path, orjson.dumps({"stamp": stamp, **made}))
        return made


@contextmanager
def run_lock(folder: Location, rank: int = 0, splits: int = 1) -> Iterator[bool]:
    """Hold lock `rank` of `splits` in `folder`; yields whether no other worker of this run is there yet.

    Raises `UserError` if that lock is taken, or a run with another number of splits is at work. A process that starts
    at the same moment may mistake our look at its lock for a holder: start under one `exclusive` lock. A store cannot
    say who else is at work: there, nobody is ever alone.
    """
    if isinstance(folder, Url):
        yield False
        return
    mine = folder / f"{rank}-of-{splits}.lock"
    with _open(mine) as file:
        if not _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            raise _taken(mine)
        holder = f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}"
        with _writing(mine):
            file.truncate(0)
            file.write(holder.encode())
        alone = True
        for other in sorted(folder.glob("*-of-*.lock")):
            if other == mine:
                continue
            with _open(other) as foreign:
                if not _flock(foreign, fcntl.LOCK_SH | fcntl.LOCK_NB):
                    if not other.name.endswith(f"-of-{splits}.lock"):
                        raise _taken(other)
                    alone = False
        yield alone


def _open(path: Path) -> FileIO:
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab+", buffering=0)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror}). Make room or fix the permissions.") from error


def _flock(file: FileIO, mode: int) -> bool:
    try:
        fcntl.flock(file, mode)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    return True


def _taken(path: Path) -> UserError:
    return UserError(
        f"{path.parent}: another run is writing here ({path.read_text() or 'just started'}; lock {path.name}). "
        "Wait for it to end, or stop it, or choose another output folder."
    )
