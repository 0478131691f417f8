"""Images to tiles for the vision tower, and the order in which their features enter the sequence.

`base` squashes an image to one tile. `anyres` adds tiles of a larger canvas, in the way of LLaVA-NeXT: the whole image
comes first, then the canvas as one map without its black border, each row ended by the embedding of a new-line token.

Legend: S side of a tile in pixels, G patches along a tile's side, N tiles.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

CANVASES = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))  # (columns, rows) of tiles
NEWLINE = -1  # in a layout: a new-line token instead of a feature


@dataclass(frozen=True)
class ImageInput:
    """One image, ready for the tower and for the sequence."""

    tiles: np.ndarray  # (N, 3, S, S) uint8
    layout: np.ndarray  # int64 rows into the image's features, NEWLINE between rows of the map
    feature_count: int  # N * G * G


def image_input(image: Image.Image, side: int, grid: int, anyres: bool) -> ImageInput:
    """Tiles and layout of an RGB image of any size."""
    tiles = to_tiles(image, side, anyres)
    return ImageInput(tiles, feature_layout(*image.size, side, grid, anyres), len(tiles) * grid * grid)


def best_canvas(width: int, height: int, side: int) -> tuple[int, int]:
    """(columns, rows) of the canvas that keeps most of an image's pixels, then wastes the least, then comes first."""

    def rank(canvas: tuple[int, int]) -> tuple[int, int]:
        canvas_width, canvas_height = canvas[0] * side, canvas[1] * side
        scale = min(canvas_width / width, canvas_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas_width * canvas_height

    return max(CANVASES, key=rank)


def to_tiles(image: Image.Image, side: int, anyres: bool) -> np.ndarray:
    """RGB image -> (N, 3, S, S) uint8: the whole image, and with `anyres` the tiles of its canvas, row by row."""
    tiles = [image.resize((side, side), Image.Resampling.BICUBIC)]
    if anyres:
        columns, rows = best_canvas(*image.size, side)
        canvas = _on_canvas(image, columns * side, rows * side)
        tiles += [
            canvas.crop((x * side, y * side, (x + 1) * side, (y + 1) * side))
            for y in range(rows)
            for x in range(columns)
        ]
    return np.stack([np.asarray(tile) for tile in tiles]).transpose(0, 3, 1, 2)


def _on_canvas(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image resized to fit, in the middle of a black canvas."""
    scale_x, scale_y = width / image.width, height / image.height
    if scale_x < scale_y:
        size = width, min(math.ceil(image.height * scale_x), height)
    else:
        size = min(math.ceil(image.width * scale_y), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas


def feature_layout(width: int, height: int, side: int, grid: int, anyres: bool) -> np.ndarray:
    """Which feature stands where, for an image of the given size.

    Returns int64 rows into the image's (N * G * G) features as the tower gives them, `NEWLINE` where a row ends.
    """
    whole = np.arange(grid * grid)
    if not anyres:
        return whole
    columns, rows = best_canvas(width, height, side)
    y, x = np.mgrid[: rows * grid, : columns * grid]
    tile = 1 + y // grid * columns + x // grid  # the whole image is tile 0
    feature_map = tile * grid * grid + y % grid * grid + x % grid
    map_height, map_width = feature_map.shape
    if width / height > map_width / map_height:  # without the border above and below, or at the sides
        cut = (map_height - int(height * (map_width / width))) // 2
        feature_map = feature_map[cut : map_height - cut]
    else:
        cut = (map_width - int(width * (map_height / height))) // 2
        feature_map = feature_map[:, cut : map_width - cut]
    ended = np.pad(feature_map, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate((whole, ended.ravel()))


def continuous_tokens(heights: np.ndarray, widths: np.ndarray, side: int, grid: int, anyres: bool) -> np.ndarray:
    """(n,) int64: how many tokens images of these sizes add to a sequence, the separator among them.

    What `feature_layout` lays out, without laying it out: batches are shared out by it before an image is opened.
    """
    whole = np.full(len(heights), 1 + grid * grid)
    if not anyres:
        return whole
    kept, wasted = [], []
    for columns, rows in CANVASES:
        scale = np.minimum(columns * side / widths, rows * side / heights)
        fits = (widths * scale).astype(np.int64) * (heights * scale).astype(np.int64)
        kept.append(np.minimum(fits, widths.astype(np.int64) * heights))
        wasted.append(columns * rows * side * side - kept[-1])
    best = np.argmax(np.stack(kept) * 2**32 - np.stack(wasted), axis=0)
    map_width, map_height = (np.array(CANVASES).T * grid)[:, best]
    is_wide = widths / heights > map_width / map_height
    high = map_height - (heights * (map_width / widths)).astype(np.int64)
    wide = map_width - (widths * (map_height / heights)).astype(np.int64)
    map_height = np.where(is_wide, map_height - high // 2 * 2, map_height)
    map_width = np.where(is_wide, map_width, map_width - wide // 2 * 2)
    return whole + map_height * (map_width + 1)
