"""The Qwen2-VL vision transformer (arXiv 2409.12191), for batches of images of one size.

Attribute names are those of the published checkpoints.

Legend: B batch, H W pixels, N = (H / 14) * (W / 14) patches, n = N / 4 merged tokens, C width, D width of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_tokenizer.models import fused
from vistoken.device import at_least_float32

PATCH = 14
MERGE = 2  # a merged token is MERGE x MERGE patches
THETA = 1e4
Rotary = tuple[Tensor, Tensor]  # cosines and sines, (N, D / 2) each, fp32


@dataclass(frozen=True)
class VitSizes:
    depth: int
    embed_dim: int
    hidden_size: int  # of the merged tokens
    num_heads: int
    mlp_ratio: int


def rotary_table(positions: Tensor, head_dim: int) -> Rotary:
    """Angles of two-dimensional rotary embedding: the first D / 4 turn with the row, the others with the column.

    `positions` (N, 2), rows and columns.
    """
    frequencies = THETA ** (-torch.arange(0, head_dim // 2, 2, device=positions.device) / (head_dim // 2))
    angles = (positions[:, :, None] * frequencies).flatten(1)  # (N, D / 2)
    return angles.cos(), angles.sin()


def raster_positions(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 2) row and column of every cell, row after row."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.cartesian_prod(rows, columns)


def merge_order(grid: Tensor, height: int, width: int) -> Tensor:
    """(height * width, ...) in raster order -> 2 x 2 blocks in raster order, raster order inside a block."""
    blocks = grid.view(height // MERGE, MERGE, width // MERGE, MERGE, -1)
    return blocks.transpose(1, 2).reshape(grid.shape)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the pairs (x[i], x[i + D / 2]) of (B, N, 2, heads, D), in fp32."""
    if fused.serves(x):
        return torch.ops.vistoken.rotate(x, *rotary)
    cos, sin = (table[:, None, None, :] for table in rotary)
    first, second = at_least_float32(x).chunk(2, dim=-1)
    turned = (first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


class PatchEmbed(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv3d(3, width, (2, PATCH, PATCH), bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, 3 * 14 * 14) -> (B, N, C). A still image is two equal frames, so their weights add up."""
        return F.linear(patches, self.proj.weight.sum(2).flatten(1))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, D)
        q, k = rotate(qkv[:, :, :2], rotary).transpose(1, 3).unbind(2)  # (B, heads, N, D) each
        h = F.scaled_dot_product_attention(q, k, qkv[:, :, 2].transpose(1, 2))
        return self.proj(h.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        if fused.serves(h):
            return self.fc2(torch.ops.vistoken.quick_gelu(h))
        gate = torch.sigmoid_(1.702 * h)  # the quick form of GELU
        return self.fc2(gate * h if gate.requires_grad else gate.mul_(h))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, mlp_ratio * width)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    def __init__(self, width: int, out_width: int):
        super().__init__()
        joined = MERGE * MERGE * width
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(joined, joined), nn.GELU(), nn.Linear(joined, out_width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, n, out)."""
        return self.mlp(self.ln_q(x).unflatten(1, (-1, MERGE * MERGE)).flatten(2))


class VisionTransformer(nn.Module):
    def __init__(self, sizes: VitSizes):
        super().__init__()
        self.head_dim = sizes.embed_dim // sizes.num_heads
        self.patch_embed = PatchEmbed(sizes.embed_dim)
        self.blocks = nn.ModuleList(
            Block(sizes.embed_dim, sizes.num_heads, sizes.mlp_ratio) for _ in range(sizes.depth)
        )
        self.merger = PatchMerger(sizes.embed_dim, sizes.hidden_size)

    @staticmethod
    def patches(image: Tensor) -> Tensor:
        """(B, 3, H, W), sides multiples of 28 -> (B, N, 3 * 14 * 14) in the order that merging needs."""
        _, _, height, width = image.shape
        rows, columns = height // (MERGE * PATCH), width // (MERGE * PATCH)
        cut = image.unflatten(3, (columns, MERGE, PATCH)).unflatten(2, (rows, MERGE, PATCH))
        return cut.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(5).flatten(1, 4)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> (B, n, hidden_size), row after row."""
        height, width = image.shape[2] // PATCH, image.shape[3] // PATCH
        positions = merge_order(raster_positions(height, width, image.device), height, width)
        rotary = rotary_table(positions, self.head_dim)
        x = self.patch_embed(self.patches(image).to(self.patch_embed.proj.weight.dtype))
        for block in self.blocks:
            x = block(x, rotary)
        return self.merger(x)
