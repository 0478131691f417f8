"""Sequences read back: where their turns and images are, and whether they are what the vocabulary prescribes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from tokenizers import Tokenizer

from pre_tokenize.dualvitok import TURN_END, TURN_START
from pre_tokenize.text import TextTokenizer
from vision_tokenizer.models.chameleon.vocabulary import PIXELS_PER_TOKEN, ChameleonVocabulary
from vision_tokenizer.models.dualvitok.model import grid_sizes
from vision_tokenizer.models.dualvitok.vocabulary import (
    IMAGE_END,
    IMAGE_START,
    SIDES,
    DualViTokVocabulary,
    code_name,
    image_names,
    tag_names,
)
from vistoken.errors import UserError


class Block(NamedTuple):
    """An image in a sequence: ids [start, end)."""

    start: int
    end: int
    size: tuple[int, int]  # (h, w) in pixels
    grids: tuple[np.ndarray, ...]  # codes per branch, (h, w)


class SequenceReader(Protocol):
    """How sequences of one vocabulary are built."""

    branches: tuple[str, ...]
    codebook_sizes: tuple[int, ...]
    vocab_size: int  # ids lie in [0, vocab_size)
    names: Mapping[int, str]  # of the marks: ids that are neither text nor codes
    turn_end: int  # the mark that ends a turn

    def blocks(self, tokens: np.ndarray) -> list[Block]:
        """The images, in order. Raises `ValueError` for a block that is not well formed, or codes outside of one."""
        ...

    def learned(self, tokens: np.ndarray) -> np.ndarray:
        """(L,) bool: what the turns say is learned. Raises `ValueError` where there are no proper turns."""
        ...

    def text(self, ids: np.ndarray) -> str:
        """Ids of text -> the text."""
        ...


class ChameleonReader:
    """`<s>`, then turns that each end in an id of their own, of which every second is learned."""

    branches = ("image",)

    def __init__(self, text: TextTokenizer):
        self._vocabulary = vocabulary = ChameleonVocabulary(text.ids, str(text.path))
        self.codebook_sizes = (len(vocabulary.image_ids),)
        self.vocab_size = vocabulary.size
        self._is_code = np.zeros(vocabulary.size, bool)
        self._is_code[vocabulary.image_ids] = True
        self.turn_end = vocabulary.end_of_turn
        self.names = {vocabulary.begin: "start", self.turn_end: "end of turn"}
        self.text = plain_decoder(text)

    def blocks(self, tokens: np.ndarray) -> list[Block]:
        found = []
        for start, end in self._vocabulary.image_spans(tokens):
            codes = self._vocabulary.image_codes(tokens[start:end])
            h, w = codes.shape
            found.append(Block(start, end, (h * PIXELS_PER_TOKEN, w * PIXELS_PER_TOKEN), (codes,)))
        if int(self._is_code[tokens].sum()) != sum(block.grids[0].size for block in found):
            raise ValueError("there are image tokens outside of image blocks")
        return found

    def learned(self, tokens: np.ndarray) -> np.ndarray:
        begin, end = self._vocabulary.begin, self._vocabulary.end_of_turn
        if tokens[0] != begin or np.count_nonzero(tokens == begin) != 1:
            raise ValueError("a sequence begins with <s>, and has it nowhere else")
        ends = np.flatnonzero(tokens == end)
        if not len(ends) or ends[-1] != len(tokens) - 1:
            raise ValueError("the last id does not end a turn")
        turns = np.searchsorted(ends, np.arange(len(tokens)))
        return turns % 2 == 1


class DualViTokReader:
    """Turns in ChatML, of which those of the assistant are learned; images spelt by their two grids."""

    branches = ("semantic", "pixel")

    def __init__(self, text: TextTokenizer):
        vocabulary = DualViTokVocabulary(text.ids, str(text.path))
        self._vocabulary, self.codebook_sizes = vocabulary, vocabulary.codebook_sizes
        self.vocab_size = text.size
        self._image_start, self._image_end = vocabulary.spell([IMAGE_START, IMAGE_END]).tolist()
        self._height, self._width = (int(vocabulary.spell([name])[0]) for name in tag_names(SIDES[0], SIDES[0]))
        self._first_codes = [int(vocabulary.spell([code_name(level, 0)])[0]) for level in range(2)]
        self._turn_start, self.turn_end = text.ids[TURN_START], text.ids[TURN_END]
        self._answer = text.encode_batch(["assistant\n"])[0]
        self.names = {self._turn_start: TURN_START, self.turn_end: TURN_END}
        self.text = plain_decoder(text)

    def blocks(self, tokens: np.ndarray) -> list[Block]:
        marks = _pairs(tokens, self._image_start, self._image_end, "image")
        found = [self._block(tokens, start - 2, end + 1) for start, end in marks]
        codes = (tokens >= self._first_codes[0]) & (tokens < self._first_codes[1] + self.codebook_sizes[1])
        if int(codes.sum()) != sum(grid.size for block in found for grid in block.grids):
            raise ValueError("there are image tokens outside of image blocks")
        return found

    def _block(self, tokens: np.ndarray, start: int, end: int) -> Block:
        tags = tokens[max(start, 0) : start + 2] - (self._height, self._width) if start >= 0 else np.array([-1])
        if tags.min() < 0 or tags.max() >= len(SIDES):
            raise ValueError("an image block does not begin with its height and width")
        size = (SIDES[tags[0]], SIDES[tags[1]])
        shapes, grids, at = grid_sizes(*size), [], start + 3
        if end - start != 4 + sum(2 + h * (w + 1) for h, w in shapes):
            raise ValueError(f"an image block of {end - start} ids cannot hold an image of {size[0]} x {size[1]}")
        for (h, w), first in zip(shapes, self._first_codes, strict=True):
            grids.append(tokens[at + 1 : at + 1 + h * (w + 1)].reshape(h, w + 1)[:, :w] - first)
            at += 2 + h * (w + 1)
        if not np.array_equal(self._spelt(size, grids), tokens[start:end]):
            raise ValueError("an image block holds an id that does not belong there")
        return Block(start, end, size, tuple(grids))

    def _spelt(self, size: tuple[int, int], grids: Sequence[np.ndarray]) -> np.ndarray:
        if any(grid.min() < 0 or grid.max() >= k for grid, k in zip(grids, self.codebook_sizes, strict=True)):
            return np.empty(0)
        return self._vocabulary.spell(image_names(*size, [grid.tolist() for grid in grids]))

    def learned(self, tokens: np.ndarray) -> np.ndarray:
        turns = _pairs(tokens, self._turn_start, self.turn_end, "turn")
        if not turns or turns[0][0]:
            raise ValueError(f"a sequence begins with {TURN_START}")
        mask = np.zeros(len(tokens), bool)
        for start, end in turns[1::2]:
            said = start + 1 + len(self._answer)
            if not np.array_equal(tokens[start + 1 : said], self._answer):
                raise ValueError("every second turn must be the assistant's")
            mask[said : end + 1] = True
        return mask


def _pairs(tokens: np.ndarray, start: int, end: int, what: str) -> list[tuple[int, int]]:
    """Positions of the marks that open and close something, in order."""
    starts, ends = np.flatnonzero(tokens == start), np.flatnonzero(tokens == end)
    if len(starts) != len(ends) or (starts >= ends).any() or (starts[1:] < ends[:-1]).any():
        raise ValueError(f"{len(starts)} {what} starts and {len(ends)} {what} ends do not pair up")
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def load_reader(manifest: Mapping[str, Any] | None, text: TextTokenizer) -> SequenceReader:
    """The reader for token files of this manifest; published pickles, which have none, are Chameleon's."""
    name = manifest["image_tokenizer"]["name"] if manifest else "chameleon"
    readers = {"chameleon": ChameleonReader, "dualvitok": DualViTokReader}
    if name not in readers:
        raise UserError(f"the token files say they hold codes of {name!r}; known are {', '.join(readers)}")
    return readers[name](text)


def plain_decoder(text: TextTokenizer) -> Callable[[np.ndarray], str]:
    """Ids -> text, special tokens shown by their names."""
    tokenizer = Tokenizer.from_file(str(text.path))
    return lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=False)
