"""A contact sheet: originals beside reconstructions as one picture, for terminals and chats that show pictures."""

import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

THUMB, GAP, LINE = 220, 12, 22  # pixels: side of a picture, between pictures, of a line of text
INK, SOFT, PAPER = "#222222", "#6d6a64", "#f4f4f2"
CELL = 2 * THUMB + GAP // 2
HEAD = 2 * LINE + GAP

Cell = tuple[Image.Image | None, Image.Image, str]  # original, reconstruction, the line below them


def contact_sheet(title: str, cells: Sequence[Cell], columns: int = 3) -> Image.Image:
    """`cells` in rows of `columns`, below `title` and the names of the two columns of each pair."""
    columns = max(min(columns, len(cells)), 1)
    rows = -(-len(cells) // columns)
    width, height = columns * (CELL + GAP) + GAP, HEAD + rows * (THUMB + LINE + GAP) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    write_line(draw, (GAP, GAP), title, 15, width - 2 * GAP, INK)
    for column in range(columns):
        for number, name in enumerate(("original", "decoded from its codes")):
            left = GAP + column * (CELL + GAP) + number * (THUMB + GAP // 2)
            write_line(draw, (left, GAP + LINE), name, 13, THUMB, SOFT)
    for index, (original, decoded, text) in enumerate(cells):
        left = GAP + index % columns * (CELL + GAP)
        top = HEAD + index // columns * (THUMB + LINE + GAP)
        for number, image in enumerate((original, decoded)):
            if image is None:
                continue
            thumb = image.copy()
            thumb.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
            x = left + number * (THUMB + GAP // 2) + (THUMB - thumb.width) // 2
            sheet.paste(thumb, (x, top + (THUMB - thumb.height) // 2))
        write_line(draw, (left, top + THUMB + 4), text, 13, CELL, INK)
    return sheet


def write_line(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, width: int, color: str) -> None:
    """Write `text` on one line of at most `width` pixels, cut off with an ellipsis where it is longer."""
    text = "".join(character if character.isprintable() else " " for character in text)
    path = font_with("".join(sorted(set(text))))
    font = ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
    if path is None and missing(font, text):
        text = "".join(c if not missing(font, c) else f"\\u{ord(c):04x}" for c in text)
    while font.getlength(text) > width:
        text = text[:-2].rstrip("…") + "…"
    draw.text(at, text, fill=color, font=font)


@cache
def font_with(characters: str) -> str | None:
    """The first font of this machine that has all of `characters`; None: Pillow's own will do, or must do."""
    if not missing(ImageFont.load_default(13), characters):
        return None
    for path in fonts():
        try:
            if not missing(ImageFont.truetype(path, 13), characters):
                return path
        except OSError:  # a bitmap font, or one that FreeType does not read
            continue
    return None


def missing(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, characters: str) -> bool:
    """Whether the font draws its box for an unknown character in the place of one of them."""
    unknown = bytes(font.getmask("\U0010ffff"))
    return any(bytes(font.getmask(character)) == unknown for character in characters if not character.isspace())


@cache
def fonts() -> tuple[str, ...]:
    """The font files of this machine; those of no slant and no weight first."""
    home, data = Path.home(), os.environ.get("XDG_DATA_HOME")
    folders = [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".fonts", home / ".local/share/fonts"]
    if sys.platform == "darwin":
        folders = [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    if sys.platform == "win32":
        folders = [Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts")]
    folders += [Path(data, "fonts")] if data else []
    suffixes = ("ttf", "ttc", "otf")
    files = [str(path) for folder in folders for suffix in suffixes for path in folder.rglob(f"*.{suffix}")]
    return tuple(sorted(files, key=lambda path: ("regular" not in path.lower(), path)))
