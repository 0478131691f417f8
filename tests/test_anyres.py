"""Tiles and feature layouts."""

import numpy as np
import pytest
from PIL import Image

from training.data.anyres import NEWLINE, best_canvas, continuous_tokens, feature_layout, to_tiles


@pytest.mark.parametrize(
    ("size", "canvas"),
    [
        ((512, 512), (2, 2)),
        ((100, 100), (1, 2)),  # fits everywhere; the smallest canvases waste least, the first listed wins
        ((1000, 400), (3, 1)),
        ((768, 384), (2, 1)),
        ((384, 1152), (1, 3)),
        ((40, 4000), (1, 3)),
    ],
)
def test_best_canvas(size, canvas):
    assert best_canvas(*size, 384) == canvas


@pytest.mark.parametrize("size", [(512, 512), (1000, 400), (37, 501), (385, 384), (40, 3000), (3000, 40)])
def test_layout_takes_each_feature_at_most_once_and_keeps_rows_whole(size):
    tiles = to_tiles(Image.new("RGB", size, "white"), 384, anyres=True)
    layout = feature_layout(*size, 384, 27, anyres=True)
    features = layout[layout != NEWLINE]
    assert len(np.unique(features)) == len(features) and features.max() < len(tiles) * 729
    assert (layout[:729] == np.arange(729)).all()
    row_ends = np.flatnonzero(layout[729:] == NEWLINE)
    assert len(set(np.diff(row_ends, prepend=-1))) == 1 and row_ends[-1] == len(layout) - 730


def test_layout_leaves_out_the_black_border():
    """White image on black canvas: a feature that is kept never lies wholly on black."""
    size = (1000, 300)
    tiles = to_tiles(Image.new("RGB", size, "white"), 384, anyres=True)
    patches = tiles[:, 0, : 27 * 14, : 27 * 14].reshape(len(tiles), 27, 14, 27, 14).max((2, 4)).ravel()
    layout = feature_layout(*size, 384, 27, anyres=True)
    kept = layout[layout != NEWLINE]
    assert (patches[kept] > 0).mean() > 0.95
    assert (patches == 0).any()


def test_base_is_one_tile_in_reading_order():
    assert to_tiles(Image.new("RGB", (90, 40)), 384, anyres=False).shape == (1, 3, 384, 384)
    assert (feature_layout(90, 40, 384, 27, anyres=False) == np.arange(729)).all()


def test_an_image_too_thin_for_any_map_keeps_its_whole():
    assert len(to_tiles(Image.new("RGB", (3000, 1)), 384, anyres=True)) == 3
    assert (feature_layout(3000, 1, 384, 27, anyres=True)[:729] == np.arange(729)).all()


@pytest.mark.parametrize(("side", "grid"), [(384, 27), (56, 4)])
def test_tokens_are_counted_as_they_are_laid_out(side, grid):
    random = np.random.default_rng(0)
    widths, heights = np.concatenate([random.integers(1, 3000, (2, 300)), random.integers(300, 900, (2, 300))], axis=1)
    widths[:3], heights[:3] = (1, 3000, 384), (3000, 1, 384)
    laid_out = [len(feature_layout(int(w), int(h), side, grid, True)) + 1 for w, h in zip(widths, heights, strict=True)]
    assert continuous_tokens(heights.astype(np.int32), widths.astype(np.int32), side, grid, True).tolist() == laid_out
    assert continuous_tokens(heights, widths, side, grid, False).tolist() == [grid * grid + 1] * 600
