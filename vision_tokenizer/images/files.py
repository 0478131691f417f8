"""Image files: their headers, their pixels, and the rules by which one is not taken.

Transparency is dropped: the colours below it stay as they are (Chameleon alone blends it over white).
"""

import io
import logging
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

from vision_tokenizer.images import libtiff
from vision_tokenizer.images.anchors import Placement, place
from vistoken.errors import Failed, Rejected
from vistoken.files import check_regular, open_file
from vistoken.jobs.members import indexes
from vistoken.object_store import UnknownStore
from vistoken.store import Location, Url

_has_avif = "avif" in features.modules and features.check_module("avif")  # since Pillow 11.3
# Pillow knows many more, and hands some of them to other programs: EPS to Ghostscript
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(("AVIF",) if _has_avif else ()))
SUFFIXES = {
    "JPEG": ".jpg",
    "MPO": ".jpg",  # a JPEG file of several pictures, as cameras write them
    "PNG": ".png",
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "PPM": ".ppm",
    "AVIF": ".avif",
}
CROP_ABOVE_THRESHOLD = "crop above threshold"  # the reason of items that lose too much


class CropRejected(Rejected):
    """`crop_share` is what other thresholds are counted with."""

    def __init__(self, reason: str, detail: str = "", crop_share: float = 0.0):
        super().__init__(reason, detail)
        self.crop_share = crop_share


MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs; also of what a resize may allocate
_UPRIGHT = {  # what undoes each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_REQUEST = 1 << 18  # bytes asked of a store at a time, at least: most images are one request, their headers, too
_PREFIX = 32  # bytes by which a format is recognised
_END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_ENDING = 64  # bytes in which a whole file has its end mark; earlier, it may be an embedded thumbnail's
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
_log = logging.getLogger(__name__)


@contextmanager
def damage_named(path: object) -> Iterator[None]:
    """Turn what Pillow raises on a bad image into `Failed`."""
    said: list[str] = []
    try:
        with libtiff.messages() as said:
            yield
    except FileNotFoundError as error:
        raise Failed("image not found", str(path)) from error
    except Image.DecompressionBombError as error:
        raise Failed("image too large", f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        detail = "; ".join(["not an image file", *said])
        raise Failed("image unreadable", f"{path}: {detail}") from error
    except UnknownStore as error:
        raise Failed("image unreadable", str(error)) from error
    except _DAMAGE as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        detail = "; ".join([reason, *said])
        raise Failed("image unreadable", f"{path}: {detail}") from error
    if said:
        _log.warning("%s: read, but libtiff says: %s", path, "; ".join(said))


class Embedded(Protocol):
    """An image file inside another file; `str` names it."""

    def open(self) -> BinaryIO: ...


def open_source(source: Location | Embedded) -> BinaryIO:
    """The bytes of an image file, wherever it lies. Raises as `_located`."""
    found = _located(source)
    return open_file(found) if isinstance(found, Path) else _stream(found)


def _stream(source: Url | Embedded) -> BinaryIO:
    return source.open("rb", _REQUEST) if isinstance(source, Url) else source.open()


def _located(source: Location | Embedded) -> Location | Embedded:
    """Of a path into a tar file, `shard.tar/0001.jpg`, the member. Raises `Failed` where there is none."""
    if isinstance(source, Path | Url) and ".tar/" in str(source).lower():
        return indexes.find(source) or source
    return source


def _open(source: Path | BinaryIO) -> Image.Image:
    Image.init()  # all formats, once: a thread that loads them when it meets one can hide them from another
    image = Image.open(source, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    return image


def _check_taken(prefix: bytes, name: object) -> None:
    """Raises `Failed` where a file's first bytes tell what it is instead. Only they are looked at: no decoder runs."""
    if not prefix:
        raise Failed("image unreadable", f"{name}: the file is empty")
    padded = prefix.ljust(_PREFIX, b"\0")  # some unpack numbers from it
    kinds = [kind for kind, (_, accepts) in Image.OPEN.items() if accepts and accepts(padded) is True]
    if prefix[4:8] == b"ftyp" and prefix[8:12] in _HEIF_BRANDS:  # as phones write them, often named .jpg
        kinds = ["HEIF"]
    for kind in kinds:
        if kind not in FORMATS:
            raise Failed("image format not taken", f"{name}: {kind}; convert it to one of {', '.join(FORMATS)}")
    text = " ".join(prefix.decode("ascii", "replace").split())
    if not kinds and text.isascii() and text.isprintable():  # a web page, a Git LFS pointer
        raise Failed("image unreadable", f"{name}: not an image file but text that begins {text!r}")


def open_image(path: Location | Embedded) -> Image.Image:
    """An image whose header is read, so that size and mode are known, and of which no pixel is allocated yet.

    Raises `Failed`: not found, no regular file, unreadable (empty, not an image), of a format that is not taken, too
    large, more than 16 bits a channel.
    """
    with damage_named(path):
        found = _located(path)
        if isinstance(found, Path):
            check_regular(found)
        try:
            image = _open(found if isinstance(found, Path) else _stream(found))
        except (UnidentifiedImageError, struct.error):  # the latter of an empty file
            with open_source(path) as file:
                _check_taken(file.read(_PREFIX), path)
            raise
    check_depth(image, path)
    return image


def embedded_format(image: Embedded) -> str:
    """The format of an image that lies inside another file, by its header. Raises `Failed` as `open_image` does."""
    with damage_named(image):
        try:
            with _open(image.open()) as opened:
                return str(opened.format)
        except (UnidentifiedImageError, struct.error):
            _check_taken(image.open().read(_PREFIX), image)
            raise


def read_image(path: Location | Embedded, orientation: str = "ignore") -> Image.Image:
    """The first frame of an image file, decoded, in its own mode but with 8 bits a channel.

    With `orientation` "apply" it is turned upright as its EXIF data say. Raises `Failed` as `open_image` does, and
    where the pixels are truncated or damaged.
    """
    image = open_image(path)
    with damage_named(path):
        image.load()
        turn = _UPRIGHT.get(exif_orientation(image)) if orientation == "apply" else None
        image = eight_bits(image)
        return image if turn is None else image.transpose(turn)


def exif_orientation(image: Image.Image) -> int:
    """1 for upright, or where nothing is said; 2 to 8 for what a camera noted: turned by 90 degrees from 5 on."""
    try:
        said = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGE:  # the picture may be sound all the same
        return 1
    return said if said in _UPRIGHT else 1


def upright_size(image: Image.Image, orientation: str) -> tuple[int, int]:
    """(h, w) that `read_image` gives an image of which the header is read."""
    turned = orientation == "apply" and exif_orientation(image) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


def is_whole(path: Location | Embedded, image: Image.Image) -> bool:
    """Whether the end of an opened file shows that nothing is cut off. If not, only decoding it tells."""
    with open_source(path) as file:
        size = file.seek(0, io.SEEK_END)
        if image.format == "WEBP":
            file.seek(4)
            return size >= 8 + int.from_bytes(file.read(4), "little")
        file.seek(max(size - _ENDING, 0))
        return image.format in _END_MARKS and _END_MARKS[image.format] in file.read()


def _bits(image: Image.Image) -> int:
    """Bits a channel. Grey PNG and PPM images of 16 bits have Pillow's mode for 32, depending on its version."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 16
    return 32 if image.mode in ("I", "F") else 8


def check_depth(image: Image.Image, name: object) -> None:
    """Raises `Failed` for more than 16 bits a channel, whose range nobody knows."""
    if _bits(image) > 16:
        raise Failed("more than 16 bits", f"{name}: mode {image.mode}; scale it to 8 or 16 bits first")


def eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit image scaled to 8 bits by its range, as Pillow does it with 16-bit colour; others as they are.

    The published code clips it instead, which turns nearly all of it white: a difference on purpose.
    """
    if _bits(image) != 16:
        return image
    return Image.fromarray((np.asarray(image).astype(np.int32).clip(0, 65535) >> 8).astype(np.uint8))


def place_image(
    path: Location | Embedded, size: tuple[int, int], choices: tuple[tuple[int, int], ...], crop_percent_thresh: float
) -> Placement:
    """Match an image of `size` (h, w) to its anchor.

    Raises `Rejected` where the crop would lose more than `crop_percent_thresh` (if that is above 0), `Failed` where
    covering the anchor would take too many pixels.
    """
    placement = place(*size, choices)
    found, (h, w) = f"{path}: {size[1]} x {size[0]}", placement.anchor
    if 0 < crop_percent_thresh < placement.crop_share:
        loses = f"{found} loses {placement.crop_share:.3f} at {placement.anchor} (h, w)"
        raise CropRejected(CROP_ABOVE_THRESHOLD, loses, placement.crop_share)
    if placement.resized[0] * placement.resized[1] > MAX_PIXELS:
        raise Failed("image too narrow", f"{found}: covering {w} x {h} takes too many pixels")
    return placement
