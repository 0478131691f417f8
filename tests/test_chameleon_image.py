import json

import numpy as np
import pytest
import torch
from PIL import Image

from vision_tokenizer.images.chameleon import best_crop, crop_image, crop_sizes, prepare
from vision_tokenizer.images.dualvitok import normalize
from vistoken.errors import Failed

SQUARE = [(64, 64)]


def colours(image):
    return {tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()}


def test_variable_sizes_are_the_published_ones(golden):
    expected = json.loads((golden / "chameleon_small" / "expected_tokens.json").read_text())["crop_sizes_512"]
    assert crop_sizes(512, "variable") == [tuple(size) for size in expected]
    assert crop_sizes(512, "square") == [(512, 512)]


@pytest.mark.parametrize("target, crop", [(500, "square"), (0, "variable"), (512, "round")])
def test_bad_sizes_are_refused(target, crop):
    with pytest.raises(ValueError, match=str(target if crop != "round" else crop)):
        crop_sizes(target, crop)


@pytest.mark.parametrize(
    "size, expected",
    [((512, 512), (512, 512)), ((1000, 500), (704, 352)), ((100, 5000), (256, 1024)), ((300, 400), (448, 576))],
)
def test_best_crop(size, expected):
    assert best_crop(*size, crop_sizes(512, "variable")) == expected


def test_ties_go_to_the_larger_pair():
    assert best_crop(100, 100, [(32, 64), (64, 32)]) == (64, 32)


def test_centre_is_kept():
    image = Image.new("RGB", (96, 64), "black")
    image.paste("white", (16, 0, 80, 64))
    assert np.asarray(crop_image(image, SQUARE)).min() == 255


def test_halving_is_a_box_mean():
    """128 -> 64 by BOX averages each 2 x 2; BICUBIC would overshoot."""
    values = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    mean = values.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(crop_image(Image.fromarray(values), SQUARE)) - mean).max() <= 1


@pytest.mark.parametrize("size", [(127, 500), (3, 2), (1, 64), (640, 65), (129, 131)])
def test_any_size_covers_the_crop(size):
    assert crop_image(Image.new("RGB", size, "white"), SQUARE).size == (64, 64)
    assert np.asarray(crop_image(Image.new("RGB", size, "white"), SQUARE)).min() == 255  # no black border


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.new("L", (64, 64), 7), (7, 7, 7)),
        (Image.new("RGBA", (64, 64), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGBA", (64, 64), (10, 20, 30, 0)), (255, 255, 255)),
        (Image.new("RGBA", (64, 64), (10, 20, 30, 128)), (132, 137, 142)),  # (1 - 128/255) * 255 + ..., truncated
        (Image.new("LA", (64, 64), (10, 128)), (132, 132, 132)),
    ],
)
def test_modes_and_transparency(image, expected):
    assert colours(crop_image(image, SQUARE)) == {expected}


def test_a_transparent_palette_colour_becomes_white():
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    assert colours(crop_image(image, SQUARE)) == {(200, 0, 0)}
    image.info["transparency"] = 1
    assert colours(crop_image(image, SQUARE)) == {(255, 255, 255)}


def test_a_file_becomes_pixels_channels_first(tmp_path):
    Image.new("RGB", (40, 64), (0, 255, 51)).save(tmp_path / "a.png")
    pixels, info = prepare(tmp_path / "a.png", [(32, 64)])
    assert info == ((64, 40), (64, 32))
    assert pixels.shape == (3, 64, 32) and pixels.dtype == torch.uint8
    assert [set(channel.flatten().tolist()) for channel in pixels] == [{0}, {255}, {51}]


def test_every_pixel_value_is_scaled_as_published():
    """x / 255 * 2 - 1 there; the engine's order of operations may differ in the last bit only."""
    values = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_allclose(normalize(values), np.arange(256) / 255.0 * 2.0 - 1.0, atol=1.2e-7)


def test_a_hair_thin_image_fails_instead_of_filling_the_memory():
    with pytest.raises(Failed, match="too narrow"):
        crop_image(Image.new("1", (1, 100_000)), [(512, 512)])
