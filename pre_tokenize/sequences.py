"""Items to sequences, and back: what both formats have in common. See `chameleon.py` and `dualvitok.py`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from pre_tokenize.conversation import Conversation
from pre_tokenize.text import END, IMAGE, TextTokenizer
from pre_tokenize.token_file import TokenSample
from vision_tokenizer.codebook.encoder import Encoded
from vistoken.errors import Failed, ItemError
from vistoken.jobs.chunks import Item
from vistoken.store import Location, within

ProcessItem = Callable[[dict[str, Any]], dict[str, Any]]  # somebody's own format -> the document's
Parse = Callable[[dict[str, Any]], Conversation]
Images = Mapping[Location, Encoded | ItemError]

# what code that takes an item apart raises when the item is not as it expects
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Draft:
    """An item whose text is ids already, while its images may still be files."""

    item: int
    marked: np.ndarray  # (N,) ids, END after each turn and IMAGE in the place of each image
    parsed: Conversation
    paths: tuple[Location, ...] = ()  # the images whose codes it needs


class Block(NamedTuple):
    """An image in a sequence: ids [start, end)."""

    start: int
    end: int
    size: tuple[int, int]  # (h, w) in pixels
    grids: tuple[np.ndarray, ...]  # codes per branch, (h, w)


class SequenceFormat(Protocol):
    """How items are written as sequences, and sequences read back.

    Items are written in two steps, around the encoding of their images. Where ids come from elsewhere, reading them
    raises `ValueError`.
    """

    branches: tuple[str, ...]
    codebook_sizes: tuple[int, ...]
    vocab_size: int  # ids lie in [0, vocab_size)
    known_ids: Sequence[int]  # those of them that have a name
    names: Mapping[int, str]  # of the marks: ids that are neither text nor codes
    turn_end: int  # the mark that ends a turn

    def drafts(self, items: Sequence[Item]) -> Iterable[Draft | ItemError]:
        """Each item with its text tokenised, all texts in one batch, or why it cannot be done."""
        ...

    def sample(self, draft: Draft, images: Images) -> TokenSample:
        """The finished sequence and its loss mask. Raises the error of the first image that has one."""
        ...

    def unconditional(self, prompt: np.ndarray, head: Sequence[int]) -> Sequence[int]:
        """What guidance compares a prompt with: the ids up to an image in its answer, without what was asked for.

        `head` are the image's own first ids, which come last.
        """
        ...

    def without_condition(self, sample: TokenSample) -> TokenSample:
        """The sample as guidance's other branch has to know it: its first learned image without what was asked for.

        One without a learned image stays. Raises `ValueError` as `blocks` does.
        """
        ...

    def blocks(self, tokens: np.ndarray) -> list[Block]:
        """The images, in order. Raises `ValueError` for a block that is not well formed, or codes outside of one."""
        ...

    def learned(self, tokens: np.ndarray) -> np.ndarray:
        """(L,) bool, the loss mask: what the turns say is learned. Raises `ValueError` for ids that are no turns."""
        ...

    def text(self, ids: np.ndarray) -> str:
        """Ids of text -> the text, special tokens by their names."""
        ...


def as_it_is(item: dict[str, Any]) -> dict[str, Any]:
    """The `ProcessItem` for items that are in the document's format already."""
    return item


def pairs(tokens: np.ndarray, start: int, end: int, what: str) -> list[tuple[int, int]]:
    """Positions of the marks that open and close something, in order. Raises `ValueError` where one is left over."""
    starts, ends = np.flatnonzero(tokens == start), np.flatnonzero(tokens == end)
    if len(starts) != len(ends) or (starts >= ends).any() or (starts[1:] < ends[:-1]).any():
        raise ValueError(f"{len(starts)} {what} starts and {len(ends)} {what} ends do not pair up")
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def tokenize_items(
    items: Sequence[Item], parse: Parse, text: TextTokenizer, image_dir: Location | None = None
) -> Iterator[Draft | ItemError]:
    """The drafts of `items`; those of images that are still files have their paths, which begin at `image_dir`."""
    parsed = [_parsed(item, parse) for item in items]
    ids = iter(text.encode_batch([found.text for found in parsed if not isinstance(found, ItemError)]))
    for item, found in zip(items, parsed, strict=True):
        if isinstance(found, ItemError):
            yield found
            continue
        marked = next(ids)
        if isinstance(marked, ItemError):
            yield marked
            continue
        paths = () if image_dir is None else tuple(within(image_dir, image) for image in found.images)
        yield Draft(item.index, marked, found, paths)


def _parsed(item: Item, parse: Parse) -> Conversation | ItemError:
    if item.error is not None:
        return item.error
    if not isinstance(item.value, dict):
        return Failed("not an object", f"expected a JSON object, found {type(item.value).__name__}")
    try:
        return parse(item.value)
    except ItemError as error:
        return error
    except MALFORMED as error:
        return Failed("process_item", f"{type(error).__name__}: {error}")


def join(
    marked: np.ndarray,
    learned: Sequence[bool],
    blocks: Sequence[np.ndarray],
    begin: Sequence[int],
    ends: Sequence[Sequence[int]],
) -> tuple[np.ndarray, np.ndarray]:
    """Join a conversation's parts -> ids (L,) int32 and loss mask (L,) bool.

    Args:
        marked: (N,) ids of the whole text, END after each turn and IMAGE in the place of each block.
        learned: per turn, whether its ids and blocks are learned, and the id that ends it.
        blocks: ids of each image (or of other words that no text may spell), in order.
        begin: the ids that open the sequence; not learned.
        ends: per turn, the id that ends it, followed by those that lead to the next; these are not learned.

    Raises `Failed` where the tokenizer did not keep the turns or the images apart.
    """
    stops = np.flatnonzero(marked == END)
    places = np.flatnonzero(marked == IMAGE)
    if len(stops) != len(learned) or len(places) != len(blocks) or stops[-1] != len(marked) - 1:
        detail = f"{len(stops)} turns and {len(places)} images in the ids, {len(learned)} and {len(blocks)} in the item"
        raise Failed("turns not found again", detail)
    turns = np.searchsorted(stops, np.arange(len(marked)))  # turn of each id
    lengths = np.ones(len(marked), np.int64)
    lengths[places] = [len(block) for block in blocks]
    lengths[stops] = [len(end) for end in ends]
    starts = np.cumsum(lengths) - lengths + len(begin)
    tokens = np.empty(int(lengths.sum()) + len(begin), np.int32)
    tokens[: len(begin)] = begin
    tokens[starts] = marked
    inserted: list[np.ndarray | Sequence[int]] = [*blocks, *ends]
    for place, block in zip((*places, *stops), inserted, strict=True):
        tokens[starts[place] : starts[place] + len(block)] = block
    loss_mask = np.concatenate([np.zeros(len(begin), bool), np.repeat(np.asarray(learned)[turns], lengths)])
    for stop, end in zip(stops, ends, strict=True):
        loss_mask[starts[stop] + 1 : starts[stop] + len(end)] = False
    return tokens, loss_mask
