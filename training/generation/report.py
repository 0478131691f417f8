"""Answers to look at: one HTML file, in the style of the other reports."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
from PIL import Image

from pre_tokenize import conversation, dualvitok_text
from vision_tokenizer.images.files import read_image
from vision_tokenizer.review.html import write_page
from vistoken.errors import ItemError
from vistoken.store import Location, location

TEMPLATE = Path(__file__).with_name("answers.html")
IMAGE_SYMBOLS = (conversation.IMAGE_SYMBOL, dualvitok_text.IMAGE_SYMBOL)
SHOWN = 100  # answers in the report
LONGEST_SIDE = 512  # of a picture in it, in pixels


def write_report(folder: Path, answers: Path, manifest: Mapping[str, Any]) -> None:
    """`report.html` of the answers in `answers`, whose pictures lie in `folder`."""
    with answers.open("rb") as lines:
        shown = [_card(orjson.loads(line), folder) for line in islice(lines, SHOWN)]
        more = sum(1 for _ in lines)
    write_page(
        folder / "report.html",
        TEMPLATE,
        title="Answers",
        subtitle=" · ".join([manifest["model"]["path"], *_told(manifest["settings"])]),
        note=f"The first {SHOWN} of {SHOWN + more:,} answers." if more else "",
        warning="",
        facts=[
            (f"{len(shown) + more:,}", "answers"),
            (f"{sum(len(card['pictures']) for card in shown):,}", "pictures shown"),
            (f"{sum(card['tokens'] for card in shown):,}", "tokens of the answers shown"),
        ],
        cards=shown,
    )


def _told(settings: Mapping[str, Any]) -> list[str]:
    """Settings in words, a size as `128 x 256`; what is off or empty is left out."""
    given = {name: value for name, value in settings.items() if value or type(value) in (int, float)}  # a seed of 0
    return [f"{name.replace('_', ' ')} {_shown(value)}".rstrip() for name, value in sorted(given.items())]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(_told(value))
    if isinstance(value, list | tuple):
        return (" x " if isinstance(value[0], int) else " / ").join(map(_shown, value))
    return "" if value is True else str(value)


def _card(line: dict[str, Any], folder: Path) -> dict[str, Any]:
    settings = line["settings"]
    pictures = [_small(Image.open(folder / name)) for name in line["files"]]
    return {
        "title": f"{line['id']}, answer {line['sample'] + 1} · seed {settings['seed']} · {len(line['tokens']):,} tokens"
        + (" · cut off" if line["finish"] == "length" else ""),
        "turns": line["prompt"],
        "inputs": [(where.name, _opened(where)) for where in map(location, line["images"])],
        "text": "" if line["text"].strip() in IMAGE_SYMBOLS else line["text"],  # a picture says that it is one
        "pictures": pictures,
        "tokens": len(line["tokens"]),
    }


def _opened(path: Location) -> Image.Image | None:
    try:
        return _small(read_image(path).convert("RGB"))
    except ItemError:
        return None


def _small(image: Image.Image) -> Image.Image:
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return image
