"""What an item made of an image and a text looks like: an annotation line of the document's STEP 1."""

import json
from contextlib import suppress
from typing import Any

import orjson

from vision_tokenizer.codebook.annotations import check_conversations
from vistoken.errors import Failed

TEXT_FIELDS = ("conversations", "caption", "text")  # looked for in this order where none is named
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")


def build_item(images: list[str], text: Any, task: str, item_id: Any = None) -> dict[str, Any]:
    """An annotation of images and a caption, or of images and conversations that are there already.

    Raises `Failed` for an empty caption or conversations that break the format's rules.
    """
    if isinstance(text, str):
        caption = " ".join(text.split())
        if not caption:
            raise Failed("no text", "the caption is empty")
        human, gpt = "<image>\nDescribe the image.", caption
        if task == "generation":
            human = f"Generate an image of {{resolution_tag}}, the content of image is {caption.rstrip('.')}.\n"
            gpt = "<image>"
        conversations = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    elif isinstance(text, list):
        conversations = text
    else:
        found = "nothing" if text is None else type(text).__name__
        raise Failed("no text", f"expected a caption or a list of conversations, found {found}")
    item = {"images": images, "conversations": conversations}
    check_conversations(item)
    return item if item_id is None else {**item, "id": item_id}


def item_line(item: dict[str, Any]) -> bytes:
    """The item as the text of a line. Raises `Failed` for what JSON has no form for."""
    try:
        return orjson.dumps(item)
    except TypeError as error:
        with suppress(TypeError):  # the slower json takes integers of any size
            return json.dumps(item, ensure_ascii=False).encode()
        raise Failed("not for JSON", str(error)) from error
