"""One item to one sequence: text ids, image blocks in their places, and the mask of what is learned."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pre_tokenize.text import END, IMAGE
from vision_tokenizer.errors import Failed


class TokenizedItem(NamedTuple):
    tokens: np.ndarray  # (L,) int32
    loss_mask: np.ndarray  # (L,) bool: the label is the token itself where true, -100 elsewhere


def assemble(
    marked: np.ndarray, learned: Sequence[bool], blocks: Sequence[np.ndarray], begin: int, end_of_turn: int
) -> TokenizedItem:
    """Join a conversation's parts.

    Args:
        marked: (N,) ids of the whole text, END after each turn and IMAGE in the place of each image.
        learned: per turn, whether its ids, its end and its image blocks are learned.
        blocks: ids of each image, in order.
        begin, end_of_turn: the ids that open the sequence and close a turn.

    Raises `Failed` where the tokenizer did not keep the turns or the images apart.
    """
    ends = np.flatnonzero(marked == END)
    places = np.flatnonzero(marked == IMAGE)
    if len(ends) != len(learned) or len(places) != len(blocks) or ends[-1] != len(marked) - 1:
        detail = f"{len(ends)} turns and {len(places)} images in the ids, {len(learned)} and {len(blocks)} in the item"
        raise Failed("turns not found again", detail)
    turns = np.searchsorted(ends, np.arange(len(marked)))  # turn of each id
    lengths = np.ones(len(marked), np.int64)
    lengths[places] = [len(block) for block in blocks]
    starts = np.cumsum(lengths) - lengths + 1  # after `begin`
    tokens = np.empty(int(lengths.sum()) + 1, np.int32)
    tokens[0] = begin
    tokens[starts] = np.where(marked == END, end_of_turn, marked)
    for place, block in zip(places, blocks, strict=True):
        tokens[starts[place] : starts[place] + len(block)] = block
    loss_mask = np.concatenate([[False], np.repeat(np.asarray(learned)[turns], lengths)])
    return TokenizedItem(tokens, loss_mask)
