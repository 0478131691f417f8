"""Which crop an image gets and what its pixels become, as in the Chameleon family (Chameleon, Lumina-mGPT, UniToken).

Sizes are (w, h) here, as in Pillow and in the published lists. Pure functions of an opened image.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vision_tokenizer.images.dualvitok import ImageInfo, to_pixels
from vision_tokenizer.images.files import MAX_PIXELS, Embedded, damage_named, read_image
from vistoken.errors import Failed

PATCH = 32  # crop sides are multiples of it, and the block of an image spells its sides in it
MAX_RATIO = 4.0


def crop_sizes(target_size: int, crop: str = "square") -> list[tuple[int, int]]:
    """Sizes an image may be cropped to: `square` is (T, T) alone, `variable` all of about T * T pixels.

    Raises `ValueError` for a target that is no positive multiple of 32 or a crop of another name.
    """
    if target_size <= 0 or target_size % PATCH:
        raise ValueError(f"target size {target_size} is not a positive multiple of {PATCH}")
    if crop == "square":
        return [(target_size, target_size)]
    if crop != "variable":
        raise ValueError(f"crop {crop!r} is neither 'square' nor 'variable'")
    patches = (target_size // PATCH) ** 2
    sizes, w, h = [], patches, 1
    while w > 0:
        if max(w, h) / min(w, h) <= MAX_RATIO:
            sizes.append((w * PATCH, h * PATCH))
        if (h + 1) * w <= patches:
            h += 1
        else:
            w -= 1
    return sizes


def best_crop(width: int, height: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The size that keeps the greatest share of a `width` x `height` image; ties go to the larger (w, h)."""

    def kept(size: tuple[int, int]) -> float:
        across, down = size[0] / width, size[1] / height
        return min(across, down) / max(across, down)

    return max(sizes, key=lambda size: (kept(size), size))


def crop_image(image: Image.Image, sizes: list[tuple[int, int]]) -> Image.Image:
    """Resize `image` to cover its best crop and cut out the centre -> RGB of exactly that size.

    The published code cuts at a random place; the centre gives the same tokens in every run. Raises `Failed` for an
    image so thin that covering the crop would take gigabytes.
    """
    image = _with_colour(image)
    crop_w, crop_h = best_crop(*image.size, sizes)
    while image.width >= 2 * crop_w and image.height >= 2 * crop_h:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(crop_w / image.width, crop_h / image.height)
    covering = (round(image.width * scale), round(image.height * scale))
    if covering[0] * covering[1] > MAX_PIXELS:
        raise Failed("image too narrow", f"{image.width} x {image.height} is too thin for a {crop_w} x {crop_h} crop")
    image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (image.width - crop_w) // 2, (image.height - crop_h) // 2
    return _over_white(image.crop((left, top, left + crop_w, top + crop_h)))


def prepare(
    path: Path | Embedded, sizes: list[tuple[int, int]], orientation: str = "ignore"
) -> tuple[torch.Tensor, ImageInfo]:
    """Image file -> uint8 pixels of its best crop, over white where it is transparent.

    Raises `Failed` where the file cannot be read.
    """
    image = read_image(path, orientation)
    with damage_named(path):
        cropped = crop_image(image, sizes)
    return to_pixels(cropped), ImageInfo((image.height, image.width), (cropped.height, cropped.width))


def _with_colour(image: Image.Image) -> Image.Image:
    if image.mode in ("RGB", "RGBA"):
        return image
    transparent = image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    values = np.asarray(image)  # (H, W, 4) uint8
    if values[..., 3].min() == 255:
        return image.convert("RGB")
    alpha = values[..., 3:] / 255.0
    blended = (1 - alpha) * 255 + alpha * values[..., :3]
    return Image.fromarray(blended.astype(np.uint8))  # truncated, as published
