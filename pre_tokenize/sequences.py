"""Items to sequences: what both kinds of image tokens have in common. See `chameleon.py` and `dualvitok.py`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pre_tokenize.conversation import Conversation
from pre_tokenize.text import END, IMAGE, TextTokenizer
from pre_tokenize.token_file import TokenSample
from vision_tokenizer.codebook.encoder import Encoded
from vistoken.errors import Failed, ItemError
from vistoken.jobs.chunks import Item

ProcessItem = Callable[[dict[str, Any]], dict[str, Any]]  # somebody's own format -> the document's
Parse = Callable[[dict[str, Any]], Conversation]
Images = Mapping[Path, Encoded | ItemError]

# what code that takes an item apart raises when the item is not as it expects
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Draft:
    """An item whose text is ids already, while its images may still be files."""

    item: int
    marked: np.ndarray  # (N,) ids, END after each turn and IMAGE in the place of each image
    parsed: Conversation
    paths: tuple[Path, ...] = ()  # the images whose codes it needs


class Sequences(Protocol):
    """How items become sequences, in two steps around the encoding of their images."""

    def drafts(self, items: Sequence[Item]) -> Iterable[Draft | ItemError]:
        """Each item with its text tokenised, all texts in one batch, or why it cannot be done."""
        ...

    def sample(self, draft: Draft, images: Images) -> TokenSample:
        """The finished sequence. Raises the error of the first image that has one."""
        ...


def tokenize_items(
    items: Sequence[Item], parse: Parse, text: TextTokenizer, image_dir: Path | None = None
) -> Iterator[Draft | ItemError]:
    """The drafts of `items`; those of images that are still files have their paths, which begin at `image_dir`."""
    parsed = [_parsed(item, parse) for item in items]
    ids = iter(text.encode_batch([found.text for found in parsed if not isinstance(found, ItemError)]))
    for item, found in zip(items, parsed, strict=True):
        marked = found if isinstance(found, ItemError) else next(ids)
        if isinstance(marked, ItemError):
            yield marked
        else:
            paths = () if image_dir is None else tuple(image_dir / image for image in found.images)
            yield Draft(item.index, marked, found, paths)


def _parsed(item: Item, parse: Parse) -> Conversation | ItemError:
    if item.error is not None:
        return Failed("not JSON", item.error)
    if not isinstance(item.value, dict):
        return Failed("not an object", f"expected a JSON object, found {type(item.value).__name__}")
    try:
        return parse(item.value)
    except ItemError as error:
        return error
    except _MALFORMED as error:
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
    for place, block in zip((*places, *stops), (*blocks, *ends), strict=True):
        tokens[starts[place] : starts[place] + len(block)] = block
    loss_mask = np.concatenate([np.zeros(len(begin), bool), np.repeat(np.asarray(learned)[turns], lengths)])
    for stop, end in zip(stops, ends, strict=True):
        loss_mask[starts[stop] + 1 : starts[stop] + len(end)] = False
    return tokens, loss_mask
