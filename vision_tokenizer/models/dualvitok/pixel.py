"""DualViTok's pixel branch: MoVQGAN (arXiv 2209.09002) with the space-to-channel shortcuts of DC-AE (arXiv 2410.10733).

Attribute names are those of the published checkpoint.

Legend: B batch, C channels, H W a level's height and width, z channels of the code map, zq of the map that norms see.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_tokenizer.models.layers import ConvSizes, Decoder, Encoder, GroupNorm


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels // 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2). Unshuffled, 4 consecutive channels are 2 x 2 pixels: a plain mean.

        A sum has the layout of its first term, and on CUDA the unshuffled one is not channels-last.
        """
        return F.avg_pool2d(x, 2) + F.pixel_unshuffle(self.conv(x), 2)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W). Shuffled, a channel repeated 4 times is each pixel repeated 2 x 2 times."""
        return F.interpolate(x, scale_factor=2, mode="nearest") + F.pixel_shuffle(self.conv(x), 2)


def nearest(x: Tensor, size: torch.Size) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), cells repeated; training takes the way whose backward pass is 3 times faster."""
    if not x.requires_grad:
        return F.interpolate(x, size, mode="nearest")
    batch, channels, h, w = x.shape
    cells = x[:, :, :, None, :, None].expand(-1, -1, -1, size[0] // h, -1, size[1] // w)
    return cells.reshape(batch, channels, *size)


class SpatialNorm(nn.Module):
    """GroupNorm, scaled and shifted at every position by what the codes are there."""

    def __init__(self, channels: int, zq_channels: int):
        super().__init__()
        self.norm_layer = GroupNorm(channels)
        self.conv_y = nn.Conv2d(zq_channels, channels, 1)
        self.conv_b = nn.Conv2d(zq_channels, channels, 1)

    def forward(self, x: Tensor, zq: Tensor, *, silu: bool = False) -> Tensor:
        # a 1x1 convolution and nearest resizing commute, and the codes' grid is the cheaper place for the first
        scale, shift = (nearest(conv(zq), x.shape[2:]) for conv in (self.conv_y, self.conv_b))
        y = torch.addcmul(shift, self.norm_layer(x), scale)
        return F.silu(y, inplace=True) if silu else y


class PixelEncoder(Encoder):
    """(B, 3, H, W) -> (B, z, H / 16, W / 16) with five levels."""

    def __init__(self, sizes: ConvSizes):
        super().__init__(sizes, Downsample)

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk(x)
        z = self.conv_out.out_channels
        return self.conv_out(h) + h.unflatten(1, (z, -1)).mean(2)


class PixelDecoder(Decoder):
    """(B, z, h, w) and zq (B, zq, h, w) -> (B, 3, 16 h, 16 w) with five levels."""

    def __init__(self, sizes: ConvSizes, zq_channels: int):
        super().__init__(sizes, Upsample, partial(SpatialNorm, zq_channels=zq_channels))

    def forward(self, z: Tensor, zq: Tensor | None = None) -> Tensor:
        h = self.conv_in(z)
        return self.trunk(h + z.repeat_interleave(h.shape[1] // z.shape[1], dim=1), zq)
