"""Decoding: several answers side by side, token by token, each by its own grammar and with its own noise.

A row of the model's session is a sequence. With guidance an answer has two: the conversation, and, while an image is
written, the unconditional sequence, which gets the same ids. All rows go through the model as one batch.

Legend: R rows, n ids, C hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.data.anyres import ImageInput
from training.generation.cache import LanguageModel
from training.generation.grammar import Grammar, Kind, Rules
from training.generation.sampling import Sampling, draw, guide, restrict

PUBLISHED: dict[bool, dict[str, Any]] = {  # by whether it is a language model alone: what is not asked for otherwise
    False: {"guidance": 3.0, "image_top_k": 4000, "text_top_k": 5},
    True: {"guidance": 2.0, "image_top_k": 2048, "text_top_k": 128},
}
PIXEL_TOP_K = 3  # times as many pixel codes as semantic ones are left to draw from


@dataclass(frozen=True)
class Settings:
    """How answers are decoded."""

    text: Sampling
    levels: tuple[Sampling, ...]  # of codes, by level; sizes are drawn as level 0
    guidance: float = 1.0  # scale; 1 is off
    greedy: bool = False

    @classmethod
    def of(
        cls,
        *,
        lm: bool,
        guidance: float,
        image_top_k: int,
        text_top_k: int,
        temperature: float = 1.0,
        image_top_p: float = 1.0,
        text_temperature: float = 1.0,
        text_top_p: float = 1.0,
        greedy: bool = False,
    ) -> "Settings":
        """From the flags of generate.py. DualViTok's second level draws from thrice as many codes, as published."""
        levels = [Sampling(temperature, top_k, image_top_p) for top_k in (image_top_k, PIXEL_TOP_K * image_top_k)]
        text = Sampling(text_temperature, text_top_k, text_top_p)
        return cls(text, tuple(levels if lm else levels[:1]), guidance, greedy)

    def sampling(self, kind: Kind) -> Sampling:
        if kind.name == "text":
            return self.text
        return self.levels[kind.level]


@dataclass(frozen=True)
class Prompt:
    """What is asked."""

    inputs: Tensor  # (n, C) embeddings of the conversation so far
    noise: np.random.Generator  # this answer's own
    start: tuple[int, ...] = ()  # ids that the answer begins with, whatever the model says
    images: bool = True  # may images be opened
    only_image: bool = False  # stop after the first
    limit: int = 1536  # ids of the answer, `start` included
    unconditional: Callable[[tuple[int, ...]], Sequence[int]] = tuple  # head of an image -> ids up to and with it


@dataclass
class Answer:
    prompt: Prompt
    grammar: Grammar
    tokens: list[int] = field(default_factory=list)  # `start` included
    finish: str = ""  # "end", "image", or "length" where it was cut off


class Decoder:
    """Args:
    model: what is asked.
    rules: the grammar of its sequences.
    close_image: what is fed in the place of an image's end, given all ids of the answer -> ids, and the picture if its
        continuous tokens belong to them; None: the end alone.
    on_tokens: called with the number of new tokens of each step.
    agree: tokens that were drawn -> those that count. Processes that share a model go on with the same ones.
    """

    def __init__(
        self,
        model: LanguageModel,
        rules: Rules,
        settings: Settings,
        close_image: Callable[[Sequence[int]], tuple[Sequence[int], Sequence[ImageInput]]] | None = None,
        on_tokens: Callable[[int], None] = lambda count: None,
        agree: Callable[[list[int]], list[int]] = lambda tokens: tokens,
    ):
        self.model, self.rules, self.settings = model, rules, settings
        self._close_image, self._on_tokens, self._agree = close_image, on_tokens, agree
        self._masks: dict[tuple[Kind, bool], Tensor] = {}

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """All answers, side by side."""
        count, answers = len(prompts), [Answer(prompt, Grammar(self.rules)) for prompt in prompts]
        guided = self.settings.guidance != 1 and any(prompt.images for prompt in prompts)
        surely = [len(prompt.inputs) + prompt.limit for prompt in prompts if prompt.only_image]
        session = self.model.session(count * (2 if guided else 1), max(surely, default=0))
        feeds: dict[int, Tensor | list[int]] = {}
        for row, answer in enumerate(answers):
            for token in answer.prompt.start:
                self._push(answer, token)
            feeds[row] = torch.cat((answer.prompt.inputs, self.model.embed(answer.prompt.start)))
            if guided and answer.grammar.inside:
                feeds[row + count] = list(answer.prompt.unconditional(answer.grammar.head))
        while feeds:
            logits = session.extend(self._embedded(feeds))
            places = {row: place for place, row in enumerate(feeds)}
            going = {row: answer for row, answer in enumerate(answers) if not answer.finish}
            tokens = self._next(going, logits, places, count)
            feeds = {}
            for row, answer in going.items():
                inside, other = answer.grammar.inside, row + count
                self._push(answer, tokens[row])
                if answer.finish:
                    continue
                feeds[row] = [tokens[row]]
                if inside and not answer.grammar.inside and self._close_image:
                    feeds[row] = self.model.embed(*self._close_image(answer.tokens))
                if guided and answer.grammar.inside:
                    if not inside:
                        session.forget(other)
                    feeds[other] = [tokens[row]] if inside else list(answer.prompt.unconditional(answer.grammar.head))
            self._on_tokens(len(going))
        return answers

    def _next(
        self, going: Mapping[int, Answer], logits: Tensor, places: Mapping[int, int], count: int
    ) -> dict[int, int]:
        """Each answer's next token: the mark that must follow, or one that is drawn."""
        wanted = {row: answer.grammar.next() for row, answer in going.items()}
        tokens = {row: kind for row, kind in wanted.items() if isinstance(kind, int)}
        kinds = {row: kind for row, kind in wanted.items() if isinstance(kind, Kind)}
        if not kinds:
            return tokens
        scores = logits[[places[row] for row in kinds]]
        if guided := [(number, row) for number, row in enumerate(kinds) if row + count in places]:
            numbers, others = [number for number, _ in guided], [places[row + count] for _, row in guided]
            scores[numbers] = guide(scores[numbers], logits[others], self.settings.guidance)
        allowed = torch.stack([self._mask(kind, going[row].prompt.images) for row, kind in kinds.items()])
        if self.settings.greedy:
            chosen = scores.masked_fill(~allowed, -torch.inf).argmax(-1).tolist()
        else:
            scores = restrict(scores, allowed, [self.settings.sampling(kind) for kind in kinds.values()])
            chosen = draw(scores, [going[row].prompt.noise.random() for row in kinds])
        return tokens | dict(zip(kinds, self._agree(chosen), strict=True))

    def _mask(self, kind: Kind, images: bool) -> Tensor:
        if (kind, images) not in self._masks:
            mask = self.rules.allowed(kind, images=images)
            self._masks[kind, images] = torch.from_numpy(mask).to(self.model.device)
        return self._masks[kind, images]

    def _push(self, answer: Answer, token: int) -> None:
        inside = answer.grammar.inside
        answer.grammar.push(token)
        answer.tokens.append(token)
        if inside and not answer.grammar.inside and answer.prompt.only_image:
            answer.finish = "image"
        elif not answer.grammar.inside and token == self.rules.format.turn_end:
            answer.finish = "end"
        elif len(answer.tokens) >= answer.prompt.limit:
            answer.finish = "length"

    def _embedded(self, feeds: Mapping[int, Tensor | list[int]]) -> dict[int, Tensor]:
        """Row -> (n, C); all ids are looked up at once."""
        ids = {row: feed for row, feed in feeds.items() if isinstance(feed, list)}
        embedded = self.model.embed([token for feed in ids.values() for token in feed])
        found = dict(zip(ids, embedded.split([len(feed) for feed in ids.values()]), strict=True))
        return {row: found.get(row, feed) for row, feed in feeds.items()}
