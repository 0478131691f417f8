"""Token files as conversations to read, with their images decoded in place, and as distributions."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from pre_tokenize.sequences import Block, SequenceFormat
from pre_tokenize.token_file import TokenFiles, TokenSample
from vision_tokenizer.models.protocol import ImageTokenizer
from vision_tokenizer.review import html as report
from vision_tokenizer.review.preview import (
    Pair,
    codebook_section,
    decode_codes,
    lengths_section,
    make_pair,
    quality_facts,
    resolution_section,
    write_contact_sheet,
)
from vision_tokenizer.review.quality import CodeUse
from vistoken.errors import ItemError
from vistoken.jobs.files import write_bytes

TALLIED = 2000  # sequences whose codes and masks are counted; lengths are those of all

Original = Callable[[Path, Block], torch.Tensor]  # an image file as it was encoded, uint8 (3, H, W)


@dataclass
class Contents:
    """What some of the sequences hold."""

    sequences: int = 0
    tokens: int = 0
    learned: int = 0
    broken: int = 0  # sequences that verify_tokens.py has something to say about
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # of images, (h, w)
    uses: dict[str, CodeUse] = field(default_factory=dict)


def tally(files: TokenFiles, positions: Sequence[int], reader: SequenceFormat) -> Contents:
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


class Renderer:
    """Sequences as HTML; `pairs` collects their images. Without a tokenizer, images are only named."""

    def __init__(self, reader: SequenceFormat, tokenizer: ImageTokenizer | None, original: Original):
        self._reader, self._tokenizer, self._original = reader, tokenizer, original
        self.pairs: list[Pair] = []

    def talk(self, sample: TokenSample) -> str:
        """A whole sequence, turn by turn. Raises `ValueError` for blocks that are not well formed."""
        turns, current, at = [], [], 0
        blocks = self._reader.blocks(sample.tokens)
        for number, block in enumerate(blocks):
            self._words(sample, at, block.start, turns, current)
            current.append(self._image(sample, number, block))
            at = block.end
        self._words(sample, at, len(sample.tokens), turns, current)
        turns += ["".join(current)] if current else []
        learned = int(sample.loss_mask.sum())
        return report.talk(f"item {sample.id} · {len(sample.tokens):,} tokens, {learned:,} learned", turns)

    def _words(self, sample: TokenSample, start: int, end: int, turns: list[str], current: list[str]) -> None:
        """Text and marks of tokens [start, end); a turn that ends moves from `current` to `turns`."""
        ids, mask = sample.tokens, sample.loss_mask
        while start < end:
            token = int(ids[start])
            if token in self._reader.names:
                current.append(report.mark(self._reader.names[token], bool(mask[start])))
                start += 1
                if token == self._reader.turn_end:
                    turns.append("".join(current))
                    current.clear()
                continue
            stop = start + 1
            while stop < end and mask[stop] == mask[start] and int(ids[stop]) not in self._reader.names:
                stop += 1
            text = self._reader.text(ids[start:stop])
            if current or text.strip():  # not the line breaks between turns
                current.append(report.spoken(text, bool(mask[start])))
            start = stop

    def _image(self, sample: TokenSample, number: int, block: Block) -> str:
        learned, h_w = bool(sample.loss_mask[block.start]), f"{block.size[0]} x {block.size[1]}"
        path = Path(sample.images[number]) if number < len(sample.images) else None
        name = path.name if path else "image"
        if self._tokenizer is None:
            return report.mark(f"{name}, {h_w}", learned)
        original = self._find(path, block)
        pair = make_pair(name, f"item {sample.id}", original, decode_codes(self._tokenizer, block.grids))
        self.pairs.append(pair)
        return report.pair(pair.original, pair.decoded, pair.title, pair.said, learned)

    def _find(self, path: Path | None, block: Block) -> torch.Tensor | None:
        if path is None:
            return None
        try:
            return self._original(path, block)
        except ItemError:
            return None


def write_report(
    folder: Path, files: TokenFiles, contents: Contents, talks: Sequence[str], pairs: Sequence[Pair], note: str
) -> None:
    """`report.html` and, where images were decoded, `contact_sheet.png`."""
    lengths = np.bincount(files.lengths)
    total = int(files.lengths.sum(dtype=np.int64))
    facts = [(f"{len(files):,}", "sequences"), (f"{total:,}", "tokens")]
    median = np.quantile(files.lengths, 0.5, method="inverted_cdf")  # as pre_tokenize.py reports it
    facts += [(f"{median:,}", "median length"), (f"{files.lengths.max():,}", "longest")]
    facts += [(f"{contents.learned / max(contents.tokens, 1):.1%}", "of the tokens learned")]
    facts += quality_facts([pair for pair in pairs if pair.original])
    sections = [report.note(note)] if note else []
    sections += [report.tiles(facts)]
    if contents.broken:
        sections += [report.note(f"{contents.broken:,} sequences are not as they should be: see verify_tokens.py.")]
    lead = "As the model reads them, in order. Images are decoded in their places, beside the original."
    sections += [report.section("conversations", "Conversations", report.legend(), *talks, lead=lead)]
    if contents.sizes:
        sections += [resolution_section(contents.sizes)]
        sections += [codebook_section(branch, use) for branch, use in contents.uses.items()]
    counts = Counter({int(length): int(lengths[length]) for length in np.flatnonzero(lengths)})
    sections += [lengths_section(counts, "tokens", "Tokens of every sequence.")]
    subtitle = f"{files.record.path}"
    if contents.sequences < len(files):
        subtitle += f" · codes and learned share counted in {contents.sequences:,} of {len(files):,} sequences"
    write_bytes(folder / "report.html", report.page("Token files", subtitle, sections).encode())
    if pairs:
        write_contact_sheet(folder / "contact_sheet.png", pairs)
