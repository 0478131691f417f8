"""What a training picture's pixels become, before they are one batch: pure functions of an RGB image.

Sizes are (height, width). The first three are the published ones (ILLUME+'s release); `random_crop` is ours.
"""

import math
import random

from PIL import Image

from vision_tokenizer.images.anchors import SIDE

FLIP = Image.Transpose.FLIP_LEFT_RIGHT
# width / height of the buckets that pictures of any shape are brought to
RATIOS = (1, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 2, 1 / 2, 3, 1 / 3, 4, 1 / 4)


def shorter_side_crop(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to `side`, bilinear, and cut the centre out."""
    shorter, longer = sorted(image.size)
    other = int(side * longer / shorter)
    size = (side, other) if image.width <= image.height else (other, side)
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def flipped(image: Image.Image, draw: random.Random) -> Image.Image:
    return image.transpose(FLIP) if draw.random() < 0.5 else image


def bucket_size(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The bucket of a picture: of the nearest ratio, of the greatest area that needs no enlarging.

    Areas are `max_pixels`, half of it, a quarter and so on, so that batches of one size can be filled.
    """
    ratio = min(RATIOS, key=lambda r: abs(math.log(r * height / width)))
    area = float(max_pixels)
    while area > height * width and area / 2 >= min_pixels:
        area /= 2
    h = math.sqrt(area / ratio)
    return max(int(h // SIDE), 1) * SIDE, max(int(h * ratio // SIDE), 1) * SIDE


def cover(image: Image.Image, size: tuple[int, int], draw: random.Random) -> Image.Image:
    """Resize to cover (h, w), antialiased, and cut at a random place along the side that is too long."""
    h, w = size
    share = min(image.width / w, image.height / h)
    left, top = draw.random() * (image.width - w * share), draw.random() * (image.height - h * share)
    box = (left, top, left + w * share, top + h * share)
    return image.resize((w, h), Image.Resampling.BICUBIC, box=box)


def random_crop(image: Image.Image, side: int, shares: tuple[float, float], draw: random.Random) -> Image.Image:
    """A square of a random share of the shorter side, resized to `side`; small shares are as likely as large ones."""
    share = math.exp(draw.uniform(math.log(shares[0]), math.log(shares[1])))
    length = max(share * min(image.size), min(side, *image.size))
    left, top = draw.random() * (image.width - length), draw.random() * (image.height - length)
    return image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + length, top + length))
