"""Items made of a source's records, and the images that an import finds or stores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vision_tokenizer.codebook.annotations import image_path
from vision_tokenizer.codebook.items import item_line
from vistoken.errors import Failed, ItemError
from vistoken.files import check_regular
from vistoken.jobs.chunks import Item
from vistoken.jobs.files import write_bytes


def made_item(index: int, where: str, id: Any, make: Callable[..., dict[str, Any]], *given: Any) -> Item:
    """What a record of the source becomes: the item that `make(*given)` returns, or the error that it raises."""
    try:
        value = make(*given)
        return Item(index, where, item_line(value), value, id=id)
    except ItemError as error:
        return Item(index, where, b"", None, error, id)


def store_image(image_dir: Path, name: str, content: bytes) -> None:
    """Write an embedded image, whole or not at all. One that is there already, from an interrupted run, is kept."""
    path = image_path(image_dir, name)
    if not path.exists() or path.stat().st_size != len(content):
        write_bytes(path, content, sync=False)  # the job syncs once a chunk: a sync an image takes milliseconds


def existing_image(image_dir: Path, name: str) -> str:
    """`name` itself, if that image lies in `image_dir`. Raises `Failed` if not."""
    path = image_path(image_dir, name)
    try:
        check_regular(path)
    except FileNotFoundError as error:
        raise Failed("image not found", str(path)) from error
    except OSError as error:
        raise Failed("image unreadable", f"{path}: {error.strerror}") from error
    return name
