"""The document's conversation format: what is allowed, where the images go, which text is tokenised.

A data point is an object with `conversations`, a list of `{"from": "human" or "gpt", "value": text}`, and `image`,
a list of paths, one path, or absent. Turns alternate, human first; `assistant` is another name for `gpt`; a
conversation may end on a human turn. `<|image|>` marks the place of each image, in order; where none is marked, all
images come before the first human turn, unless there are as many `<image>`, another format's mark. What a gpt turn
says, its images and its end included, is learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vistoken.errors import Failed

IMAGE_SYMBOL, FOREIGN_SYMBOL = "<|image|>", "<image>"  # the latter is LLaVA's and codebook inference's
ROLES = (("human",), ("gpt", "assistant"))  # of even and odd turns

# The two atoms of the text that is tokenised. Unicode reserves these code points for a program's own use, so no
# text may contain them, whereas anybody can write "<reserved08706>" in a question.
IMAGE_MARK, END_MARK = "\ufdd0", "\ufdd1"


@dataclass(frozen=True)
class Conversation:
    """A checked data point."""

    text: str  # every turn followed by END_MARK, IMAGE_MARK in the place of each image
    learned: tuple[bool, ...]  # per turn
    images: tuple[str, ...]
    words: tuple[tuple[str, ...], ...] = ()  # names of ids for the places of IMAGE_MARK, where they are known already


def parse_conversation(item: Any) -> Conversation:
    """Check a data point in the document's format. Raises `Failed`, which says what is wrong with it."""
    if not isinstance(item, dict):
        raise Failed("not an object", f"expected a JSON object, found {type(item).__name__}")
    if item.get("images") and not item.get("image"):
        raise Failed("no `image`", "`images`, which belongs to another format: paths are in `image` here")
    images = _images(item.get("image"))
    values = turn_values(item.get("conversations"))
    learned = learned_turns(values)
    text = END_MARK.join([*values, ""])
    symbols = text.count(IMAGE_SYMBOL)
    if symbols == 0 and images and text.count(FOREIGN_SYMBOL) == len(images):
        raise Failed(
            "image count",
            f"no {IMAGE_SYMBOL} for {len(images)} in `image`, but as many {FOREIGN_SYMBOL}, another format's mark, "
            "which would be read as text. --item_processor examples/llava_items.py:LlavaItems replaces it",
        )
    if symbols == 0:
        text = f"{IMAGE_SYMBOL} " * len(images) + text
    elif symbols != len(images):
        raise Failed("image count", f"{symbols} {IMAGE_SYMBOL} in the conversation, {len(images)} in `image`")
    return Conversation(text.replace(IMAGE_SYMBOL, IMAGE_MARK), learned, images)


def _images(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    images = [value] if isinstance(value, str) else value
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise Failed("bad `image`", f"expected a path or a list of paths, found {_short(value)}")
    return tuple(images)


def turn_values(turns: Any) -> list[str]:
    """The texts of `conversations`, its speakers checked: turns alternate, human first."""
    if not isinstance(turns, list) or not turns:
        raise Failed("no conversation", f"expected a list of turns in `conversations`, found {_short(turns)}")
    values = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise Failed("bad turn", f'turn {number}: expected {{"from", "value"}} with texts, found {_short(turn)}')
        roles = ROLES[number % 2]
        if turn.get("from") not in roles:
            expected = " or ".join(roles)
            raise Failed("role out of order", f"turn {number}: expected {expected}, found {_short(turn.get('from'))}")
        if IMAGE_MARK in turn["value"] or END_MARK in turn["value"]:
            raise Failed("bad text", f"turn {number}: contains the Unicode noncharacter U+FDD0 or U+FDD1")
        try:
            turn["value"].encode()
        except UnicodeEncodeError as error:
            raise Failed("bad text", f"turn {number}: not valid Unicode ({error.reason})") from error
        values.append(turn["value"])
    return values


def learned_turns(values: Sequence[str]) -> tuple[bool, ...]:
    """Of turns, human first, which are learned. Raises `Failed` where none is, or one is empty."""
    if len(values) < 2:
        raise Failed("nothing to predict", "no gpt turn in the conversation")
    for turn, value in enumerate(values):
        if turn % 2 and not value.strip():  # nothing but the mark at its end would be learned
            raise Failed("empty answer", f"turn {turn}: the gpt turn says nothing")
    return tuple(turn % 2 == 1 for turn in range(len(values)))


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
