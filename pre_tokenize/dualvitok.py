"""What pre_tokenize.py does with the codes of DualViTok: lines of codebook inference become a language model's tokens.

No image is read: the codes are in the lines. Turns are written in the ChatML form of Qwen2.5 and others, without a
system turn:

    <|im_start|>user\\n ... <|im_end|>\\n<|im_start|>assistant\\n ... <|im_end|>\\n

of which what the assistant says and the `<|im_end|>` after it are learned. The model has no vision tower, so it sees
an input image in the form in which it writes one: as its codes, which are not learned.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pre_tokenize.conversation import END_MARK, IMAGE_MARK, Conversation, learned_turns
from pre_tokenize.dualvitok_text import read_item, spell
from pre_tokenize.job import ChunkWork
from pre_tokenize.output import common_manifest
from pre_tokenize.sequences import Draft, Images, ProcessItem, join, tokenize_items
from pre_tokenize.text import TextTokenizer
from pre_tokenize.token_file import TokenSample
from vision_tokenizer.models.dualvitok.vocabulary import DualViTokVocabulary
from vistoken.errors import ItemError, UserError
from vistoken.jobs.chunks import ChunkTable, Item
from vistoken.jobs.manifest import MANIFEST, read_manifest
from vistoken.jobs.progress import Stopwatch

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"


class DualViTokSequences:
    """Lines of codebook inference to sequences.

    Args:
        text: the tokenizer of a language model, extended with the words of DualViTok. Raises `UserError` if not.
        process_item: brings an item to the form of such a line.
    """

    def __init__(self, text: TextTokenizer, process_item: ProcessItem):
        self._text, self._process_item = text, process_item
        self.vocabulary = DualViTokVocabulary(text.ids, str(text.path))
        text.forbid(self.vocabulary.image_ids)
        if missing := [name for name in (TURN_START, TURN_END) if name not in text.ids]:
            raise UserError(
                f"{text.path}: no token {' and no '.join(missing)}, which separate the turns (ChatML). Take a language "
                "model whose tokenizer has them, such as Qwen2.5."
            )
        start, end = text.ids[TURN_START], text.ids[TURN_END]
        new_line, assistant = (ids.tolist() for ids in text.encode_batch(["\n", "assistant\n"]))
        self._begin = [start]
        self._to_answer = [end, *new_line, start, *assistant]
        self._to_question = [end, *new_line, start]  # "user\n" stands in the text: it is tokenised with what follows
        self._last = [end, *new_line]

    def drafts(self, items: Sequence[Item]) -> Iterator[Draft | ItemError]:
        return tokenize_items(items, self._parse, self._text)

    def sample(self, draft: Draft, images: Images) -> TokenSample:
        parsed = draft.parsed
        blocks = [self.vocabulary.spell(words) for words in parsed.words]
        ends = [self._to_question if learned else self._to_answer for learned in parsed.learned[:-1]]
        tokens, loss_mask = join(draft.marked, parsed.learned, blocks, self._begin, [*ends, self._last])
        return TokenSample(draft.item, tokens, loss_mask, parsed.images)

    def _parse(self, value: dict[str, Any]) -> Conversation:
        values, pictures = read_item(self._process_item(value), self.vocabulary.codebook_sizes)
        learned, text, words = learned_turns(values), "", []
        for turn, pieces in enumerate(spell(values, pictures, inputs=True)):
            text += "" if turn % 2 else "user\n"
            text += "".join(piece if isinstance(piece, str) else IMAGE_MARK for piece in pieces) + END_MARK
            words += [piece for piece in pieces if not isinstance(piece, str)]
        return Conversation(text, learned, tuple(picture.name for picture in pictures), tuple(words))


class NoImages:
    """The job's encoder where there is nothing to encode."""

    def __init__(self) -> None:
        self.watch = Stopwatch()

    def encode(self, groups: Iterable[tuple[ChunkWork, Iterable[Path]]]) -> Iterator[tuple[ChunkWork, Images]]:
        for work, _ in groups:
            yield work, {}


def make_manifest(
    items_per_file: int, text: TextTokenizer, sequences: DualViTokSequences, table: ChunkTable
) -> dict[str, Any]:
    """What decides the token files. Raises `UserError` where the lines come from codebooks of other sizes."""
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
