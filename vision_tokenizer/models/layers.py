"""The convolutional autoencoder that both tokenizers vary: VQGAN's (arXiv 2012.09841) residual blocks and attention.

MoVQGAN and Chameleon differ in three places, which are passed in: the norm, the down- and the upsampling.
Norms are called with (x, zq) and whether SiLU follows; a plain one ignores zq. Attribute names are those of the
published checkpoints. Without gradients, activations are overwritten in place.

Legend: B batch, C channels, H W pixels or the level's height and width, N = H * W.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_tokenizer.models import fused

Norm = Callable[[int], nn.Module]  # channels -> module called with (x, zq, silu=...)
Resample = Callable[[int], nn.Module]  # channels -> module from C channels to C channels


@dataclass(frozen=True)
class ConvSizes:
    """Sizes of an encoder or a decoder; level i has width ch * ch_mult[i], level 0 at full resolution."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_levels: tuple[int, ...]
    z_channels: int
    num_groups: int = 32  # of the plain norms; with as many groups as channels a norm loses a level's mean colour

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.ch * mult for mult in self.ch_mult)


class GroupNorm(nn.GroupNorm):
    """Group normalisation in channels-last layout whose statistics hold for flat images too.

    PyTorch's CPU kernel for this layout adds up one element after the other and subtracts the square of the mean,
    which on an image of a single colour leaves nothing of the variance. Here values are centred first. Its kernel for
    the ordinary layout has no such flaw and comes with a backward pass, so training takes that one.
    """

    def __init__(self, channels: int, num_groups: int = 32):
        super().__init__(num_groups, channels, eps=1e-6)

    def forward(self, x: Tensor, zq: Tensor | None = None, *, silu: bool = False) -> Tensor:
        """(B, C, H, W) -> the same, with SiLU after the norm if asked for."""
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            y = F.group_norm(x.contiguous(), self.num_groups, self.weight, self.bias, self.eps)
        elif fused.serves(x):
            return torch.ops.vistoken.group_norm(x, self.weight, self.bias, self.num_groups, self.eps, silu)
        else:
            y = self._centred(x)
        return F.silu(y, inplace=True) if silu else y

    def _centred(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        mean = rows.mean((1, 2), dtype=torch.float32)  # (B, C)
        pivot = mean.to(x.dtype)
        centred = rows - pivot[:, None, None]
        rest = mean - pivot.float()  # what a 16-bit pivot leaves
        power = centred.float().square().mean((1, 2)) - rest.square()  # squares of fp16 could overflow
        groups = mean.unflatten(1, (self.num_groups, -1))  # (B, groups, C / groups)
        offset = groups - groups.mean(2, keepdim=True)
        variance = (power.view_as(groups) + offset.square()).mean(2, keepdim=True)
        scale = (variance + self.eps).rsqrt() * self.weight.float().view(self.num_groups, -1)
        shift = (offset - rest.view_as(groups)) * scale + self.bias.float().view(self.num_groups, -1)
        scale, shift = (term.flatten(1)[:, None, None] for term in (scale, shift))
        if x.is_cuda:  # compiled, or without our kernels: one pass in fp32
            y = torch.addcmul(shift, centred, scale, out=centred)
        else:
            y = centred.mul_(scale.to(x.dtype)).add_(shift.to(x.dtype))
        return y.permute(0, 3, 1, 2)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, norm: Norm):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.widens = in_channels != out_channels

    def forward(self, x: Tensor, zq: Tensor | None = None) -> Tensor:
        h = self.conv1(self.norm1(x, zq, silu=True))
        h = self.conv2(self.norm2(h, zq, silu=True))
        return h.add_(self.nin_shortcut(x) if self.widens else x)


class AttnBlock(nn.Module):
    """Full self-attention over a level's positions, one head."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, zq: Tensor | None = None) -> Tensor:
        h = self.norm(x, zq)
        q, k, v = (conv(h).flatten(2).mT.unsqueeze(1) for conv in (self.q, self.k, self.v))  # (B, 1, N, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj_out(h.squeeze(1).mT.reshape(x.shape)).add_(x)


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level has it."""

    def __init__(self, widths: Sequence[int], attention: bool, norm: Norm):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b, norm) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(width, norm) for width in widths[1:] if attention)

    downsample: nn.Module  # of an encoder's levels
    upsample: nn.Module  # of a decoder's

    def forward(self, x: Tensor, zq: Tensor | None = None) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x, zq)
            if self.attn:
                x = self.attn[i](x, zq)
        return x


class Mid(nn.Module):
    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, norm)
        self.attn_1 = AttnBlock(channels, norm)
        self.block_2 = ResnetBlock(channels, channels, norm)

    def forward(self, x: Tensor, zq: Tensor | None = None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, zq), zq), zq)


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, z, h, w); every level but the last is followed by `downsample`, which halves H and W."""

    def __init__(self, sizes: ConvSizes, downsample: Resample):
        super().__init__()
        widths, last = sizes.widths, len(sizes.widths) - 1
        norm = partial(GroupNorm, num_groups=sizes.num_groups)
        self.conv_in = nn.Conv2d(3, sizes.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(pairwise((sizes.ch, *widths))):
            level = Level([before, *[width] * sizes.num_res_blocks], i in sizes.attn_levels, norm)
            level.downsample = downsample(width) if i < last else nn.Identity()
            self.down.append(level)
        self.mid = Mid(widths[-1], norm)
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], sizes.z_channels, 3, padding=1)

    def trunk(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w), all but the last convolution."""
        x = self.conv_in(x)
        for level in cast("Iterable[Level]", self.down):
            x = level.downsample(level(x))
        return self.norm_out(self.mid(x), silu=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.trunk(x))


class Decoder(nn.Module):
    """(B, z, h, w) -> (B, 3, H, W); every level but 0, the last, is followed by `upsample`, which doubles H and W."""

    def __init__(self, sizes: ConvSizes, upsample: Resample, norm: Norm):
        super().__init__()
        widths = sizes.widths
        self.conv_in = nn.Conv2d(sizes.z_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], norm)
        self.up = nn.ModuleList()
        for i, (width, before) in enumerate(pairwise((*widths, widths[-1]))):
            level = Level([before, *[width] * (sizes.num_res_blocks + 1)], i in sizes.attn_levels, norm)
            level.upsample = upsample(width) if i > 0 else nn.Identity()
            self.up.append(level)
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def trunk(self, x: Tensor, zq: Tensor | None = None) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W), all but the first convolution."""
        x = self.mid(x, zq)
        for level in reversed(cast("Sequence[Level]", self.up)):
            x = level.upsample(level(x, zq))
        return self.conv_out(self.norm_out(x, zq, silu=True))

    def forward(self, z: Tensor, zq: Tensor | None = None) -> Tensor:
        return self.trunk(self.conv_in(z), zq)
