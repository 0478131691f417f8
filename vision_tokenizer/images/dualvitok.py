"""Image files to pixels at the size they are encoded at."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from vision_tokenizer.images.anchors import Placement, model_size
from vision_tokenizer.images.files import Embedded, damage_named, place_image, read_image


class ImageInfo(NamedTuple):
    """What the output records of an image."""

    size: tuple[int, int]  # (h, w) of the file
    anchor: tuple[int, int]  # (h, w) it was matched to


def to_pixels(image: Image.Image) -> torch.Tensor:
    """RGB image -> uint8 (3, H, W).

    NumPy copies, not torch: this runs in decoding threads, and torch's OpenMP starts a team of its own, as large as the
    machine has cores, for every thread that computes.
    """
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1]; pixels that are float already pass."""
    return (pixels.float() / 255 - 0.5) / 0.5 if pixels.dtype == torch.uint8 else pixels


def denormalize(pixels: torch.Tensor) -> torch.Tensor:
    """The inverse: [-1, 1] -> uint8, on the CPU; what lies outside is clipped."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def to_image(pixels: torch.Tensor) -> Image.Image:
    """uint8 (3, H, W) -> RGB image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def fit(image: Image.Image, placement: Placement) -> Image.Image:
    """Resize an RGB image to cover its anchor and cut the centre out."""
    (h, w), (top, left) = placement.anchor, placement.offset
    resized = image.resize(placement.resized[::-1], Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + w, top + h))


def to_model_size(image: Image.Image) -> Image.Image:
    """An RGB image at the nearest size that the model takes."""
    h, w = model_size(image.height, image.width)
    return image if (image.height, image.width) == (h, w) else image.resize((w, h), Image.Resampling.BICUBIC)


def prepare(
    path: Path | Embedded, choices: tuple[tuple[int, int], ...], crop_percent_thresh: float, orientation: str = "ignore"
) -> tuple[torch.Tensor, ImageInfo]:
    """Image file -> uint8 pixels (3, H, W) at its anchor, as DualViTok was trained on them; transparency is dropped.

    Raises `Rejected` and `Failed` as `read_image` and `place_image` do.
    """
    image = read_image(path, orientation)
    placement = place_image(path, (image.height, image.width), choices, crop_percent_thresh)
    with damage_named(path):
        image = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it, too
        fitted = to_model_size(fit(image, placement))
    return to_pixels(fitted), ImageInfo((image.height, image.width), placement.anchor)
