"""DualViTok's semantic branch (ILLUME+, arXiv 2504.01934): what an image shows, on a coarse grid.

Attribute names are those of the published checkpoint.

Legend: B batch, H W pixels, h w the code grid, n = h * w tokens, C width, z code width.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_tokenizer.models.dualvitok.vit import (
    MERGE,
    PATCH,
    Block,
    Rotary,
    VisionTransformer,
    VitSizes,
    raster_positions,
    rotary_table,
)
from vistoken.device import at_least_float32

CELL = MERGE * PATCH  # pixels of the ViT's input per code
HEADS = 16  # of the blocks after the ViT and in the decoder, whatever the ViT has
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# (height, width) of an image -> of the ViT's input, where that is not simply floored to multiples of 28
VIT_INPUT = {
    (256, 256): (252, 252),
    (512, 512): (504, 504),
    (512, 384): (448, 336),
    (384, 512): (336, 448),
    (768, 384): (728, 364),
    (384, 768): (364, 728),
    (1024, 256): (1008, 252),
    (256, 1024): (252, 1008),
    (384, 576): (336, 504),
    (576, 384): (504, 336),
    (960, 320): (924, 308),
    (320, 960): (308, 924),
}


@dataclass(frozen=True)
class SemanticEncoderSizes:
    vit: VitSizes
    num_blocks: int
    embed_dim: int
    z_channels: int
    proj_layer: str


@dataclass(frozen=True)
class SemanticDecoderSizes:
    z_channels: int
    num_blocks: int
    embed_dim: int
    output_channels: int
    proj_layer: str


def vit_input_size(height: int, width: int) -> tuple[int, int]:
    floored = (max(height // CELL, 1) * CELL, max(width // CELL, 1) * CELL)
    return VIT_INPUT.get((height, width), floored)


@lru_cache  # a copy to a GPU at every batch would wait for it
def clip_statistics(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, dtype=dtype).view(3, 1, 1).to(device) for values in (CLIP_MEAN, CLIP_STD))
    return mean, std


def vit_input(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> the ViT's normalised input, resized and in fp32 whatever the model's dtype."""
    size = vit_input_size(*pixels.shape[2:])
    image = (at_least_float32(pixels) + 1) / 2
    image = F.interpolate(image, size, mode="bicubic", align_corners=False, antialias=True)
    mean, std = clip_statistics(image.device, image.dtype)
    return (image.clamp_(0, 1) - mean) / std


PROJECTIONS = {
    "linear": lambda width, out: nn.Sequential(nn.Linear(width, out)),
    "norm_linear": lambda width, out: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out)),
    "linear_norm": lambda width, out: nn.Sequential(nn.Linear(width, out), nn.LayerNorm(out)),
    "mlp": lambda width, out: nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out)),
}


def grid_rotary(height: int, width: int, embed_dim: int, device: torch.device) -> Rotary:
    return rotary_table(raster_positions(height, width, device), embed_dim // HEADS)


class SemanticEncoder(nn.Module):
    def __init__(self, sizes: SemanticEncoderSizes):
        super().__init__()
        self.model = VisionTransformer(sizes.vit)
        self.proj_in = nn.Conv2d(sizes.vit.hidden_size, sizes.embed_dim, 1)
        self.blocks = nn.ModuleList(Block(sizes.embed_dim, HEADS, mlp_ratio=4) for _ in range(sizes.num_blocks))
        self.proj_out = PROJECTIONS[sizes.proj_layer](sizes.embed_dim, sizes.z_channels)

    def target(self, image: Tensor) -> Tensor:
        """The ViT's input -> (B, n, hidden_size), the ViT's output as its codes are trained to restore it."""
        merged = self.model(image)
        return F.layer_norm(merged, merged.shape[-1:], eps=1e-6)

    def forward(self, image: Tensor) -> Tensor:
        """The ViT's input (B, 3, 28 h, 28 w), see `vit_input` -> features (B, h, w, z)."""
        return self.features(self.target(image), image.shape[2] // CELL, image.shape[3] // CELL)

    def features(self, target: Tensor, height: int, width: int) -> Tensor:
        """What `target` gives (B, n, hidden_size) -> (B, height, width, z)."""
        x = F.linear(target, self.proj_in.weight.flatten(1), self.proj_in.bias)
        rotary = grid_rotary(height, width, x.shape[-1], x.device)
        for block in self.blocks:
            x = block(x, rotary)
        return self.proj_out(x).unflatten(1, (height, width))


class SemanticDecoder(nn.Module):
    def __init__(self, sizes: SemanticDecoderSizes):
        super().__init__()
        self.proj_in = nn.Linear(sizes.z_channels, sizes.embed_dim)
        self.blocks = nn.ModuleList(Block(sizes.embed_dim, HEADS, mlp_ratio=4) for _ in range(sizes.num_blocks))
        self.proj_out = PROJECTIONS[sizes.proj_layer](sizes.embed_dim, sizes.output_channels)

    def forward(self, rows: Tensor) -> Tensor:
        """Codebook rows (B, h, w, z) -> (B, h, w, output_channels), an estimate of the encoder's `target`."""
        _, height, width, _ = rows.shape
        x = self.proj_in(rows.flatten(1, 2).to(self.proj_in.weight.dtype))
        rotary = grid_rotary(height, width, x.shape[-1], x.device)
        for block in self.blocks:
            x = block(x, rotary)
        return self.proj_out(x).unflatten(1, (height, width))
