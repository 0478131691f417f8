"""Between people and a model: items of `pre_tokenize.py`'s input become prompts, a model's ids become answers.

The last gpt turn of an item is what is asked for: where it holds an image, or where there is none and no image is
given, a picture; else a text.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pre_tokenize.chameleon import ChameleonFormat
from pre_tokenize.conversation import IMAGE_SYMBOL as CHAMELEON_SYMBOL
from pre_tokenize.conversation import ROLES
from pre_tokenize.dualvitok import DualViTokFormat
from pre_tokenize.dualvitok_text import IMAGE_SYMBOL as DUALVITOK_SYMBOL
from pre_tokenize.sequences import MALFORMED, ProcessItem, SequenceFormat
from pre_tokenize.token_file import IGNORE
from training.data.anyres import image_input
from training.data.loading import ImageReader
from training.data.packing import interleave, pack
from training.generation.cache import CachedUniToken, LanguageModel
from training.generation.decode import Answer, Prompt
from training.generation.grammar import ChameleonRules, DualViTokRules, Rules, Size
from vision_tokenizer.codebook.encoder import Encoded
from vision_tokenizer.images import chameleon, dualvitok
from vision_tokenizer.images.dualvitok import normalize, to_image
from vision_tokenizer.models.chameleon.vqgan import ChameleonVQGAN
from vision_tokenizer.models.dualvitok.model import DualViTok, grid_sizes
from vision_tokenizer.review.preview import decode_codes
from vistoken.errors import Failed, ItemError
from vistoken.jobs.chunks import Item

TASKS = ("image", "text", "free")  # a picture, no picture, or what the model likes
DEFAULT_SIZE = (512, 512)
STAND_IN = "."  # for the answer, where a prompt is tokenised as a conversation is; cut off again


@dataclass(frozen=True)
class Wishes:
    """What is asked for, beside the prompts."""

    task: str | None = None  # None: what the item's last turn says
    size: Size | None = None  # of pictures; None: as the item's own, its input image's, or DEFAULT_SIZE
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
    inputs: Tensor  # (m, C) embeddings of them, continuous tokens among them
    task: str
    size: Size


class Interpreter(Protocol):
    model: LanguageModel
    rules: Rules
    symbol: str  # an image in a text

    def question(self, item: Item) -> Question:
        """Raises `ItemError`."""
        ...

    def close_image(self, tokens: Sequence[int]) -> Tensor:
        """See `Decoder`."""
        ...

    def picture(self, grids: Sequence[np.ndarray]) -> Image.Image | None:
        """An image's codes as pixels; None where there is no decoder."""
        ...


def prompt(question: Question, interpreter: Interpreter, wishes: Wishes, sample: int) -> Prompt:
    """What the decoder needs. Raises `Failed` where the model was trained on shorter sequences."""
    rules, room = interpreter.rules, wishes.max_new_tokens
    start = (*wishes.before_image, *rules.head(question.size)) if question.task == "image" else ()
    if question.task != "text":
        length = len(rules.layout(rules.head(question.size))) + len(wishes.before_image)
        room = length if question.task == "image" else room + length
    if wishes.max_seq_len is not None and len(question.ids) + room > wishes.max_seq_len:
        if question.task == "image" or len(question.ids) >= wishes.max_seq_len:
            detail = f"{len(question.ids)} ids and {room} of the answer, the model was trained on {wishes.max_seq_len}"
            raise Failed("longer than the model knows", detail)
        room = wishes.max_seq_len - len(question.ids)
    return Prompt(
        question.inputs,
        np.random.default_rng([wishes.seed, question.item.index, sample]),
        start,
        images=question.task != "text",
        only_image=question.task == "image",
        limit=room,
        unconditional=lambda head: rules.format.unconditional(question.ids, head),
    )


@dataclass(frozen=True)
class Said:
    """An answer in people's words."""

    text: str  # an image symbol in the place of each picture
    sizes: list[Size]
    grids: list[tuple[np.ndarray, ...]]  # codes of each picture
    pictures: list[Image.Image]


def say(answer: Answer, interpreter: Interpreter) -> Said:
    """Read an answer. Raises `Failed` for one that was cut off inside an image."""
    tokens, text = np.array(answer.tokens, np.int32), ""
    if not answer.grammar.complete:
        raise Failed("cut inside an image", f"after {len(tokens)} tokens; --max_new_tokens allows for more")
    blocks, at = interpreter.rules.format.blocks(tokens), 0
    end = len(tokens) - (answer.finish == "end")
    for block in blocks:
        text += interpreter.rules.format.text(tokens[at : block.start]) + interpreter.symbol
        at = block.end
    text += interpreter.rules.format.text(tokens[at:end])
    pictures = [picture for block in blocks if (picture := interpreter.picture(block.grids)) is not None]
    return Said(text, [block.size for block in blocks], [block.grids for block in blocks], pictures)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


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


def _answer_start(mask: np.ndarray) -> int:
    """Where the last learned part of a sequence begins."""
    begins = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0) == 1)
    return int(begins[-1])


def _draft(format: SequenceFormat, item: Item):
    [draft] = format.drafts([item])
    if isinstance(draft, ItemError):
        raise draft
    return draft


@dataclass
class UniTokenInterpreter:
    """Chameleon's vocabulary. Without a `reader`, input images are codes alone. `crops` are (w, h)."""

    model: CachedUniToken
    format: ChameleonFormat  # of items in the document's format
    process_item: ProcessItem
    vqgan: ChameleonVQGAN
    reader: ImageReader | None
    crops: Sequence[tuple[int, int]]
    wishes: Wishes
    published: bool = False  # nothing is barred outside of images, and generated ones have no continuous tokens
    symbol = CHAMELEON_SYMBOL

    def __post_init__(self) -> None:
        self.rules = ChameleonRules(self.format, self.model.vocab_size, barred=not self.published)
        self._unitoken = self.model.model

    def question(self, item: Item) -> Question:
        item = _processed(item, self.process_item)
        task, turns = self.wishes.task, []
        if isinstance(item.value, dict):
            turns, target = _split(item.value)
            images = item.value.get("image")
            images = [images] if isinstance(images, str) else images
            if target is not None and target.count(self.symbol) and isinstance(images, list):
                images = images[: len(images) - target.count(self.symbol)]
            picture = self.symbol in target if target is not None else not images
            task = task or ("image" if picture else "text")
            turns = [*turns, {"from": "gpt", "value": STAND_IN}]
            item = replace(item, value={**item.value, "conversations": turns, "image": images})
        draft = _draft(self.format, item)
        codes: dict[Path, Encoded] = {}
        for path in draft.paths:
            pixels, info = chameleon.prepare(path, list(self.crops))
            with torch.no_grad():
                [grid] = self.vqgan.encode(normalize(pixels[None].to(self.vqgan.device)))
            codes[path] = Encoded((grid[0].cpu().numpy(),), info)
        sample = self.format.sample(draft, codes)
        ids = sample.tokens[: _answer_start(sample.loss_mask)]
        inputs = [self.reader(str(path)) for path in draft.paths] if self.reader else []
        given = [block.size for block in self.format.blocks(ids)]
        size = self.wishes.size or (given[0] if given else DEFAULT_SIZE)
        return Question(item, turns[:-1], sample.images, ids, self._embed(ids, inputs), task or "text", size)

    def _embed(self, ids: np.ndarray, images: list) -> Tensor:
        if not images:
            return self.model.embed(ids)
        sample = interleave("", ids, np.full(len(ids), IGNORE), images)
        with torch.no_grad():
            return self._unitoken.embed(pack([sample], self.reader.side).to(self.model.device))

    def close_image(self, tokens: Sequence[int]) -> Tensor:
        """Separator, continuous tokens and end, as in training."""
        vocabulary, end = self.format.vocabulary, len(tokens)
        if self.reader is None or self.published:
            return self.model.embed([vocabulary.image_end])
        start = end - 1 - list(reversed(tokens)).index(vocabulary.image_start)
        image = self.picture([vocabulary.image_codes(np.array(tokens[start:end], np.int32))])
        made = image_input(image, self.reader.side, self.reader.grid, self.reader.anyres)
        return self._embed(np.array([vocabulary.image_end]), [made])

    def picture(self, grids: Sequence[np.ndarray]) -> Image.Image:
        return to_image(decode_codes(self.vqgan, grids))


@dataclass
class LMInterpreter:
    """DualViTok's words. Without a `tokenizer`, pictures stay codes, and input images must come as codes."""

    model: LanguageModel
    format: DualViTokFormat
    process_item: ProcessItem
    tokenizer: DualViTok | None
    sizes: tuple[Size, ...]
    wishes: Wishes
    image_dir: Path = Path()
    symbol = DUALVITOK_SYMBOL

    def __post_init__(self) -> None:
        self.rules = DualViTokRules(self.format, self.model.vocab_size, self.sizes)

    def question(self, item: Item) -> Question:
        item = _processed(item, self.process_item)
        task, turns, size = self.wishes.task, [], self.wishes.size or DEFAULT_SIZE
        if isinstance(item.value, dict):
            value = self._encoded(item.value)
            turns, target = _split(value)
            wanted = target.count(self.symbol) if target is not None else 0
            columns = {
                name: value[name]
                for name in ("images", "image_sizes", "image_embed_inds", "matched_ratios")
                if isinstance(value.get(name), list)
            }
            own = columns.get("matched_ratios", [])[-wanted:] if wanted else []
            given = {name: column[: len(column) - wanted] for name, column in columns.items()}
            picture = wanted > 0 if target is not None else not given.get("images")
            task = task or ("image" if picture else "text")
            known = [tuple(size) for size in (*own, *given.get("matched_ratios", ())) if isinstance(size, list)]
            size = self.wishes.size or (known[0] if known else size)
            if task == "image":  # a blank one stands for it, so that a {resolution_tag} before it means its size
                blank = [np.zeros(shape, int).tolist() for shape in grid_sizes(*size)]
                stand_in = ("", list(size), blank, list(size))
                names = ("images", "image_sizes", "image_embed_inds", "matched_ratios")
                given = {name: [*given.get(name, ()), last] for name, last in zip(names, stand_in, strict=True)}
            turns = [*turns, {"from": "gpt", "value": self.symbol if task == "image" else STAND_IN}]
            item = replace(item, value={**value, **given, "conversations": turns})
        sample = self.format.sample(_draft(self.format, item), {})
        ids = sample.tokens[: _answer_start(sample.loss_mask)]
        images = tuple(str(self.image_dir / name) for name in sample.images if name)
        return Question(item, turns[:-1], images, ids, self.model.embed(ids), task or "text", size)

    def _encoded(self, value: dict[str, Any]) -> dict[str, Any]:
        """The line of codebook inference for an item whose images are files."""
        names = [value["images"]] if isinstance(value.get("images"), str) else value.get("images")
        if not names or "image_embed_inds" in value or self.tokenizer is None:
            return value
        lines: dict[str, list] = {"image_sizes": [], "image_embed_inds": [], "matched_ratios": []}
        for name in names:
            pixels, info = dualvitok.prepare(self.image_dir / str(name), self.sizes, 0.0)
            grids = self.tokenizer.encode(normalize(pixels[None].to(self.tokenizer.device)))
            lines["image_sizes"].append(list(info.size))
            lines["image_embed_inds"].append([grid[0].tolist() for grid in grids])
            lines["matched_ratios"].append(list(info.anchor))
        return {**value, "images": names, **lines}

    def close_image(self, tokens: Sequence[int]) -> Tensor:
        return self.model.embed([self.format.vocabulary.image_end])

    def picture(self, grids: Sequence[np.ndarray]) -> Image.Image | None:
        return to_image(decode_codes(self.tokenizer, grids)) if self.tokenizer else None
