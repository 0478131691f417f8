"""Image files to pixels."""

import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from vision_tokenizer.errors import Failed, Rejected
from vision_tokenizer.resolution import Placement, model_size, place

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs; also of what a resize may allocate
# what Pillow's decoders are known to raise on damaged files
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    ArithmeticError,
    TypeError,
    struct.error,
    zlib.error,
)
_DEEP_MODES = ("I", "F")  # Pillow's conversion to RGB clips them to white instead of scaling


class ImageInfo(NamedTuple):
    """What the output records of an image."""

    size: tuple[int, int]  # (h, w) of the file
    anchor: tuple[int, int]  # (h, w) it was matched to


def read_image(path: Path) -> Image.Image:
    """The first frame of an image file, decoded, in its own mode; EXIF orientation is not applied.

    Raises `Failed`: not found, unreadable (truncated, empty, not an image), too large, more than 8 bits a channel.
    The size is checked before any pixel is allocated.
    """
    try:
        image = Image.open(path)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        image.load()
    except FileNotFoundError as error:
        raise Failed("image not found", str(path)) from error
    except Image.DecompressionBombError as error:
        raise Failed("image too large", f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise Failed("image unreadable", f"{path}: not an image file") from error
    except _DAMAGE as error:
        raise Failed("image unreadable", f"{path}: {error}") from error
    if image.mode.startswith(_DEEP_MODES):
        raise Failed("more than 8 bits", f"{path}: mode {image.mode} would be clipped; convert it to 8 bits first")
    return image


def to_pixels(image: Image.Image) -> torch.Tensor:
    """RGB image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1]; pixels that are float already pass."""
    return (pixels.float() / 255 - 0.5) / 0.5 if pixels.dtype == torch.uint8 else pixels


def fit(image: Image.Image, placement: Placement) -> Image.Image:
    """Resize an RGB image to cover its anchor and cut the centre out."""
    (h, w), (top, left) = placement.anchor, placement.offset
    if placement.resized[0] * placement.resized[1] > MAX_PIXELS:
        raise Failed("image too narrow", f"{image.width} x {image.height}: covering {w} x {h} takes too many pixels")
    resized = image.resize(placement.resized[::-1], Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + w, top + h))


def to_model_size(image: Image.Image) -> Image.Image:
    """An RGB image at the nearest size that the model takes."""
    h, w = model_size(image.height, image.width)
    return image if (image.height, image.width) == (h, w) else image.resize((w, h), Image.Resampling.BICUBIC)


def prepare(
    path: Path, choices: tuple[tuple[int, int], ...], crop_percent_thresh: float
) -> tuple[torch.Tensor, ImageInfo]:
    """Image file -> uint8 pixels (3, H, W) at its anchor, as DualViTok was trained on them.

    Raises `Rejected` where the crop would lose more than `crop_percent_thresh` (if that is above 0), `Failed` where
    the file cannot be read.
    """
    image = read_image(path)
    placement = place(image.height, image.width, choices)
    if 0 < crop_percent_thresh < placement.crop_share:
        raise Rejected(
            "crop above threshold",
            f"{path}: {image.width} x {image.height} loses {placement.crop_share:.3f} at {placement.anchor} (h, w)",
        )
    pixels = to_pixels(to_model_size(fit(image.convert("RGB"), placement)))
    return pixels, ImageInfo((image.height, image.width), placement.anchor)
