"""Pieces of a self-contained HTML report: one file, no network, no scripts, light and dark as the reader's system is.

Functions take plain text, escape it, and return HTML; `page` joins it into a document.
"""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from html import escape
from math import log10
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_STYLE = Path(__file__).with_name("html.css")
_PLOT_WIDTH, _PLOT_HEIGHT = 640, 200
_MAX_COLUMNS = 40


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """A whole document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE.read_text()}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(name: str, title: str, *content: str, lead: str = "") -> str:
    """A titled part; `name` is its anchor in the page."""
    intro = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f'<section id="{escape(name)}"><h2>{escape(title)}</h2>{intro}{"".join(content)}</section>'


def note(text: str) -> str:
    return f'<p class="note" id="note">{escape(text)}</p>'


def tiles(facts: Sequence[tuple[str, str]]) -> str:
    """Large numbers with a word below each: (value, label)."""
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in facts)
    return f'<div class="tiles">{cells}</div>'


def bars(rows: Sequence[tuple[str, int]], total: int, icons: Sequence[str] = ()) -> str:
    """Horizontal bars: (label, value), with the value and its share of `total`, perhaps each with an icon before it."""
    most = max((value for _, value in rows), default=0) or 1
    lines = [
        f'<div class="icon">{icons[i] if icons else ""}</div><div class="label">{escape(label)}</div>'
        f'<div class="bar"><i style="width:{100 * value / most:.2f}%"></i></div><div class="value">{value:,}</div>'
        f'<div class="value">{value / total:.1%}</div>'
        for i, (label, value) in enumerate(rows)
    ]
    return f'<div class="bars">{"".join(lines)}</div>'


def shape_icon(height: int, width: int) -> str:
    """A small outline of an image's shape."""
    scale = 26 / max(height, width)
    w, h = max(width * scale, 3), max(height * scale, 3)
    return (
        f'<svg class="shape" viewBox="0 0 28 28" aria-hidden="true">'
        f'<rect x="{14 - w / 2:.1f}" y="{14 - h / 2:.1f}" width="{w:.1f}" height="{h:.1f}" rx="1.5"/></svg>'
    )


def histogram(counts: Counter[int], unit: str) -> str:
    """Columns over whole numbers; more than 40 different ones are put into equal bins."""
    if not counts:
        return "<p>nothing to show</p>"
    low, high = min(counts), max(counts)
    step = max(1, -(-(high - low + 1) // _MAX_COLUMNS))
    columns = np.zeros((high - low) // step + 1, np.int64)
    for value, count in counts.items():
        columns[(value - low) // step] += count
    width = _PLOT_WIDTH / len(columns)
    heights = columns / columns.max() * _PLOT_HEIGHT
    drawn = "".join(
        f'<rect x="{i * width + width * 0.06:.1f}" y="{_PLOT_HEIGHT - tall:.1f}" width="{min(width * 0.88, 60):.1f}" '
        f'height="{tall:.1f}"><title>{_span(low + i * step, step)} {escape(unit)}: {columns[i]:,}</title></rect>'
        for i, tall in enumerate(heights)
        if columns[i]
    )
    what = f"{escape(unit)}; the highest column: {columns.max():,}"
    ends = f"<span>{low:,}</span><span>{what}</span><span>{low + len(columns) * step - 1:,}</span>"
    return f'<figure class="plot">{_svg(drawn)}<figcaption>{ends}</figcaption></figure>'


def _span(start: int, step: int) -> str:
    return f"{start:,}" if step == 1 else f"{start:,} to {start + step - 1:,}"


def rank_curve(counts: np.ndarray) -> str:
    """Occurrences of the codes from the most to the least used, both axes logarithmic."""
    used = -np.sort(-counts[counts > 0])
    if len(used) < 2:
        return ""
    ranks = np.unique(np.geomspace(1, len(used), 200).round().astype(int))
    top, right = log10(used[0]) or 1, log10(len(used))
    points = " ".join(
        f"{log10(rank) / right * _PLOT_WIDTH:.1f},{_PLOT_HEIGHT - log10(used[rank - 1]) / top * (_PLOT_HEIGHT - 4):.1f}"
        for rank in ranks
    )
    ends = (
        f"<span>most used: {used[0]:,} times</span><span>uses by rank, both axes logarithmic</span>"
        f"<span>code {len(used):,}: {used[-1]:,}</span>"
    )
    drawn = _svg(f'<polyline points="{points}"/>')
    return f'<figure class="plot">{drawn}<figcaption>{ends}</figcaption></figure>'


def _svg(drawn: str) -> str:
    return f'<svg viewBox="0 0 {_PLOT_WIDTH} {_PLOT_HEIGHT}" preserveAspectRatio="none">{drawn}</svg>'


def picture(image: Image.Image, alt: str) -> str:
    """The image itself, inside the page."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    content = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img src="data:image/webp;base64,{content}" alt="{escape(alt)}" {size}>'


def pair(original: Image.Image | None, decoded: Image.Image, title: str, text: str, learned: bool = False) -> str:
    """Original beside reconstruction, with what is to be said of them."""
    before = picture(original, f"original: {title}") if original else '<div class="absent">no original</div>'
    after = picture(decoded, f"decoded: {title}")
    layout = "stacked" if decoded.width > 1.4 * decoded.height else "beside"
    return (
        f'<figure class="pair{" learned" if learned else ""}"><div class="{layout}">{before}{after}</div>'
        f"<figcaption><b>{escape(title)}</b><span>{escape(text)}</span></figcaption></figure>"
    )


def spoken(text: str, learned: bool) -> str:
    """A piece of a conversation."""
    return f'<span class="learned">{escape(text)}</span>' if learned else f"<span>{escape(text)}</span>"


def mark(name: str, learned: bool) -> str:
    """A token that is neither text nor image."""
    return f'<span class="mark{" learned" if learned else ""}">{escape(name)}</span>'


def talk(title: str, turns: Sequence[str]) -> str:
    """A conversation; each turn is HTML of `spoken`, `mark` and `pair`."""
    said = "".join(f'<div class="said">{turn}</div>' for turn in turns)
    return f'<article class="talk"><h3>{escape(title)}</h3>{said}</article>'


def legend() -> str:
    kinds = spoken("learned", True) + spoken("given, not learned", False) + mark("a mark", False)
    return f'<div class="legend">{kinds}</div>'


def gallery(pairs: Sequence[str]) -> str:
    return f'<div class="gallery">{"".join(pairs)}</div>'


_THUMB, _GAP, _TEXT = 220, 12, 22


def contact_sheet(pairs: Sequence[tuple[Image.Image | None, Image.Image, str]], columns: int = 3) -> Image.Image:
    """Originals beside reconstructions as one image, a line of text below each pair."""
    cell_width, cell_height = 2 * _THUMB + _GAP // 2, _THUMB + _TEXT
    rows = -(-len(pairs) // columns)
    columns = min(columns, max(len(pairs), 1))
    size = (columns * (cell_width + _GAP) + _GAP, max(rows, 1) * (cell_height + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "#f4f4f2")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, (original, decoded, text) in enumerate(pairs):
        left = _GAP + index % columns * (cell_width + _GAP)
        top = _GAP + index // columns * (cell_height + _GAP)
        for number, image in enumerate((original, decoded)):
            if image is not None:
                thumb = image.copy()
                thumb.thumbnail((_THUMB, _THUMB), Image.Resampling.LANCZOS)
                x = left + number * (_THUMB + _GAP // 2) + (_THUMB - thumb.width) // 2
                sheet.paste(thumb, (x, top + (_THUMB - thumb.height) // 2))
        draw.text((left, top + _THUMB + 4), _fitting(text, font, cell_width), fill="#333333", font=font)
    return sheet


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    while font.getlength(text) > width:
        text = text[:-2].rstrip("…") + "…"
    return text
