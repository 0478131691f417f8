"""Between people and a model: items of `pre_tokenize.py`'s input become questions, questions become prompts.

The last gpt turn of an item is what is asked for: where it holds an image, or where there is none and no image is
given, a picture; else a text. `size`, (height, width), is that of the picture, if it is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from pre_tokenize.chameleon import ChameleonFormat
from pre_tokenize.conversation import IMAGE_SYMBOL as CHAMELEON_SYMBOL
from pre_tokenize.conversation import ROLES
from pre_tokenize.dualvitok import DualViTokFormat
from pre_tokenize.dualvitok_text import IMAGE_SYMBOL as DUALVITOK_SYMBOL
from pre_tokenize.sequences import MALFORMED, Draft, ProcessItem, SequenceFormat
from training.data.anyres import ImageInput, image_input
from training.data.loading import ImageReader
from training.generation.cache import LanguageModel
from training.generation.decode import Prompt
from training.generation.grammar import ChameleonRules, DualViTokRules, Rules
from training.generation.sizes import DEFAULT_SIZE, LM_SIZES, Size, check_size
from vision_tokenizer.codebook.encoder import Encoded
from vision_tokenizer.images import chameleon, dualvitok
from vision_tokenizer.images.anchors import FIXED_ANCHORS
from vision_tokenizer.images.dualvitok import normalize, to_image
from vision_tokenizer.models.chameleon.vqgan import ChameleonVQGAN
from vision_tokenizer.models.dualvitok.model import DualViTok, grid_sizes
from vision_tokenizer.models.protocol import ImageTokenizer
from vision_tokenizer.review.preview import decode_codes
from vistoken.errors import Failed, ItemError
from vistoken.jobs.chunks import Item
from vistoken.store import Location

COLUMNS = ("images", "image_sizes", "image_embed_inds", "matched_ratios")  # of a line of codebook inference, by image
STAND_IN = "."  # for the answer, where a prompt is tokenised as a conversation is; cut off again


@dataclass(frozen=True)
class Wishes:
    """What is asked for, beside the prompts."""

    task: str | None = None  # image, text, or free: what the model likes. None: what the item's last turn says
    size: Size | None = None  # of pictures; None: as the item says, its input image's, or DEFAULT_SIZE
    before_image: tuple[int, ...] = ()  # ids between the prompt and the picture
    max_new_tokens: int = 1024  # of text; a picture has as many as its size needs
    max_seq_len: int | None = None  # ids, prompt and answer, that the model was trained on
    seed: int = 0


@dataclass(frozen=True)
class Question:
    """A prompt in the model's words."""

    item: Item
    turns: list[dict[str, str]]  # the conversation, what is asked for left out
    images: tuple[str, ...]
    ids: np.ndarray  # (n,) up to the answer
    tower: tuple[ImageInput, ...]  # the images once more, for a model with a vision tower
    task: str
    size: Size


class Interpreter(Protocol):
    """One kind of model's words. Without an image tokenizer pictures stay codes, and input images cannot be files."""

    wishes: Wishes
    symbol: str  # an image in a text

    @property
    def rules(self) -> Rules: ...
    @property
    def image_tokenizer(self) -> ImageTokenizer | None: ...

    def question(self, item: Item) -> Question:
        """Raises `ItemError`."""
        ...

    def close_image(self, tokens: Sequence[int]) -> tuple[Sequence[int], Sequence[ImageInput]]:
        """See `Decoder`."""
        ...

    def picture(self, grids: Sequence[np.ndarray]) -> Image.Image | None:
        """An image's codes as pixels."""
        ...


def room(question: Question, rules: Rules, wishes: Wishes) -> int:
    """How many ids the answer may have. Raises `Failed` where the model was trained on shorter sequences."""
    room, length = wishes.max_new_tokens, 0
    if question.task != "text":
        length = len(rules.layout(rules.head(question.size))) + len(wishes.before_image)
        room = length if question.task == "image" else room + length
    if wishes.max_seq_len is None or len(question.ids) + room <= wishes.max_seq_len:
        return room
    if question.task == "image" or len(question.ids) >= wishes.max_seq_len:
        detail = f"{len(question.ids)} ids and {room} of the answer, the model was trained on {wishes.max_seq_len}"
        raise Failed("longer than the model knows", detail)
    return wishes.max_seq_len - len(question.ids)


def prompts(question: Question, model: LanguageModel, rules: Rules, wishes: Wishes, samples: int) -> list[Prompt]:
    """What the decoder needs, for each of so many answers. Raises `Failed` as `room` does."""
    limit = room(question, rules, wishes)
    inputs = model.embed(question.ids, question.tower)
    start = (*wishes.before_image, *rules.head(question.size)) if question.task == "image" else ()
    return [
        Prompt(
            inputs,
            np.random.default_rng([wishes.seed, question.item.index, sample]),
            start,
            images=question.task != "text",
            only_image=question.task == "image",
            limit=limit,
            unconditional=lambda head: rules.format.unconditional(question.ids, head),
        )
        for sample in range(samples)
    ]


@dataclass
class UniTokenInterpreter:
    """Chameleon's vocabulary. Without a `reader`, input images are codes alone. `crops` are (w, h)."""

    format: ChameleonFormat  # of items in the document's format
    vocab_size: int  # of the model
    image_tokenizer: ChameleonVQGAN | None
    reader: ImageReader | None
    crops: Sequence[tuple[int, int]]
    wishes: Wishes
    process_item: ProcessItem
    published: bool = False  # nothing is barred outside of images, and generated ones have no continuous tokens
    symbol = CHAMELEON_SYMBOL

    def __post_init__(self) -> None:
        self.rules = ChameleonRules(self.format, self.vocab_size, barred=not self.published)

    def question(self, item: Item) -> Question:
        item = _processed(item, self.process_item)
        task, size = self.wishes.task, None
        turns: list[dict[str, str]] = []
        if isinstance(item.value, dict):
            turns, target = _split(item.value)
            images = item.value.get("image")
            images = [images] if isinstance(images, str) else images
            if target is not None and target.count(self.symbol) and isinstance(images, list):
                images = images[: len(images) - target.count(self.symbol)]
            picture = self.symbol in target if target is not None else not images
            task = task or ("image" if picture else "text")
            size = self.wishes.size or _own_size(item.value, lm=False)
            turns = [*turns, {"from": "gpt", "value": STAND_IN}]
            item = replace(item, value={**item.value, "conversations": turns, "image": images})
        draft = _draft(self.format, item)
        sample = self.format.sample(draft, {path: self._encode(path) for path in draft.paths})
        ids = sample.tokens[: _answer_start(sample.loss_mask)]
        tower = tuple(self.reader(str(path)) for path in draft.paths) if self.reader else ()
        given = [block.size for block in self.format.blocks(ids)]
        size = size or (given[0] if given else DEFAULT_SIZE)
        return Question(item, turns[:-1], tuple(map(str, draft.paths)), ids, tower, task or "text", size)

    def _encode(self, path: Location) -> Encoded:
        if self.image_tokenizer is None:
            raise Failed("no image tokenizer", f"{path} is to be encoded")
        pixels, info = chameleon.prepare(path, list(self.crops))
        with torch.no_grad():
            [grid] = self.image_tokenizer.encode(normalize(pixels[None].to(self.image_tokenizer.device)))
        return Encoded((grid[0].cpu().numpy(),), info)

    def close_image(self, tokens: Sequence[int]) -> tuple[Sequence[int], Sequence[ImageInput]]:
        """The end; separator and continuous tokens of the decoded picture come before it, as in training."""
        vocabulary, end = self.format.vocabulary, len(tokens)
        if self.reader is None or self.image_tokenizer is None or self.published:
            return [vocabulary.image_end], []
        start = end - 1 - list(reversed(tokens)).index(vocabulary.image_start)
        grid = vocabulary.image_codes(np.array(tokens[start:end], np.int32))
        image = to_image(decode_codes(self.image_tokenizer, [grid]))
        made = image_input(image, self.reader.side, self.reader.grid, self.reader.anyres)
        return [vocabulary.image_end], [made]

    def picture(self, grids: Sequence[np.ndarray]) -> Image.Image | None:
        return to_image(decode_codes(self.image_tokenizer, grids)) if self.image_tokenizer else None


@dataclass
class LMInterpreter:
    """DualViTok's words. Pictures of other sizes than `sizes` are only made where one is asked for."""

    format: DualViTokFormat
    vocab_size: int  # of the model
    image_tokenizer: DualViTok | None
    wishes: Wishes
    process_item: ProcessItem
    image_dir: Path = Path()
    sizes: tuple[Size, ...] = LM_SIZES
    symbol = DUALVITOK_SYMBOL

    def __post_init__(self) -> None:
        self.rules = DualViTokRules(self.format, self.vocab_size, self.sizes)

    def question(self, item: Item) -> Question:
        item = _processed(item, self.process_item)
        task, size = self.wishes.task, DEFAULT_SIZE
        turns: list[dict[str, str]] = []
        if isinstance(item.value, dict):
            turns, target = _split(item.value)
            wanted = target.count(self.symbol) if target is not None else 0
            columns = {name: item.value[name] for name in COLUMNS if isinstance(item.value.get(name), list | str)}
            columns = {name: [column] if isinstance(column, str) else column for name, column in columns.items()}
            own = columns.get("matched_ratios", [])[-wanted:] if wanted else []
            wished = self.wishes.size or _own_size(item.value, lm=True)
            given = {name: column[: len(column) - wanted] for name, column in columns.items()}
            given = self._encoded(given, wished)
            picture = wanted > 0 if target is not None else not given.get("images")
            task = task or ("image" if picture else "text")
            known = [tuple(size) for size in (*own, *given.get("matched_ratios", ())) if isinstance(size, list)]
            size = wished or (known[0] if known else size)
            if task == "image":  # a blank one stands for it, so that a {resolution_tag} before it means its size
                blank = [np.zeros(shape, int).tolist() for shape in grid_sizes(*size)]
                stand_in = ("", list(size), blank, list(size))
                given = {name: [*given.get(name, ()), last] for name, last in zip(COLUMNS, stand_in, strict=True)}
            turns = [*turns, {"from": "gpt", "value": self.symbol if task == "image" else STAND_IN}]
            item = replace(item, value={**item.value, **given, "conversations": turns})
        sample = self.format.sample(_draft(self.format, item), {})
        ids = sample.tokens[: _answer_start(sample.loss_mask)]
        images = tuple(str(self.image_dir / name) for name in sample.images if name)
        return Question(item, turns[:-1], images, ids, (), task or "text", size)

    def _encoded(self, given: dict[str, list], size: Size | None) -> dict[str, list]:
        """Images that are files as codebook inference writes them: at their anchors, or all at one size."""
        names = given.get("images")
        if not names or "image_embed_inds" in given or self.image_tokenizer is None:
            return given
        columns: dict[str, list] = {name: [] for name in COLUMNS[1:]}
        for name in names:
            choices = (size,) if size else FIXED_ANCHORS
            pixels, info = dualvitok.prepare(self.image_dir / str(name), choices, crop_percent_thresh=0.0)
            grids = self.image_tokenizer.encode(normalize(pixels[None].to(self.image_tokenizer.device)))
            columns["image_sizes"].append(list(info.size))
            columns["image_embed_inds"].append([grid[0].tolist() for grid in grids])
            columns["matched_ratios"].append(list(info.anchor))
        return {"images": names, **columns}

    def close_image(self, tokens: Sequence[int]) -> tuple[Sequence[int], Sequence[ImageInput]]:
        return [self.format.vocabulary.image_end], []

    def picture(self, grids: Sequence[np.ndarray]) -> Image.Image | None:
        return to_image(decode_codes(self.image_tokenizer, grids)) if self.image_tokenizer else None


def _processed(item: Item, process_item: ProcessItem) -> Item:
    """The item in the document's format. What is wrong with it comes to light when it is tokenised."""
    if item.error is not None or not isinstance(item.value, dict):
        return item
    try:
        value = process_item(item.value)
        return Item.of(item.index, item.where, item.raw, value)
    except MALFORMED as error:
        raise Failed("process_item", f"{type(error).__name__}: {error}") from error


def _split(value: dict[str, Any]) -> tuple[list[dict[str, str]], str | None]:
    """Turns up to the last gpt turn, and what that says (None: there is none). Raises `Failed`."""
    turns = value.get("conversations")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise Failed("no conversation", "expected a list of turns in `conversations`")
    if turns[-1].get("from") not in ROLES[1]:
        return turns, None
    if not isinstance(turns[-1].get("value"), str):
        raise Failed("bad turn", f"turn {len(turns) - 1}: expected a text as value")
    return turns[:-1], turns[-1]["value"]


def _own_size(value: dict[str, Any], *, lm: bool) -> Size | None:
    """What the item's `size` says. Raises `Failed`."""
    size = value.get("size")
    if size is None:
        return None
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)):
        raise Failed("bad `size`", f"expected [height, width] in pixels, found {size!r:.40}")
    try:
        check_size((size[0], size[1]), lm=lm)
    except ValueError as error:
        raise Failed("bad `size`", f"{size}: {error}") from error
    return size[0], size[1]


def _answer_start(mask: np.ndarray) -> int:
    """Where the last learned part of a sequence begins."""
    begins = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0) == 1)
    return int(begins[-1])


def _draft(format: SequenceFormat, item: Item) -> Draft:
    [draft] = format.drafts([item])
    if isinstance(draft, ItemError):
        raise draft
    return draft
