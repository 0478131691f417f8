"""Token files as conversations to read, with their images decoded in place, and as distributions."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from pre_tokenize.sequences import Block, SequenceFormat
from pre_tokenize.token_file import TokenFiles, TokenSample
from vision_tokenizer.models.protocol import ImageTokenizer
from vision_tokenizer.review.html import write_page
from vision_tokenizer.review.preview import Pair, decode_codes, make_pair, mean_quality, write_contact_sheet
from vision_tokenizer.review.quality import CodeUse
from vistoken.errors import ItemError
from vistoken.store import Location, location

TEMPLATE = Path(__file__).with_name("tokens.html")
COUNTED = 2000  # sequences whose codes and masks are counted; lengths are those of all

Original = Callable[[Location, Block], torch.Tensor]  # an image file as it was encoded, uint8 (3, H, W)


@dataclass
class Contents:
    """What some of the sequences hold."""

    sequences: int = 0
    tokens: int = 0
    learned: int = 0
    broken: int = 0  # sequences that verify_tokens.py would report
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # of images, (h, w)
    uses: dict[str, CodeUse] = field(default_factory=dict)


def count_contents(files: TokenFiles, positions: Sequence[int], reader: SequenceFormat) -> Contents:
    """Count what the sequences at `positions` hold."""
    contents = Contents()
    sizes = zip(reader.branches, reader.codebook_sizes, strict=True)
    contents.uses = {branch: CodeUse(size) for branch, size in sizes}
    for position in positions:
        sample = files[position]
        contents.sequences += 1
        contents.tokens += len(sample.tokens)
        contents.learned += int(sample.loss_mask.sum())
        try:
            blocks = reader.blocks(sample.tokens)
        except (ValueError, IndexError):
            contents.broken += 1
            continue
        for block in blocks:
            contents.sizes[block.size] += 1
            for use, grid in zip(contents.uses.values(), block.grids, strict=True):
                use.add(grid)
    return contents


@dataclass(frozen=True)
class Piece:
    """A part of a turn: some text, a mark (a token that is neither text nor image), or an image."""

    learned: bool
    text: str = ""
    mark: bool = False
    pair: Pair | None = None


@dataclass(frozen=True)
class Conversation:
    title: str
    turns: list[list[Piece]]


class Renderer:
    """Sequences as conversations. Without a tokenizer, images are only named.

    `original` reads an image file as it was encoded. `pairs` collects the images of all conversations.
    """

    def __init__(self, reader: SequenceFormat, tokenizer: ImageTokenizer | None, original: Original):
        self._reader, self._tokenizer, self._original = reader, tokenizer, original
        self.pairs: list[Pair] = []

    def conversation(self, sample: TokenSample) -> Conversation:
        """A whole sequence, turn by turn. Raises `ValueError` for image blocks that are not well formed."""
        turns: list[list[Piece]] = [[]]
        for piece in self._pieces(sample):
            if turns[-1] or piece.pair or piece.text.strip():  # not the line breaks between turns
                turns[-1].append(piece)
            if piece.mark and piece.text == self._reader.names[self._reader.turn_end]:
                turns.append([])
        learned = int(sample.loss_mask.sum())
        title = f"item {sample.id} · {len(sample.tokens):,} tokens, {learned:,} learned"
        return Conversation(title, [turn for turn in turns if turn])

    def _pieces(self, sample: TokenSample) -> Iterator[Piece]:
        at = 0
        for number, block in enumerate(self._reader.blocks(sample.tokens)):
            yield from self._words(sample, at, block.start)
            yield self._image(sample, number, block)
            at = block.end
        yield from self._words(sample, at, len(sample.tokens))

    def _words(self, sample: TokenSample, start: int, end: int) -> Iterator[Piece]:
        """Text and marks of the tokens [start, end)."""
        names, tokens = self._reader.names, zip(sample.tokens[start:end], sample.loss_mask[start:end], strict=True)
        for (mark, learned), group in groupby(tokens, key=lambda pair: (int(pair[0]) in names, bool(pair[1]))):
            ids = np.array([token for token, _ in group])
            if mark:
                yield from (Piece(learned, names[token], mark=True) for token in ids.tolist())
            else:
                yield Piece(learned, self._reader.text(ids))

    def _image(self, sample: TokenSample, number: int, block: Block) -> Piece:
        learned = bool(sample.loss_mask[block.start])
        path = location(sample.images[number]) if number < len(sample.images) else None
        name = path.name if path else "image"
        if self._tokenizer is None:
            return Piece(learned, f"{name}, {block.size[0]} x {block.size[1]}", mark=True)
        try:
            original = self._original(path, block) if path else None
        except ItemError:
            original = None
        pair = make_pair(name, f"item {sample.id}", original, decode_codes(self._tokenizer, block.grids))
        self.pairs.append(pair)
        return Piece(learned, pair=pair)


def write_report(
    folder: Location,
    files: TokenFiles,
    contents: Contents,
    conversations: Sequence[Conversation],
    pairs: Sequence[Pair],
    note: str,
) -> None:
    """`report.html` and, where images were decoded, `contact_sheet.png`."""
    subtitle = str(files.record.path)
    if contents.sequences < len(files):
        subtitle += f" · codes and learned share counted in {contents.sequences:,} of {len(files):,} sequences"
    median = np.quantile(files.lengths, 0.5, method="inverted_cdf")  # as pre_tokenize.py reports it
    lengths = np.bincount(files.lengths)
    write_page(
        folder / "report.html",
        TEMPLATE,
        title="Token files",
        subtitle=subtitle,
        note=note,
        warning=f"{contents.broken:,} sequences are broken: run verify_tokens.py." if contents.broken else "",
        facts=[
            (f"{len(files):,}", "sequences"),
            (f"{files.lengths.sum(dtype=np.int64):,}", "tokens"),
            (f"{median:,}", "median length"),
            (f"{files.lengths.max():,}", "longest"),
            (f"{contents.learned / max(contents.tokens, 1):.1%}", "of the tokens learned"),
            *mean_quality(pairs),
        ],
        conversations=conversations,
        contents=contents,
        lengths={length: int(lengths[length]) for length in np.flatnonzero(lengths).tolist()},
    )
    if pairs:
        write_contact_sheet(folder / "contact_sheet.png", str(files.record.path), pairs)
