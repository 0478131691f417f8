"""Images in, codes out, and back: the Python interface.

    from vision_tokenizer import load_tokenizer

    tokenizer = load_tokenizer()  # the small one of this repository; or a config and its checkpoint:
    tokenizer = load_tokenizer("configs/example/dualvitok/dualvitok_anyres_max512.py", "checkpoints/dualvitok")
    semantic, pixel = tokenizer.encode(image)  # a PIL image of any size
    again = tokenizer.decode((semantic, pixel))

Legend: B batch, H W pixels, h w a branch's code grid.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vision_tokenizer.images.anchors import SIDE
from vision_tokenizer.images.dualvitok import denormalize, normalize, to_image, to_model_size, to_pixels
from vision_tokenizer.images.files import check_depth, eight_bits
from vision_tokenizer.models.dualvitok.model import load_dualvitok
from vision_tokenizer.models.protocol import ImageTokenizer
from vistoken.errors import Failed, UserError

_REPOSITORY = Path(__file__).parents[1]
BUILT_IN = _REPOSITORY / "checkpoints" / "dualvitok_small"
BUILT_IN_CONFIG = _REPOSITORY / "configs" / "example" / "dualvitok" / "dualvitok_small.py"

BATCH = 8  # images of one size that go through the model together

Grid = Tensor | np.ndarray | list[list[int]]
Codes = tuple[Tensor, ...]  # one grid per branch


class Tokenizer:
    """What `load_tokenizer` gives; `model` is the network itself, with `name`, `branches` and `codebook_sizes`."""

    def __init__(self, model: ImageTokenizer):
        self.model = model

    @overload
    def encode(self, images: Image.Image | Tensor) -> Codes: ...
    @overload
    def encode(self, images: Sequence[Image.Image]) -> list[Codes]: ...
    def encode(self, images: Image.Image | Sequence[Image.Image] | Tensor) -> Codes | list[Codes]:
        """One PIL image -> its grids, (h, w) int64 each; a list of any sizes -> a list of such.

        A side that is no multiple of 16 is resized to the nearest one, as are images above 1024 * 1024 or below
        32 * 32 pixels. A tensor (B, 3, H, W), uint8 or float in [-1, 1], -> grids (B, h, w).

        Raises `ValueError` for tensors of another shape, kind or range, and `TypeError` for what is no image.
        """
        if isinstance(images, Tensor):
            return self.model.encode(normalize(_checked(images)))
        if isinstance(images, Image.Image):
            return self.encode([images])[0]
        if not isinstance(images, Sequence) or not all(isinstance(image, Image.Image) for image in images):
            raise TypeError(f"expected a PIL image, a list of them or a tensor (B, 3, H, W), found {type(images)}")
        pixels = [_pixels(image) for image in images]
        results: list[Codes] = [()] * len(pixels)
        for rows in _batches([tensor.shape for tensor in pixels]):
            grids = self.encode(torch.stack([pixels[row] for row in rows]))
            for row, codes in zip(rows, zip(*grids, strict=True), strict=True):
                results[row] = codes
        return results

    @overload
    def decode(self, codes: tuple[Grid, ...]) -> Image.Image | Tensor: ...
    @overload
    def decode(self, codes: list[Any]) -> list[Image.Image]: ...
    def decode(self, codes: tuple[Grid, ...] | list[Any]) -> Image.Image | Tensor | list[Image.Image]:
        """The inverse: grids (h, w) -> a PIL image, a list of such -> a list, (B, h, w) -> (B, 3, H, W) in [-1, 1].

        A grid may be a NumPy array, or rows in lists, as the `image_embed_inds` of codebook inference have them.
        Raises `ValueError` for codes that no codebook has and grids that do not belong together, `UserError` if the
        decoder was not loaded.
        """
        if isinstance(codes, list) and not any(map(_is_grid, codes)):
            return [self._image(self._checked(grids, dims=(2,))) for grids in codes]
        grids = self._checked(codes, dims=(2, 3))
        return self.model.decode(grids).clamp(-1, 1) if grids[0].ndim == 3 else self._image(grids)

    def _image(self, codes: Codes) -> Image.Image:
        return to_image(denormalize(self.model.decode(tuple(grid[None] for grid in codes))[0]))

    def _checked(self, codes: Sequence[Grid], dims: tuple[int, ...]) -> Codes:
        """The grids of one image (2 dimensions), or of a batch of them (3), as tensors."""
        if len(codes) != len(self.model.branches):
            raise ValueError(f"{len(codes)} grids for the branches {', '.join(self.model.branches)}")
        grids = tuple(grid if isinstance(grid, Tensor) else torch.tensor(np.asarray(grid)) for grid in codes)
        shapes = [tuple(grid.shape) for grid in grids]
        alike = len({(len(shape), shape[:-2]) for shape in shapes}) == 1
        if not alike or len(shapes[0]) not in dims or 0 in sum(shapes, ()):
            raise ValueError(f"expected grids (h, w), or (B, h, w) of a batch, found {shapes}")
        for name, grid, size in zip(self.model.branches, grids, self.model.codebook_sizes, strict=True):
            if grid.is_floating_point():
                raise ValueError(f"{name} codes are whole numbers, found {grid.dtype}")
            low, high = grid.long().aminmax()
            if low < 0 or high >= size:
                raise ValueError(f"{name} codes lie in [0, {size}), found {low} to {high}")
        h, w = (side * SIDE for side in shapes[-1][-2:])  # what the pixel branch says of the image's size
        if [shape[-2:] for shape in shapes] != list(expected := self.model.grid_sizes(h, w)):
            raise ValueError(f"an image of {h} x {w} (h, w) has grids of {list(expected)}, found {shapes}")
        return tuple(grid.long() for grid in grids)


def _is_grid(codes: object) -> bool:
    """Whether these are the codes of one branch, not the branches of an image."""
    rows = isinstance(codes, list) and codes and isinstance(codes[0], list) and codes[0]
    return isinstance(codes, Tensor | np.ndarray) or bool(rows and isinstance(rows[0], int))


def _checked(pixels: Tensor) -> Tensor:
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"expected a tensor (B, 3, H, W), found {tuple(pixels.shape)}")
    if pixels.dtype != torch.uint8 and not (pixels.is_floating_point() and pixels.abs().max() <= 1):
        raise ValueError(f"expected uint8, or float in [-1, 1], found {pixels.dtype} in {list(pixels.aminmax())}")
    return pixels


def _pixels(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 at a size that the model takes; 16 bits a channel are scaled to 8, transparency is dropped."""
    if 0 in image.size:
        raise ValueError(f"an image of {image.width} x {image.height} has no pixels")
    try:
        check_depth(image, "an image")
    except Failed as error:
        raise ValueError(str(error)) from error
    return to_pixels(to_model_size(eight_bits(image).convert("RGB")))


def _batches(shapes: list[torch.Size]) -> Iterator[list[int]]:
    """Positions of equal shapes, at most BATCH at a time."""
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for position, shape in enumerate(shapes):
        by_shape[shape].append(position)
    for positions in by_shape.values():
        yield from (positions[start : start + BATCH] for start in range(0, len(positions), BATCH))


def load_tokenizer(
    config: str | Path | None = None,
    checkpoint: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str = "fp32",
    use_ema: bool = False,
    decoder: bool = True,
    compile: bool = False,
) -> Tokenizer:
    """A DualViTok that is ready for use; without arguments, the small trained one of this repository.

    `config` is a `.py` config, which is executed; `checkpoint` a file, a folder or a hub id; `dtype` one of `fp32`
    (IEEE), `tf32`, `bf16` and `fp16`. With `decoder=False` it only encodes and takes 0.79 G of the 1.35 G parameters.
    `compile` pays off after some hundred images of a size. Raises `UserError` with what to do.
    """
    if config is None and checkpoint is None:
        config, checkpoint = BUILT_IN_CONFIG, BUILT_IN
        if not BUILT_IN.is_dir():
            raise UserError(f"{BUILT_IN}: the built-in tokenizer comes with a checkout of the repository; name another")
    if config is None or checkpoint is None:
        raise UserError("a tokenizer is a config and a checkpoint: name both, or none for the built-in one")
    return Tokenizer(
        load_dualvitok(
            config, checkpoint, device=device, dtype=dtype, use_ema=use_ema, decoder=decoder, compile=compile
        )
    )
