"""The protocol that every image tokenizer satisfies.

Legend: B batch, H W pixels, h w a branch's code grid. A tokenizer has one or more branches
(DualViTok: semantic and pixel; Chameleon: one), each with a codebook and a grid of its own.
"""

from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class ImageTokenizer(Protocol):
    """A pixel batch of one resolution in, code grids out; code grids in, pixels out."""

    name: str
    fingerprint: str  # of the weights and sizes that decide the codes; stable across machines

    @property
    def branches(self) -> tuple[str, ...]:
        """Names, in the order in which grids are given and returned."""
        ...

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of a branch lie in [0, size)."""
        ...

    @property
    def device(self) -> torch.device: ...

    def grid_sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """(h, w) of each branch for an H x W image, without running the model."""
        ...

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, 3, H, W) float32 in [-1, 1] -> per branch (B, h, w) int64 codes, on `device`; -1 where there is none."""
        ...

    def decode(self, grids: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Per branch (B, h, w) codes -> (B, 3, H, W) float32, nominally [-1, 1] but not clamped."""
        ...
