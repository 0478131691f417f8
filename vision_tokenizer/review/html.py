"""HTML reports: one file each, no network, no scripts, light or dark as the reader's system is.

`write_page` fills a jinja2 template. Templates extend `templates/report.html` and draw with the macros of
`templates/parts.html`; everything they show is escaped. This module computes what a template cannot: the geometry of
charts, and images as data URIs.
"""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from math import log10
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from vistoken.jobs.files import write_bytes
from vistoken.store import Location

TEMPLATES = Path(__file__).parent / "templates"
PLOT_WIDTH, PLOT_HEIGHT = 640, 200  # of the charts' own coordinates; a browser stretches them to the page
MAX_COLUMNS = 40


def write_page(path: Location, template: Path, **values: Any) -> None:
    """Write the page that `template` makes of `values`."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"data_uri": data_uri}
    environment.globals |= {
        "histogram": histogram,
        "rank_curve": rank_curve,
        "PLOT_WIDTH": PLOT_WIDTH,
        "PLOT_HEIGHT": PLOT_HEIGHT,
    }
    write_bytes(path, environment.get_template(template.name).render(values).encode())


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class Column:
    """A column of a histogram, in the chart's coordinates, y downwards."""

    x: float
    y: float
    width: float
    height: float
    low: int
    high: int
    count: int


def histogram(counts: Mapping[int, int]) -> list[Column]:
    """Value -> count as columns, empty ones left out. More than 40 values are put into bins of equal width."""
    low, high = min(counts), max(counts)
    step = -(-(high - low + 1) // MAX_COLUMNS)
    binned = np.zeros((high - low) // step + 1, np.int64)
    for value, count in counts.items():
        binned[(value - low) // step] += count
    pitch = PLOT_WIDTH / len(binned)
    tall = binned / binned.max() * PLOT_HEIGHT
    return [
        Column(
            x=i * pitch + pitch * 0.06,
            y=PLOT_HEIGHT - tall[i],
            width=min(pitch * 0.88, 60),
            height=tall[i],
            low=low + i * step,
            high=low + (i + 1) * step - 1,
            count=int(binned[i]),
        )
        for i in np.flatnonzero(binned).tolist()
    ]


def rank_curve(counts: np.ndarray) -> list[tuple[float, float]]:
    """Points of a curve: how often codes occur, from the most to the least used, both axes logarithmic.

    `counts` (K,) are occurrences by code. Fewer than two used codes make no curve.
    """
    used = -np.sort(-counts[counts > 0])
    if len(used) < 2:
        return []
    ranks = np.unique(np.geomspace(1, len(used), 200).round().astype(int))
    top, right = log10(used[0]) or 1, log10(len(used))
    height = PLOT_HEIGHT - 4  # the line's own width stays inside the picture
    return [(log10(n) / right * PLOT_WIDTH, PLOT_HEIGHT - log10(used[n - 1]) / top * height) for n in ranks]
