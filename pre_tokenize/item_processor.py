"""One item to one sequence: text ids, image blocks in their places, and the mask of what is learned."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from pre_tokenize.conversation import Conversation, parse_conversation
from pre_tokenize.text import END, IMAGE, TextTokenizer
from pre_tokenize.token_file import TokenSample
from vision_tokenizer.chameleon.vocabulary import ChameleonVocabulary
from vision_tokenizer.engine import Encoded
from vision_tokenizer.errors import Failed, ItemError
from vision_tokenizer.jobs.chunks import Item

ProcessItem = Callable[[dict[str, Any]], dict[str, Any]]  # somebody's own format -> the document's

# what code that takes an item apart raises when the item is not as it expects
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Draft:
    """An item whose text is ids already, while its images are still files."""

    item: int
    marked: np.ndarray  # (N,) ids, END after each turn and IMAGE in the place of each image
    learned: tuple[bool, ...]  # per turn
    images: tuple[str, ...]  # as the item names them
    paths: tuple[Path, ...]  # where they are


class ChameleonSequences:
    """Items to Chameleon sequences, in two steps around the encoding of their images.

    Args:
        text: the text tokenizer of a Chameleon release.
        process_item: brings an item to the document's format.
        image_dir: where relative image paths begin.
    """

    def __init__(self, text: TextTokenizer, process_item: ProcessItem, image_dir: Path):
        self._text, self._process_item, self._image_dir = text, process_item, image_dir
        self.vocabulary = ChameleonVocabulary(text.ids, str(text.path))
        text.forbid(self.vocabulary.image_ids)

    def drafts(self, items: Sequence[Item]) -> Iterator[Draft | ItemError]:
        """Each item with its text tokenised, all texts in one batch, or why it cannot be done."""
        for item, found in zip(items, tokenize_items(items, self._parse, self._text), strict=True):
            if isinstance(found, ItemError):
                yield found
                continue
            conversation, marked = found
            paths = tuple(self._image_dir / image for image in conversation.images)
            yield Draft(item.index, marked, conversation.learned, conversation.images, paths)

    def sample(self, draft: Draft, images: Mapping[Path, Encoded | ItemError]) -> TokenSample:
        """The finished sequence. Raises the error of the first image that has one."""
        blocks = []
        for path in draft.paths:
            result = images[path]
            if isinstance(result, ItemError):
                raise result
            blocks.append(self.vocabulary.image_block(result.codes[0]))
        tokens, loss_mask = assemble(
            draft.marked, draft.learned, blocks, self.vocabulary.begin, self.vocabulary.end_of_turn
        )
        return TokenSample(draft.item, tokens, loss_mask, draft.images)

    def _parse(self, value: dict[str, Any]) -> Conversation:
        return parse_conversation(self._process_item(value))


class Parsed(Protocol):
    """A checked item; `text` has a mark after each turn and one in the place of each block of other ids."""

    @property
    def text(self) -> str: ...


AnyParsed = TypeVar("AnyParsed", bound=Parsed)


def tokenize_items(
    items: Sequence[Item], parse: Callable[[dict[str, Any]], AnyParsed], text: TextTokenizer
) -> Iterator[tuple[AnyParsed, np.ndarray] | ItemError]:
    """Each item as parsed, with the ids of its text, all texts in one batch; or why it cannot be done."""
    parsed = [_parsed(item, parse) for item in items]
    ids = iter(text.encode_batch([found.text for found in parsed if not isinstance(found, ItemError)]))
    for found in parsed:
        marked = found if isinstance(found, ItemError) else next(ids)
        yield marked if isinstance(marked, ItemError) else (found, marked)


def _parsed(item: Item, parse: Callable[[dict[str, Any]], AnyParsed]) -> AnyParsed | ItemError:
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


def assemble(
    marked: np.ndarray, learned: Sequence[bool], blocks: Sequence[np.ndarray], begin: int, end_of_turn: int
) -> tuple[np.ndarray, np.ndarray]:
    """`join` for a vocabulary with one id that opens a sequence and one that closes a turn."""
    return join(marked, learned, blocks, [begin], [[end_of_turn]] * len(learned))


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
