"""Image files: their headers, their pixels, and the rules by which one is not taken."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from vision_tokenizer.images.anchors import Placement, place
from vistoken.errors import Failed, Rejected

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs; also of what a resize may allocate
# what Pillow's decoders raise on damaged files, as fuzzing every format showed; AVIF's has only RuntimeError
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    ArithmeticError,
    TypeError,
    RuntimeError,
    AssertionError,
    AttributeError,
    MemoryError,
    struct.error,
    zlib.error,
)
_DEEP_MODES = ("I", "F")  # Pillow's conversion to RGB clips them to white instead of scaling


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what Pillow raises on a bad image into `Failed`."""
    try:
        yield
    except FileNotFoundError as error:
        raise Failed("image not found", str(path)) from error
    except Image.DecompressionBombError as error:
        raise Failed("image too large", f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise Failed("image unreadable", f"{path}: not an image file") from error
    except _DAMAGE as error:
        raise Failed("image unreadable", f"{path}: {error or type(error).__name__}") from error


def is_deep(image: Image.Image) -> bool:
    """More than 8 bits a channel."""
    return image.mode.startswith(_DEEP_MODES)


def open_image(path: Path) -> Image.Image:
    """An image whose header is read, so that size and mode are known, and of which no pixel is allocated yet.

    Raises `Failed`: not found, unreadable (empty, not an image), too large, more than 8 bits a channel.
    """
    Image.init()  # all formats, once: a thread that loads them when it meets one can hide them from another
    with damage_named(path):
        image = Image.open(path)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    if is_deep(image):
        raise Failed("more than 8 bits", f"{path}: mode {image.mode} would be clipped; convert it to 8 bits first")
    return image


def read_image(path: Path) -> Image.Image:
    """The first frame of an image file, decoded, in its own mode; EXIF orientation is not applied.

    Raises `Failed` as `open_image` does, and where the pixels are truncated or damaged.
    """
    image = open_image(path)
    with damage_named(path):
        image.load()
    return image


def place_image(
    path: Path, image: Image.Image, choices: tuple[tuple[int, int], ...], crop_percent_thresh: float
) -> Placement:
    """Match an image to its anchor.

    Raises `Rejected` where the crop would lose more than `crop_percent_thresh` (if that is above 0), `Failed` where
    covering the anchor would take too many pixels.
    """
    placement = place(image.height, image.width, choices)
    found, (h, w) = f"{path}: {image.width} x {image.height}", placement.anchor
    if 0 < crop_percent_thresh < placement.crop_share:
        raise Rejected("crop above threshold", f"{found} loses {placement.crop_share:.3f} at {placement.anchor} (h, w)")
    if placement.resized[0] * placement.resized[1] > MAX_PIXELS:
        raise Failed("image too narrow", f"{found}: covering {w} x {h} takes too many pixels")
    return placement
