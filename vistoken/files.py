"""Files of the user's, opened only where they are files: a named pipe waits for its writer, a device may never end.

An object in a store is a file, or absent.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vistoken.errors import UserError
from vistoken.store import Location, Url, location

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def is_text(name: str) -> bool:
    """Whether a name is UTF-8. Linux takes any bytes in a file's name, but JSON cannot spell them."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_there(path: Location) -> bool:
    """Whether `path` exists. `Path.exists` raises where it is too long to be a path at all."""
    try:
        return path.exists()
    except OSError:
        return False


def check_regular(path: str | Location) -> None:
    """Raises `OSError` (with `strerror`, for messages) where `path`, or what it links to, is no regular file."""
    if isinstance(path, Url):
        return
    mode = Path(path).stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        found = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"it is {found}, not a regular file", str(path))


def open_file(path: str | Location) -> BinaryIO:
    """`path` for reading. Raises `OSError` as `open` does, and where it is no regular file, before it is opened."""
    check_regular(path)
    return location(path).open("rb")


def read_yaml(path: Location, what: str) -> Any:
    """The content of a YAML file. Raises `UserError`, which calls it `what`, with the line that is wrong."""
    import yaml

    try:
        return yaml.safe_load(read_file(path))
    except OSError as error:
        raise UserError(f"{path}: cannot read this {what} ({error.strerror})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{place}: this {what} is not valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        raise UserError(f"{path}: this {what} is not text ({error.reason}, at position {error.position})") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot read this {what} ({error})") from error
    except RecursionError as error:
        raise UserError(f"{path}: brackets of this {what} are nested too deeply") from error


@contextmanager
def reading(where: object, what: object = "it") -> Iterator[None]:
    """Turn an `OSError` of the block into a `UserError`: `what` cannot be read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{where}: cannot read {what} ({error.strerror})") from error


def read_file(path: str | Location) -> bytes:
    """The content of `path`. Raises as `open_file` does."""
    with open_file(path) as file:
        return file.read()
