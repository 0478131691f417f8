"""A model's ids become answers for people: text, pictures, and a line of answers.jsonl."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from PIL import Image

from training.generation.decode import Answer
from training.generation.grammar import Rules
from training.generation.interpreter import Interpreter, Question
from training.generation.sizes import Size
from vistoken.errors import Failed

ANSWERS = "answers.jsonl"


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
    rules: Rules = interpreter.rules
    blocks, at = rules.format.blocks(tokens), 0
    end = len(tokens) - (answer.finish == "end")
    for block in blocks:
        text += rules.format.text(tokens[at : block.start]) + interpreter.symbol
        at = block.end
    text += rules.format.text(tokens[at:end])
    pictures = [picture for block in blocks if (picture := interpreter.picture(block.grids)) is not None]
    return Said(text, [block.size for block in blocks], [block.grids for block in blocks], pictures)


def picture_files(item: int, sample: int, said: Said) -> list[str]:
    """Where an answer's pictures go, in the folder of the answers."""
    return [f"images/{item:06d}-{sample}-{number}.png" for number in range(len(said.pictures))]


def answer_line(question: Question, sample: int, answer: Answer, said: Said, settings: Mapping[str, Any]) -> bytes:
    """A line of answers.jsonl."""
    item = question.item
    line = {
        "id": item.index if item.id is None else item.id,
        "item": item.index,
        "sample": sample,
        "prompt": question.turns,
        "images": question.images,
        "text": said.text,
        "files": picture_files(item.index, sample, said),
        "finish": answer.finish,
        "matched_ratios": said.sizes,
        "image_embed_inds": [[grid.tolist() for grid in grids] for grids in said.grids],
        "tokens": answer.tokens,
        "settings": {**settings, "task": question.task},
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
