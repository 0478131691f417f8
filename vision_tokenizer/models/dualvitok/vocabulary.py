"""The words that a language model needs for DualViTok's images: their names, their order, and how they spell an image.

Names and order are those of the released ILLUME+ data preparation (arXiv 2504.01934): seven marks, 16 heights and 16
widths, then a word for every semantic code (level 0) and every pixel code (level 1). They follow one another in a
vocabulary, wherever they begin.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vistoken.errors import UserError

IMAGE_START, IMAGE_END, LINE_END = "<start_of_image>", "<end_of_image>", "<end_of_line>"
LEVEL_MARKS = (("<start_of_level0>", "<end_of_level0>"), ("<start_of_level1>", "<end_of_level1>"))
SIDES = range(64, 1025, 64)  # heights and widths that have a word
CODEBOOK_SIZES = (32768, 98304)  # semantic, pixel

Grid = Sequence[Sequence[int]]  # rows of codes

_ADVICE = "Extend the language model's original tokenizer with pre_tokenize/extend_tokenizer.py."


def code_name(level: int, code: int) -> str:
    return f"<|image_level{level}_{code}|>"


def code_place(level: int) -> int:
    """What stands in a layout for any code of this level."""
    return -1 - level


def tag_names(height: int, width: int) -> list[str]:
    """The words of a resolution."""
    return [f"<height_{height}>", f"<width_{width}>"]


def image_names(height: int, width: int, grids: Sequence[Grid]) -> list[str]:
    """The words of an image that was encoded at height x width; `grids` are its semantic and its pixel codes."""
    names = [*tag_names(height, width), IMAGE_START]
    for level, ((start, end), grid) in enumerate(zip(LEVEL_MARKS, grids, strict=True)):
        names.append(start)
        for row in grid:
            names += [code_name(level, code) for code in row]
            names.append(LINE_END)
        names.append(end)
    names.append(IMAGE_END)
    return names


def added_names(codebook_sizes: Sequence[int]) -> list[str]:
    """All words, in the order of their ids."""
    names = [IMAGE_START, IMAGE_END, LINE_END, *LEVEL_MARKS[0], *LEVEL_MARKS[1]]
    names += [f"<height_{side}>" for side in SIDES] + [f"<width_{side}>" for side in SIDES]
    for level, size in enumerate(codebook_sizes):
        names += [code_name(level, code) for code in range(size)]
    return names


def find_words(ids: Mapping[str, int], codebook_sizes: Sequence[int], source: str) -> range | None:
    """The ids of the words in a vocabulary (name -> id), or None where it has none of them.

    Raises `UserError`, which blames `source`, where only some are there, or others, or in another order.
    """
    names = added_names(codebook_sizes)
    beyond = [code_name(level, size) for level, size in enumerate(codebook_sizes)]
    if not any(name in ids for name in (*names, *beyond)):
        return None
    first = ids.get(names[0])
    if first is None:
        known = next(name for name in (*names, *beyond) if name in ids)
        raise UserError(f"{source}: has a token {known} but no {names[0]}. {_ADVICE}")
    for level, name in enumerate(beyond):
        if name in ids:
            raise UserError(
                f"{source}: has {name}, so it was extended for more than {codebook_sizes[level]} codes of level "
                f"{level}. {_ADVICE}"
            )
    for number, name in enumerate(names, start=first):
        if ids.get(name) != number:
            found = f"has id {ids[name]}" if name in ids else "is not there"
            raise UserError(
                f"{source}: {names[0]} has id {first}, so {name} must have id {number}, but it {found}. {_ADVICE}"
            )
    return range(first, first + len(names))


class DualViTokVocabulary:
    """The words in an extended tokenizer.

    Args:
        ids: name -> id of the whole tokenizer, added tokens included.
        source: the tokenizer's file, for messages.

    `image_ids` is the range of all words, `codebook_sizes` how many codes of each level it knows. Raises `UserError`
    where they are missing or out of order.
    """

    def __init__(self, ids: Mapping[str, int], source: str):
        self.codebook_sizes = tuple(_codes_known(ids, level) for level in range(len(LEVEL_MARKS)))
        found = find_words(ids, self.codebook_sizes, source)
        if found is None:
            raise UserError(f"{source}: no token {IMAGE_START}, which sequences of DualViTok codes need. {_ADVICE}")
        self.image_ids = found
        self._ids = {name: ids[name] for name in added_names(self.codebook_sizes)}

        self.image_start, self.image_end = self.spell((IMAGE_START, IMAGE_END)).tolist()
        self.code_ids = tuple(
            range(first, first + size)
            for first, size in zip(
                self.spell([code_name(0, 0), code_name(1, 0)]).tolist(), self.codebook_sizes, strict=True
            )
        )
        self.height_ids, self.width_ids = (
            range(first, first + len(SIDES)) for first in self.spell(tag_names(SIDES[0], SIDES[0])).tolist()
        )

    def spell(self, names: Sequence[str]) -> np.ndarray:
        """Words -> (n,) int32 ids."""
        return np.array([self._ids[name] for name in names], np.int32)

    def layout(self, height: int, width: int, shapes: Sequence[tuple[int, int]]) -> np.ndarray:
        """An image's words, tag included: (L,) int32, `code_place(level)` where its codes stand.

        `shapes` are (h, w) of its grids. Blocks are read and generated by this; `image_names` writes them.
        """
        ids = self.spell(image_names(height, width, [[[0] * w] * h for h, w in shapes]))
        for level, words in enumerate(self.code_ids):
            ids[ids == words.start] = code_place(level)
        return ids

    def image_size(self, tag: Sequence[int]) -> tuple[int, int]:
        """The ids of a height and a width -> (height, width) in pixels. Raises `ValueError` for others."""
        height, width = map(int, tag)
        return SIDES[self.height_ids.index(height)], SIDES[self.width_ids.index(width)]


def _codes_known(ids: Mapping[str, Any], level: int) -> int:
    size = 0
    while code_name(level, size) in ids:
        size += 1
    return size
