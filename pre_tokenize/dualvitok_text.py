"""Dataset processing of the ILLUME document: a line of codebook inference as text and words. Pure functions.

`{resolution_tag}` becomes `<height_H><width_W>`, H x W being the size at which the image was encoded that it speaks
of: the next one to be generated; where none is, the nearest one. An `<image>` of a gpt turn, an image to generate, is
spelt as its codes; one of a human turn is an input (arXiv 2504.01934).
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from pre_tokenize.conversation import turn_values
from vision_tokenizer.codebook.annotations import OUTPUT_FIELDS
from vision_tokenizer.codebook.read import read_grid
from vision_tokenizer.images.anchors import model_size
from vision_tokenizer.models.dualvitok.model import grid_sizes
from vision_tokenizer.models.dualvitok.vocabulary import CODEBOOK_SIZES, SIDES, image_names, tag_names
from vistoken.errors import Failed

IMAGE_SYMBOL, TAG_SYMBOL = "<image>", "{resolution_tag}"
_SYMBOLS = re.compile(f"({re.escape(IMAGE_SYMBOL)}|{re.escape(TAG_SYMBOL)})")

Words = tuple[str, ...]  # names of the vocabulary, as against a text


class Picture(NamedTuple):
    """One image of an item."""

    name: str
    anchor: tuple[int, int]  # (height, width) at which it was encoded
    grids: tuple[list[list[int]], ...]  # semantic and pixel codes

    @property
    def tag(self) -> Words:
        return tuple(tag_names(*self.anchor))

    @property
    def words(self) -> Words:
        return tuple(image_names(*self.anchor, self.grids))


def text_form(item: dict[str, Any], codebook_sizes: Sequence[int] = CODEBOOK_SIZES) -> list[dict[str, str]]:
    """The published form of an item's `conversations`, for trainers that read text.

    Images to generate are spelt as codes; an input image keeps its `<image>`, for a vision tower to fill, and gets
    its tag before it. Raises `Failed`.
    """
    values, pictures = read_item(item, codebook_sizes)
    turns = []
    for turn, pieces in zip(item["conversations"], spell(values, pictures, inputs=False), strict=True):
        turns.append({"from": turn["from"], "value": "".join("".join(piece) for piece in pieces)})
    return turns


def spell(values: Sequence[str], pictures: Sequence[Picture], *, inputs: bool) -> list[list[str | Words]]:
    """Each turn's text as pieces, texts and words in between.

    `values` are the turns' texts, human first. With `inputs`, input images are spelt as codes, too; without, they
    are their tag and the text `<image>`. Raises `Failed` if images and symbols do not match.
    """
    symbols = [turn for turn, value in enumerate(values) for _ in range(value.count(IMAGE_SYMBOL))]
    if len(symbols) != len(pictures):
        raise Failed("image count", f"{len(symbols)} {IMAGE_SYMBOL} in the conversation, {len(pictures)} in `images`")
    generated = [number for number, turn in enumerate(symbols) if turn % 2]
    seen, turns = 0, []
    for turn, value in enumerate(values):
        pieces: list[str | Words] = []
        for piece in _SYMBOLS.split(value):
            if piece == IMAGE_SYMBOL:
                picture, seen = pictures[seen], seen + 1
                pieces += [picture.words] if inputs or turn % 2 else [picture.tag, IMAGE_SYMBOL]
            elif piece == TAG_SYMBOL:
                if not pictures:
                    raise Failed("image count", f"{TAG_SYMBOL} in a conversation without images")
                meant = next((number for number in generated if number >= seen), min(seen, len(pictures) - 1))
                pieces.append(pictures[meant].tag)
            elif piece:
                pieces.append(piece)
        turns.append(pieces)
    return turns


def read_item(item: dict[str, Any], codebook_sizes: Sequence[int]) -> tuple[list[str], list[Picture]]:
    """The turns' texts and the images of a line, checked as far as spelling them needs. Raises `Failed`."""
    values = turn_values(item.get("conversations"))
    if item.get("image") and not item.get("images"):
        raise Failed("codes missing", "`image`, which belongs to another format: name what codebook inference wrote")
    names = [item["images"]] if isinstance(item.get("images"), str) else item.get("images") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Failed("bad `images`", f"expected a list of file names, found {names!r:.60}")
    columns = []
    for field in OUTPUT_FIELDS:
        column = item.get(field, None if names else [])
        if not isinstance(column, list):
            raise Failed("codes missing", f"no list {field} in an item with images: run codebook inference on it first")
        if len(column) != len(names):
            raise Failed("image count", f"{len(names)} in `images`, {len(column)} in {field}")
        columns.append(column)
    _, grids, anchors = columns
    pictures = [
        _picture(f"image {number}", *fields, codebook_sizes)
        for number, fields in enumerate(zip(names, anchors, grids, strict=True))
    ]
    return values, pictures


def _picture(where: str, name: str, anchor: Any, grids: Any, codebook_sizes: Sequence[int]) -> Picture:
    sides = isinstance(anchor, list) and len(anchor) == 2 and all(type(side) is int for side in anchor)
    if not sides or not all(side in SIDES for side in anchor):
        known = f"multiples of {SIDES.step} from {SIDES.start} to {SIDES[-1]}"
        raise Failed("no tag for this size", f"{where}: matched_ratios is {anchor!r:.40}; tags exist for {known}")
    shapes = grid_sizes(*model_size(*anchor))
    if not isinstance(grids, list) or len(grids) != len(shapes):
        raise Failed("wrong shape", f"{where}: expected a semantic and a pixel grid in image_embed_inds")
    for level, (grid, shape, size) in enumerate(zip(grids, shapes, codebook_sizes, strict=True)):
        read_grid(f"{where}, level {level}", grid, shape, size)
    return Picture(name, tuple(anchor), tuple(grids))
