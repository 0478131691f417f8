"""Sizes of pictures, (height, width) in pixels: which ones there are words for, and which one a ratio means."""

from vision_tokenizer.images.anchors import FIXED_ANCHORS, match_anchor
from vision_tokenizer.images.chameleon import best_crop, crop_sizes
from vision_tokenizer.models.chameleon.vocabulary import MAX_GRIDS, PIXELS_PER_GRID
from vision_tokenizer.models.dualvitok.vocabulary import SIDES

Size = tuple[int, int]
DEFAULT_SIZE = (512, 512)
LM_SIZES = (*FIXED_ANCHORS, (256, 256))  # of published models; fixed_N jobs make squares of any side with a word


def check_size(size: Size, *, lm: bool) -> None:
    """Raises `ValueError` for a size that models of this kind are not trained on."""
    if lm and size not in LM_SIZES and not (size[0] == size[1] and size[0] in SIDES):
        known = ", ".join(f"{h}x{w}" for h, w in LM_SIZES)
        raise ValueError(f"no anchor has this size; they are {known}, and squares of multiples of {SIDES.step}")
    largest = MAX_GRIDS * PIXELS_PER_GRID
    if not lm and (any(side % PIXELS_PER_GRID for side in size) or not 0 < min(size) <= max(size) <= largest):
        raise ValueError(f"the vocabulary has names for multiples of {PIXELS_PER_GRID} up to {largest}")


def nearest_size(width: int, height: int, *, lm: bool) -> Size:
    """The size that models of this kind are trained on whose ratio is nearest to width : height."""
    if lm:
        return match_anchor(height * 64, width * 64, LM_SIZES)
    return best_crop(width * 64, height * 64, crop_sizes(512, "variable"))[::-1]
