"""Sequences of DualViTok's codes: lines of codebook inference as a language model's tokens, and back.

No image is read: the codes are in the lines. Turns are written in the ChatML form of Qwen2.5 and others, without a
system turn:

    <|im_start|>user\\n ... <|im_end|>\\n<|im_start|>assistant\\n ... <|im_end|>\\n

of which what the assistant says and the `<|im_end|>` after it are learned. The model has no vision tower, so it sees
an input image in the form in which it writes one: as its codes, which are not learned.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from pre_tokenize.conversation import END_MARK, IMAGE_MARK, Conversation, learned_turns
from pre_tokenize.dualvitok_text import read_item, spell
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
from pre_tokenize.text import IMAGE, TextTokenizer
from pre_tokenize.token_file import TokenSample
from vision_tokenizer.models.dualvitok.model import grid_sizes
from vision_tokenizer.models.dualvitok.vocabulary import DualViTokVocabulary, code_place
from vistoken.errors import DataError, ItemError, UserError
from vistoken.jobs.chunks import Item
from vistoken.jobs.counts import SUMMARY
from vistoken.jobs.manifest import MANIFEST, read_manifest
from vistoken.jobs.run import Table
from vistoken.jobs.shards import shard_stem
from vistoken.store import Location, location

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
RANDOM = f"user\nGenerate a random image of {IMAGE_MARK}\n"  # IMAGE_MARK: the size, or the image with its size
RECONSTRUCT = f"user\n{IMAGE_MARK}\nReconstruct the image according to the given image\n"


class DualViTokFormat(SequenceFormat):
    """Turns in ChatML, of which those of the assistant are learned; images as words.

    Args:
        text: the tokenizer of a language model, extended with the words of DualViTok. Raises `UserError` if not.
        process_item: brings an item to the form of such a line.
    """

    branches = ("semantic", "pixel")

    def __init__(self, text: TextTokenizer, process_item: ProcessItem = as_it_is):
        self._text, self._process_item = text, process_item
        self.vocabulary = vocabulary = DualViTokVocabulary(text.ids, str(text.path))
        text.forbid(vocabulary.image_ids)
        self.codebook_sizes = vocabulary.codebook_sizes
        self.vocab_size = text.size
        self.known_ids = sorted(text.ids.values())
        if missing := [name for name in (TURN_START, TURN_END) if name not in text.ids]:
            raise UserError(
                f"{text.path}: no token {' and no '.join(missing)}, which separate the turns (ChatML). Take a language "
                "model whose tokenizer has them, such as Qwen2.5."
            )
        self.turn_start, self.turn_end = start, end = text.ids[TURN_START], text.ids[TURN_END]
        self.names = {start: TURN_START, end: TURN_END}
        new_line, self._assistant = (text.encode(words).tolist() for words in ("\n", "assistant\n"))
        self._begin = [start]
        self._to_answer = [end, *new_line, start, *self._assistant]
        self._to_question = [end, *new_line, start]  # "user\n" stands in the text: it is tokenised with what follows
        self._last = [end, *new_line]

    def drafts(self, items: Sequence[Item]) -> Iterator[Draft | ItemError]:
        return tokenize_items(items, self._parse, self._text)

    def _parse(self, value: dict[str, Any]) -> Conversation:
        values, pictures = read_item(self._process_item(value), self.vocabulary.codebook_sizes)
        learned, text, words = learned_turns(values), "", []
        for turn, pieces in enumerate(spell(values, pictures, inputs=True)):
            text += "" if turn % 2 else "user\n"
            text += "".join(piece if isinstance(piece, str) else IMAGE_MARK for piece in pieces) + END_MARK
            words += [piece for piece in pieces if not isinstance(piece, str)]
        return Conversation(text, learned, tuple(picture.name for picture in pictures), tuple(words))

    def sample(self, draft: Draft, images: Images) -> TokenSample:
        parsed = draft.parsed
        blocks = [self.vocabulary.spell(words) for words in parsed.words]
        ends = [self._to_question if learned else self._to_answer for learned in parsed.learned[:-1]]
        tokens, loss_mask = join(draft.marked, parsed.learned, blocks, self._begin, [*ends, self._last])
        return TokenSample(draft.item, tokens, loss_mask, parsed.images)

    def unconditional(self, prompt: np.ndarray, head: Sequence[int]) -> Sequence[int]:
        """The published messages: a random image of the size, or the image to edit as it is."""
        first_turn = prompt[: int(np.argmax(prompt == self.turn_end))]
        given = [prompt[block.start : block.end] for block in self.blocks(first_turn)]
        marked = self._text.encode((RECONSTRUCT if given else RANDOM) + END_MARK)
        image = np.concatenate(given) if given else np.asarray(head[:2])  # ids of a size
        place = int(np.argmax(marked == IMAGE))
        return [*self._begin, *marked[:place], *image, *marked[place + 1 : -1], *self._to_answer, *head]

    def without_condition(self, sample: TokenSample) -> TokenSample:
        """The published dropout: the first human turn becomes the unconditional message; where it holds an image to
        edit, that image itself is what is learned.
        """
        tokens, mask, blocks = sample.tokens, sample.loss_mask, self.blocks(sample.tokens)
        number = next((n for n, block in enumerate(blocks) if mask[block.start]), None)
        if number is None:
            return sample
        target, begin = blocks[number], int(np.argmax(mask))
        given = [block for block in blocks if block.end <= int(np.argmax(tokens == self.turn_end))]
        head = tokens[target.start : target.start + 3].tolist()
        prompt = np.array(self.unconditional(tokens[:begin], head)[: -len(head)], np.int32)
        image = tokens[given[0].start : given[0].end] if given else tokens[target.start : target.end]
        answer = np.concatenate([tokens[begin : target.start], image, tokens[target.end :]])
        learned = [mask[begin : target.start], np.full(len(image), True), mask[target.end :]]
        images = list(sample.images)
        if given:
            images[number] = images[0]
        kept = (*images[: len(given)], *images[number:])
        loss_mask = np.concatenate([np.zeros(len(prompt), bool), *learned])
        return TokenSample(sample.id, np.concatenate([prompt, answer]), loss_mask, kept)

    def blocks(self, tokens: np.ndarray) -> list[Block]:
        marks = pairs(tokens, self.vocabulary.image_start, self.vocabulary.image_end, "image")
        found = [self._block(tokens, start - 2, end + 1) for start, end in marks]
        codes = sum(int(((tokens >= words.start) & (tokens < words.stop)).sum()) for words in self.vocabulary.code_ids)
        if codes != sum(grid.size for block in found for grid in block.grids):
            raise ValueError("there are image tokens outside of image blocks")
        return found

    def _block(self, tokens: np.ndarray, start: int, end: int) -> Block:
        block = tokens[max(start, 0) : end]
        try:
            size = self.vocabulary.image_size(block[:2].tolist())
        except ValueError as error:
            raise ValueError("an image block does not begin with its height and width") from error
        shapes = grid_sizes(*size)
        layout, grids = self.vocabulary.layout(*size, shapes), []
        if len(block) != len(layout):
            raise ValueError(f"an image block of {end - start} ids cannot hold an image of {size[0]} x {size[1]}")
        wrong = (layout >= 0) & (block != layout)
        for level, (shape, words) in enumerate(zip(shapes, self.vocabulary.code_ids, strict=True)):
            places = layout == code_place(level)
            wrong |= places & ((block < words.start) | (block >= words.stop))
            grids.append(block[places].reshape(shape) - words.start)
        if wrong.any():
            raise ValueError("an image block holds an id that does not belong there")
        return Block(start, end, size, tuple(grids))

    def learned(self, tokens: np.ndarray) -> np.ndarray:
        turns = pairs(tokens, self.turn_start, self.turn_end, "turn")
        if not turns or turns[0][0]:
            raise ValueError(f"a sequence begins with {TURN_START}")
        mask = np.zeros(len(tokens), bool)
        for start, end in turns[1::2]:
            said = start + 1 + len(self._assistant)
            if not np.array_equal(tokens[start + 1 : said], self._assistant):
                raise ValueError("every second turn must be the assistant's")
            mask[said : end + 1] = True
        return mask

    def text(self, ids: np.ndarray) -> str:
        return self._text.decode(ids)


def _check_unchanged(table: Table) -> None:
    """Hold the lines against the hash in the summary of codebook inference, where that lies beside them."""
    try:
        files = orjson.loads((table.path.parent / SUMMARY).read_bytes())["files"]
        written = {shard_stem(name): of_file["sha256"] for name, of_file in files.items()}.get(table.path.stem)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # codes that were moved, or made elsewhere
        return
    if written is not None and written != table.fingerprint:
        raise DataError(
            f"{table.path}: not the bytes that codebook inference wrote: their SHA-256 is {table.fingerprint[:16]}..., "
            f"{SUMMARY} says {str(written)[:16]}... Where the file is damaged, delete it and run codebook inference "
            "again with --no-resume; where you changed it on purpose, move it to another folder."
        )


def encoded_images(codes: Location) -> Location:
    """Where codebook inference, which wrote the file `codes`, found the images; the current folder if nobody knows."""
    try:
        return location(orjson.loads((codes.parent / SUMMARY).read_bytes())["image_dir"])
    except (OSError, ValueError, LookupError, TypeError):  # codes that were moved, or made elsewhere
        return Path()


def make_manifest(items_per_file: int, text: TextTokenizer, sequences: DualViTokFormat, table: Table) -> dict[str, Any]:
    """What decides the token files.

    Raises `UserError` where the lines come from codebooks of other sizes, `DataError` where they are no longer those
    that codebook inference wrote.
    """
    _check_unchanged(table)
    codebook = read_manifest(table.path.parent) or {}  # absent beside lines that were moved, or made elsewhere
    tokenizer = codebook.get("tokenizer", {})
    known = sequences.vocabulary.codebook_sizes
    if tokenizer and tuple(tokenizer.get("codebook_sizes", ())) != known:
        raise UserError(
            f"{table.path.parent / MANIFEST}: the codes come from codebooks of {tokenizer.get('codebook_sizes')}, "
            f"{text.path} has words for {list(known)}. Extend the tokenizer with --semantic_size and --pixel_size."
        )
    return common_manifest(
        table,
        text,
        {"name": "dualvitok", "fingerprint": tokenizer.get("fingerprint")},
        {"settings": {"turns": "chatml", "items_per_file": items_per_file}},
        packages=("vistoken", "tokenizers"),
    )
