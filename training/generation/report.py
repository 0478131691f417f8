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

TEMPLATE = Path(__file__).with_name("answers.html")
IMAGE_SYMBOLS = (conversation.IMAGE_SYMBOL, dualvitok_text.IMAGE_SYMBOL)
SHOWN = 100  # answers in the report
LONGEST_SIDE = 512  # of a picture in it, in pixels


def write_report(folder: Path, answers: Path, manifest: Mapping[str, Any]) -> None:
    """`report.html` of the answers in `answers`, whose pictures lie in `folder`."""
    with answers.open("rb") as lines:
        shown = [_card(orjson.loads(line), folder) for line in islice(lines, SHOWN)]
        more = sum(1 for _ in lines)
    settings = " · ".join(_told(name, value) for name, value in sorted(manifest["settings"].items()) if value)
    write_page(
        folder / "report.html",
        TEMPLATE,
        title="Answers",
        subtitle=f"{manifest['model']['path']} · {settings}",
        note=f"The first {SHOWN} of {SHOWN + more:,} answers." if more else "",
        warning="",
        facts=[
            (f"{len(shown) + more:,}", "answers"),
            (f"{sum(len(card['pictures']) for card in shown):,}", "pictures shown"),
            (f"{sum(card['tokens'] for card in shown):,}", "tokens of the answers shown"),
        ],
        cards=shown,
    )


def _told(name: str, value: Any) -> str:
    """A setting in words, a size as `128 x 256`."""
    shown = " x ".join(map(str, value)) if isinstance(value, list) else "" if value is True else str(value)
    return f"{name.replace('_', ' ')} {shown}".rstrip()


def _card(line: dict[str, Any], folder: Path) -> dict[str, Any]:
    settings = line["settings"]
    pictures = [_small(Image.open(folder / name)) for name in line["files"]]
    return {
        "title": f"{line['id']}, answer {line['sample'] + 1} · seed {settings['seed']} · {len(line['tokens']):,} tokens"
        + (" · cut off" if line["finish"] == "length" else ""),
        "turns": line["prompt"],
        "inputs": [(Path(name).name, _opened(Path(name))) for name in line["images"]],
        "text": "" if line["text"].strip() in IMAGE_SYMBOLS else line["text"],  # a picture says that it is one
        "pictures": pictures,
        "tokens": len(line["tokens"]),
    }


def _opened(path: Path) -> Image.Image | None:
    try:
        return _small(read_image(path).convert("RGB"))
    except ItemError:
        return None


def _small(image: Image.Image) -> Image.Image:
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return image
