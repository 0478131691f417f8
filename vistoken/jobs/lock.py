"""One run per output folder, by `flock`: the kernel drops the lock however the process ends.

The processes of one run (torchrun's ranks, or the `--rank=i --splits=n` of a bash loop) are a crew and let
each other in; anybody else is refused and told who is there.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vistoken.errors import UserError

# a file system without locks (some Lustre mounts): the job stays correct, only the warning is lost
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait for `path`'s lock and hold it: for short steps that one process does and its crew then reads."""
    with _open(path) as file:
        _flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def run_lock(folder: Path, rank: int = 0, splits: int = 1) -> Iterator[None]:
    """Hold seat `rank` of `splits` in `folder`; refuse if it is taken or a crew of another size is at work."""
    mine = folder / f"{rank}-of-{splits}.lock"
    with _open(mine) as file:
        if not _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            raise _taken(mine)
        holder = f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}"
        with _writing(mine):
            file.truncate(0)
            file.write(holder.encode())
        for other in folder.glob("*-of-*.lock"):
            if not other.name.endswith(f"-of-{splits}.lock"):
                with _open(other) as foreign:
                    if not _flock(foreign, fcntl.LOCK_SH | fcntl.LOCK_NB):
                        raise _taken(other)
        yield


def _open(path: Path):
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab+", buffering=0)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror}). Make room or fix the permissions.") from error


def _flock(file, mode: int) -> bool:
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
