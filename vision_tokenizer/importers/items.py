"""What an imported item looks like, whatever it came from: the annotation lines of the document's STEP 1."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from vision_tokenizer.codebook.annotations import check_conversations, image_path
from vision_tokenizer.images.files import SUFFIXES, embedded_format
from vistoken.errors import Failed
from vistoken.files import check_regular
from vistoken.jobs.files import write_bytes

TEXT_FIELDS = ("conversations", "caption", "text")  # looked for in this order where none is named
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")


class Record(NamedTuple):
    """One record of the source: the line of the item it becomes, or why it does not."""

    index: int  # among the records of its file, from 0
    where: str  # for messages: "line 18", "row 17", "member a/b.jpg"
    id: Any
    line: bytes | Failed

    @classmethod
    def of(cls, index: int, where: str, id: Any, make: Callable[..., dict[str, Any]], *given: Any) -> "Record":
        """With the item that `make(*given)` returns, or the `Failed` that it raises."""
        try:
            return cls(index, where, id, _line(make(*given)))
        except Failed as error:
            return cls(index, where, id, error)


def _line(item: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(item, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError as error:
        with suppress(TypeError):  # the slower json takes integers of any size
            return json.dumps(item, ensure_ascii=False).encode() + b"\n"
        raise Failed("not for JSON", str(error)) from error


def build_item(images: list[str], text: Any, task: str, item_id: Any = None) -> dict[str, Any]:
    """An annotation of images and a caption, or of images and conversations that are there already.

    Raises `Failed` for an empty caption or conversations that break the format's rules.
    """
    if isinstance(text, str):
        conversations = _captioned(text, task)
    elif isinstance(text, list):
        conversations = text
    else:
        found = "nothing" if text is None else type(text).__name__
        raise Failed("no text", f"expected a caption or a list of conversations, found {found}")
    item = {"images": images, "conversations": conversations}
    check_conversations(item)
    return item if item_id is None else {**item, "id": item_id}


def _captioned(caption: str, task: str) -> list[dict[str, str]]:
    caption = " ".join(caption.split())
    if not caption:
        raise Failed("no text", "the caption is empty")
    if task == "understanding":
        human, gpt = "<image>\nDescribe the image.", caption
    else:
        human = f"Generate an image of {{resolution_tag}}, the content of image is {caption.rstrip('.')}.\n"
        gpt = "<image>"
    return [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]


def store_image(image_dir: Path, stem: str, content: bytes) -> str:
    """Write an embedded image as `{image_dir}/{stem}{its format's suffix}`, whole or not at all; returns the name.

    One that is there already, from an interrupted run, is kept. Raises `Failed` for bytes that are no image.
    """
    name = stem + SUFFIXES[embedded_format(content, stem)]
    path = image_path(image_dir, name)
    if not path.exists() or path.stat().st_size != len(content):
        write_bytes(path, content, sync=False)  # the job syncs once a chunk: a sync an image takes milliseconds
    return name


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
