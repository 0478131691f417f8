"""The Chameleon vocabulary: which id an image token, the end of a turn or the frame of an image has.

Everything is read, once, from the names in the tokenizer file. The name of an image token spells its code: `IMGIMG`,
the decimal digits with A=0 ... J=9, `Z`; ids are not in the order of codes. An image is spelt as start, height and
width in units of 32 px, rows of image tokens each ended by a new line, end: 1060 ids at 512 x 512.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from vistoken.errors import UserError

CODEBOOK_SIZE = 8192
PIXELS_PER_TOKEN = 16
PIXELS_PER_GRID = 32
MAX_GRIDS = 64  # sides up to 2048 px

_LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")


def image_token_name(code: int) -> str:
    return f"IMGIMG{str(code).translate(_LETTERS)}Z"


class ChameleonVocabulary:
    """Ids by name and by image code.

    Args:
        ids: name -> id of the whole tokenizer, added tokens included.
        source: the tokenizer's file, for messages.

    `image_ids` is (8192,) int32, code -> id; `grid_ids` (MAX_GRIDS + 1,) int32, units of 32 px -> id (0 unused).
    Raises `UserError` that names a missing token.
    """

    def __init__(self, ids: Mapping[str, int], source: str):
        def look_up(name: str) -> int:
            if name not in ids:
                raise UserError(
                    f"{source}: no token {name!r}, which Chameleon sequences need. "
                    "Use the text_tokenizer.json of a Chameleon or Lumina-mGPT release."
                )
            return ids[name]

        self.begin = look_up("<s>")
        self.end_of_turn = look_up("<reserved08706>")
        self.image_start = look_up("<racm3:break>")
        self.image_end = look_up("<eoss>")
        self.new_line = look_up("<reserved08799>")
        self.separator = look_up("<sentinel:0>")  # before an image's continuous tokens, in training
        grids = [look_up(f"<reserved{8800 + n:05d}>") for n in range(1, MAX_GRIDS + 1)]
        self.grid_ids = np.array([-1, *grids], np.int32)
        self.image_ids = np.array([look_up(image_token_name(code)) for code in range(CODEBOOK_SIZE)], np.int32)
        self.size = max(ids.values()) + 1
        self._codes = np.full(self.size, -1, np.int32)  # id -> code, -1 where it is no image token
        self._codes[self.image_ids] = np.arange(CODEBOOK_SIZE, dtype=np.int32)

    def image_block(self, codes: np.ndarray) -> np.ndarray:
        """(h, w) codes -> (h * (w + 1) + 4,) int32 ids, frame included. h and w are even: 32 px a grid."""
        h, w = codes.shape
        rows = np.full((h, w + 1), self.new_line, np.int32)
        rows[:, :w] = self.image_ids[codes]
        height, width = (self.grid_ids[side * PIXELS_PER_TOKEN // PIXELS_PER_GRID] for side in (h, w))
        return np.concatenate([[self.image_start, height, width], rows.ravel(), [self.image_end]], dtype=np.int32)

    def image_codes(self, block: np.ndarray) -> np.ndarray:
        """The inverse of `image_block`: one block -> (h, w) int32 codes. Raises `ValueError` if it is none."""
        sides = [int(np.flatnonzero(self.grid_ids == grid)[0]) if grid in self.grid_ids else 0 for grid in block[1:3]]
        h, w = (side * PIXELS_PER_GRID // PIXELS_PER_TOKEN for side in sides)
        if len(block) != h * (w + 1) + 4:
            raise ValueError(f"an image block of {len(block)} ids cannot hold {h} rows of {w} image tokens")
        codes = self._codes[block[3:-1].reshape(h, w + 1)[:, :w]]
        if (codes < 0).any() or not np.array_equal(self.image_block(codes), block):
            raise ValueError("an image block holds an id that does not belong there")
        return codes

    def image_spans(self, tokens: np.ndarray) -> Iterator[tuple[int, int]]:
        """[start, end) of every image block in a sequence, in order. Raises `ValueError` where one is not closed."""
        starts = np.flatnonzero(tokens == self.image_start)
        ends = np.flatnonzero(tokens == self.image_end)
        if len(starts) != len(ends) or (starts >= ends).any() or (starts[1:] < ends[:-1]).any():
            raise ValueError(f"{len(starts)} image starts and {len(ends)} image ends do not pair up")
        yield from zip(starts.tolist(), (ends + 1).tolist(), strict=True)
