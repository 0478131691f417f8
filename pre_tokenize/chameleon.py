"""Chameleon's sequences, and what pre_tokenize.py does with its tokenizers: load them, record them, put them to work.

A sequence is `<s>`, then turns that each end in an id of their own; images are blocks of ids in their places.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pre_tokenize.conversation import Conversation, parse_conversation
from pre_tokenize.output import common_manifest
from pre_tokenize.sequences import (
    Block,
    Draft,
    Images,
    ProcessItem,
    SequenceFormat,
    as_it_is,
    join,
    pairs,
    tokenize_items,
)
from pre_tokenize.text import TextTokenizer
from pre_tokenize.token_file import TokenSample
from vision_tokenizer.codebook.encoder import Encoder
from vision_tokenizer.images.chameleon import crop_sizes, prepare
from vision_tokenizer.models.chameleon.vocabulary import CODEBOOK_SIZE, PIXELS_PER_TOKEN, ChameleonVocabulary
from vision_tokenizer.models.chameleon.vqgan import ChameleonVQGAN, load_chameleon
from vision_tokenizer.models.fused import kernel_facts
from vistoken.device import device_facts
from vistoken.errors import ItemError, UserError
from vistoken.jobs.chunks import Item
from vistoken.jobs.progress import Progress
from vistoken.jobs.run import Table
from vistoken.store import Location


@dataclass(frozen=True)
class Settings:
    """What decides the token files, besides the tokenizers."""

    target_size: int
    crop: str
    torch_dtype: str
    batch_size: int
    items_per_file: int
    exif_orientation: str = "ignore"
    compile: bool = False
    cuda_graphs: bool = False


def load_tokenizers(
    text: str | None, folder: str, device: torch.device, settings: Settings
) -> tuple[TextTokenizer, ChameleonVQGAN]:
    """The text tokenizer of `text` (None: of `folder`) and the VQGAN of `folder`. Raises `UserError`."""
    tokenizer = TextTokenizer(text or folder)
    vqgan = load_chameleon(folder, device=str(device), dtype=settings.torch_dtype, compile=settings.compile)
    if vqgan.codebook_sizes != (CODEBOOK_SIZE,) or vqgan.side != PIXELS_PER_TOKEN:
        raise UserError(
            f"{folder}/vqgan.yaml: {vqgan.codebook_sizes[0]} codes of {vqgan.side} px; the Chameleon vocabulary has "
            f"names for {CODEBOOK_SIZE} codes of {PIXELS_PER_TOKEN} px"
        )
    return tokenizer, vqgan


class ChameleonFormat(SequenceFormat):
    """`<s>`, then turns that each end in an id of their own, of which every second is learned.

    Args:
        text: the text tokenizer of a Chameleon release.
        process_item: brings an item to the document's format.
        image_dir: where relative image paths begin.
    """

    branches = ("image",)

    def __init__(self, text: TextTokenizer, process_item: ProcessItem = as_it_is, image_dir: Location = Path()):
        self._text, self._process_item, self._image_dir = text, process_item, image_dir
        self.vocabulary = vocabulary = ChameleonVocabulary(text.ids, str(text.path))
        text.forbid(vocabulary.image_ids)
        self.codebook_sizes = (len(vocabulary.image_ids),)
        self.vocab_size = vocabulary.size
        self.known_ids = sorted(text.ids.values())
        self.turn_end = vocabulary.end_of_turn
        self.names = {vocabulary.begin: "start", self.turn_end: "end of turn"}

    def drafts(self, items: Sequence[Item]) -> Iterator[Draft | ItemError]:
        return tokenize_items(items, self._parse, self._text, self._image_dir)

    def _parse(self, value: dict[str, Any]) -> Conversation:
        return parse_conversation(self._process_item(value))

    def sample(self, draft: Draft, images: Images) -> TokenSample:
        learned, blocks, sizes = draft.parsed.learned, [], []
        for path in draft.paths:
            result = images[path]
            if isinstance(result, ItemError):
                raise result
            blocks.append(self.vocabulary.image_block(result.codes[0]))
            sizes.append(result.info.size)
        ends = [[self.vocabulary.end_of_turn]] * len(learned)
        tokens, loss_mask = join(draft.marked, learned, blocks, [self.vocabulary.begin], ends)
        return TokenSample(draft.item, tokens, loss_mask, draft.parsed.images, tuple(sizes))

    def unconditional(self, prompt: np.ndarray, head: Sequence[int]) -> Sequence[int]:
        """The image alone: as published, no text and no earlier image, not even the start."""
        return head

    def without_condition(self, sample: TokenSample) -> TokenSample:
        """All before the image is cut off; its start, now first, is no longer learned."""
        blocks = self.blocks(sample.tokens)
        number = next((n for n, block in enumerate(blocks) if sample.loss_mask[block.start]), None)
        if number is None:
            return sample
        start = blocks[number].start
        loss_mask = sample.loss_mask[start:].copy()
        loss_mask[0] = False
        return TokenSample(sample.id, sample.tokens[start:], loss_mask, sample.images[number:])

    def blocks(self, tokens: np.ndarray) -> list[Block]:
        vocabulary, found = self.vocabulary, []
        for start, last in pairs(tokens, vocabulary.image_start, vocabulary.image_end, "image"):
            block = tokens[start : last + 1]
            found.append(Block(start, last + 1, vocabulary.image_size(block), (vocabulary.image_codes(block),)))
        if int(np.isin(tokens, self.vocabulary.image_ids).sum()) != sum(block.grids[0].size for block in found):
            raise ValueError("there are image tokens outside of image blocks")
        return found

    def learned(self, tokens: np.ndarray) -> np.ndarray:
        begin, end = self.vocabulary.begin, self.vocabulary.end_of_turn
        if tokens[0] != begin or np.count_nonzero(tokens == begin) != 1:
            raise ValueError("a sequence begins with <s>, and has it nowhere else")
        ends = np.flatnonzero(tokens == end)
        if not len(ends) or ends[-1] != len(tokens) - 1:
            raise ValueError("the last id does not end a turn")
        turns = np.searchsorted(ends, np.arange(len(tokens)))
        return turns % 2 == 1

    def text(self, ids: np.ndarray) -> str:
        return self._text.decode(ids)


def make_encoder(vqgan: ChameleonVQGAN, settings: Settings, num_workers: int, progress: Progress) -> Encoder:
    """The encoder of a run's images."""
    return Encoder(
        vqgan,
        partial(prepare, sizes=crop_sizes(settings.target_size, settings.crop), orientation=settings.exif_orientation),
        batch_size=settings.batch_size,
        num_workers=num_workers,
        cuda_graphs=settings.cuda_graphs,
        on_image=lambda chunk, name, encoded: chunk.under_way.image_done(name, encoded),
    )


def make_manifest(settings: Settings, text: TextTokenizer, vqgan: ChameleonVQGAN, table: Table) -> dict[str, Any]:
    """What decides the token files."""
    return common_manifest(
        table,
        text,
        {"name": vqgan.name, "fingerprint": vqgan.fingerprint},
        {"settings": asdict(settings), "device": device_facts(vqgan.device) | kernel_facts(vqgan.device)},
        packages=("vistoken", "torch", "pillow", "tokenizers"),
    )
