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
from typing import overload

import torch
from PIL import Image
from torch import Tensor

from vision_tokenizer.images.dualvitok import denormalize, normalize, to_image, to_model_size, to_pixels
from vision_tokenizer.images.files import check_depth, eight_bits
from vision_tokenizer.models.dualvitok.model import load_dualvitok
from vision_tokenizer.models.protocol import ImageTokenizer
from vistoken.errors import Failed, UserError

_REPOSITORY = Path(__file__).parents[1]
BUILT_IN = _REPOSITORY / "checkpoints" / "dualvitok_small"
BUILT_IN_CONFIG = _REPOSITORY / "configs" / "example" / "dualvitok" / "dualvitok_small.py"

BATCH = 8  # images of one size that go through the model together

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
    def decode(self, codes: Codes) -> Image.Image | Tensor: ...
    @overload
    def decode(self, codes: list[Codes]) -> list[Image.Image]: ...
    def decode(self, codes: Codes | list[Codes]) -> Image.Image | Tensor | list[Image.Image]:
        """The inverse: grids (h, w) -> a PIL image, a list of such -> a list, (B, h, w) -> (B, 3, H, W) in [-1, 1].

        Raises `ValueError` for codes that no codebook has, `UserError` if the decoder was not loaded.
        """
        if isinstance(codes, list):
            return [self._image(grids) for grids in codes]
        if codes and codes[0].ndim == 3:
            self._check(codes)
            return self.model.decode(codes).clamp(-1, 1)
        return self._image(codes)

    def _image(self, codes: Codes) -> Image.Image:
        self._check(codes)
        if any(grid.ndim != 2 for grid in codes):
            raise ValueError(f"expected grids (h, w), found {[tuple(grid.shape) for grid in codes]}")
        return to_image(denormalize(self.model.decode(tuple(grid[None] for grid in codes))[0]))

    def _check(self, codes: Codes) -> None:
        if len(codes) != len(self.model.branches):
            raise ValueError(f"{len(codes)} grids for the branches {', '.join(self.model.branches)}")
        for name, grid, size in zip(self.model.branches, codes, self.model.codebook_sizes, strict=True):
            if grid.min() < 0 or grid.max() >= size:
                raise ValueError(f"{name} codes lie in [0, {size}), found {grid.min()} to {grid.max()}")


def _checked(pixels: Tensor) -> Tensor:
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"expected a tensor (B, 3, H, W), found {tuple(pixels.shape)}")
    if pixels.dtype != torch.uint8 and not (pixels.is_floating_point() and pixels.abs().max() <= 1):
        raise ValueError(f"expected uint8, or float in [-1, 1], found {pixels.dtype} in {list(pixels.aminmax())}")
    return pixels


def _pixels(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 at a size that the model takes; 16 bits a channel are scaled to 8, transparency is dropped."""
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
