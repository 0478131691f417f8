"""Which resolution an image is encoded at: anchors, matching, crop arithmetic, tags. Pure functions.

Sizes are (height, width) throughout, as in the annotations. Source: the released DualViTok data preparation
(ILLUME+, arXiv 2504.01934).
"""

import math
from typing import NamedTuple

# in the published order, which breaks exact ties
FIXED_ANCHORS = (
    (512, 512),
    (384, 512),
    (512, 384),
    (384, 768),
    (768, 384),
    (384, 576),
    (576, 384),
    (320, 960),
    (960, 320),
    (256, 1024),
    (1024, 256),
)
RESOLUTION_TYPES = ("fixed", "fixed_anchors")
ORIENTATIONS = ("ignore", "apply")  # of EXIF: ignored as published, or the picture is turned upright
SIDE = 16  # pixels per code of the pixel branch: every side that is encoded is a multiple of it
MIN_AREA, MAX_AREA = 32 * 32, 1024 * 1024  # of an image encoded at its own size


class Placement(NamedTuple):
    """How an image comes to its anchor: resize to `resized`, cut `anchor` out at `offset` (all y, x order)."""

    anchor: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    crop_share: float  # of the area that a covering resize loses to the crop, in [0, 1)


def anchors(resolution_type: str, resolution: int) -> tuple[tuple[int, int], ...]:
    """The sizes that images of a job are matched to."""
    return ((resolution, resolution),) if resolution_type == "fixed" else FIXED_ANCHORS


def job_tag(resolution_type: str, resolution: int) -> str:
    """`fixed_256`, `fixed_512` or `fixed_anchors`: the name of output folders and statistics files."""
    return f"fixed_{resolution}" if resolution_type == "fixed" else "fixed_anchors"


def ratio_tag(anchor: tuple[int, int]) -> str:
    """The key of an anchor in the statistics file."""
    return f"ratio_h{anchor[0]}_w{anchor[1]}"


def match_anchor(height: int, width: int, choices: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The anchor of nearest width/height ratio; ties go to the nearest size, then to the first listed."""
    return min(choices, key=lambda a: (abs(a[1] / a[0] - width / height), (height - a[0]) ** 2 + (width - a[1]) ** 2))


def crop_share(height: int, width: int, anchor: tuple[int, int]) -> float:
    """Share of the covering resize's area that the centre crop to `anchor` throws away.

    Of the two sizes that keep the ratio and one anchor side, the one that covers the anchor counts.
    """
    h, w = anchor
    by_width = (int(w / (width / height)), w)
    by_height = (h, int(h * width / height))
    covering = [size for size in (by_width, by_height) if size[0] >= h and size[1] >= w]
    if not covering:  # int() fell one pixel short on both: the ratios are the same, nothing is lost
        return 0.0
    area = covering[-1][0] * covering[-1][1]
    return 1 - (w * h) / area


def place(height: int, width: int, choices: tuple[tuple[int, int], ...]) -> Placement:
    """Match an image to its anchor and say how to resize and crop it.

    The published code truncates the free side, which at some exact ratios (784 x 784 -> 511) falls one pixel short of
    the anchor and leaves a black column. Here the free side is at least the anchor's: the one deliberate difference.
    """
    anchor = match_anchor(height, width, choices)
    h, w = anchor
    tall = height / h > width / w
    resized = (max(int(w / width * height), h), w) if tall else (h, max(int(h / height * width), w))
    offset = ((resized[0] - h) // 2, (resized[1] - w) // 2)
    return Placement(anchor, resized, offset, crop_share(height, width, anchor))


def model_size(height: int, width: int, min_area: int = MIN_AREA, max_area: int = MAX_AREA) -> tuple[int, int]:
    """The size that pixels of a free size are encoded at: sides in multiples of 16, area within the model's range."""
    h, w = max(round(height / SIDE), 1) * SIDE, max(round(width / SIDE), 1) * SIDE
    if h * w > max_area:
        beta = math.sqrt(height * width / max_area)
        h, w = (max(math.floor(side / beta / SIDE), 1) * SIDE for side in (height, width))
    elif h * w < min_area:
        beta = math.sqrt(min_area / (height * width))
        h, w = (math.ceil(side * beta / SIDE) * SIDE for side in (height, width))
    return h, w
