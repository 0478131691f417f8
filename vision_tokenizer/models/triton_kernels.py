"""Element-wise work of the encoders on a GPU, in Triton: memory is what it waits for, so each byte comes and goes once.

Every block adds up in one order whatever the batch, and nothing is chosen by timing: an image's result depends neither
on its neighbours nor on its place. Sums are fp32. `fused.py` says when these stand in for the plain formulas.

Legend: B batch, P pixels of an image, C channels, G groups, T tiles of pixels, N tokens, D width of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS, CHANNELS = 128, 64  # of a tile, which one block holds in registers
TILES = 64  # whose moments are joined at once
ELEMENTS = 1024
EXACT = {"enable_fp_fusion": False}  # a product is rounded before it is added to, as in the plain formulas


@triton.jit
def _tile_moments(x, means, deviations, pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Each channel's mean over a tile, and its sum of squared deviations from it: (B, P, C) -> (B, T, C) twice."""
    tile, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    pixel = tile * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (pixel < pixels) & (channel < channels)
    value = tl.load(x + (image * pixels + pixel) * channels + channel, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(pixels - tile * PIXELS, PIXELS).to(tl.float32)
    mean = tl.sum(value, 0, keep_dims=True) / count
    mean += tl.sum(tl.where(inside, value - mean, 0.0), 0, keep_dims=True) / count  # what the first sum rounded away
    centred = tl.where(inside, value - mean, 0.0)
    place = (image * tl.num_programs(0) + tile) * channels + channel
    tl.store(means + place, mean, mask=channel < channels)
    tl.store(deviations + place, tl.sum(centred * centred, 0, keep_dims=True), mask=channel < channels)


@triton.jit
def _group_moments(
    means,
    deviations,
    moments,
    pixels,
    tiles,
    width,
    eps,
    PIXELS: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Mean and 1 / standard deviation of each group of `width` channels: (B, T, C) twice -> (B, G, 2)."""
    group, groups, image = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    channel, size = tl.arange(0, WIDTH)[None, :], tl.cast(pixels * width, tl.float32)  # to Triton, 1 is a constant
    start = image * tiles * groups * width + group * width + channel

    total, first = tl.zeros((TILES, WIDTH), tl.float32), 0
    while first < tiles:
        tile = first + tl.arange(0, TILES)[:, None]
        inside = (tile < tiles) & (channel < width)
        count = tl.minimum(pixels - tile * PIXELS, PIXELS).to(tl.float32)
        total += count * tl.load(means + start + tile * groups * width, mask=inside, other=0.0)
        first += TILES
    middle = tl.sum(tl.sum(total, 0), 0) / size

    squares, rest, first = tl.zeros((TILES, WIDTH), tl.float32), tl.zeros((TILES, WIDTH), tl.float32), 0
    while first < tiles:
        tile = first + tl.arange(0, TILES)[:, None]
        inside = (tile < tiles) & (channel < width)
        count = tl.minimum(pixels - tile * PIXELS, PIXELS).to(tl.float32)
        away = tl.load(means + start + tile * groups * width, mask=inside, other=middle) - middle
        within = tl.load(deviations + start + tile * groups * width, mask=inside, other=0.0)
        squares += within + count * away * away
        rest += count * away
        first += TILES
    off = tl.sum(tl.sum(rest, 0), 0) / size  # what rounding left between the middle and the mean
    variance = tl.sum(tl.sum(squares, 0), 0) / size - off * off
    place = moments + (image * groups + group) * 2
    tl.store(place, middle + off)
    tl.store(place + 1, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _normalise(
    x,
    y,
    moments,
    weight,
    bias,
    pixels,
    channels,
    groups,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """(B, P, C) -> (B, P, C), by the moments of each group, then `weight`, `bias` and perhaps SiLU."""
    image = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    there = channel < channels
    moment = moments + (image * groups + channel // (channels // groups)) * 2
    mean = tl.load(moment, mask=there, other=0.0)
    scale = tl.load(moment + 1, mask=there, other=0.0) * tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    place, inside = (image * pixels + pixel) * channels + channel, (pixel < pixels) & there
    value = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean) * scale + shift
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(x, y, cos, sin, tokens, stride, heads, half: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Turn (x[i], x[i + half]) in every head of one token; half is D / 2, and tokens begin `stride` apart."""
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside, angle, place = (head < heads) & (pair < half), (token % tokens) * half + pair, head * 2 * half + pair
    cosine = tl.load(cos + angle, mask=pair < half, other=0.0)
    sine = tl.load(sin + angle, mask=pair < half, other=0.0)
    x += token * stride + place
    y += token * heads * 2 * half + place
    first = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(y, (first * cosine - second * sine).to(y.dtype.element_ty), mask=inside)
    tl.store(y + half, (second * cosine + first * sine).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _quick_gelu(x, y, count, ELEMENTS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    value = tl.load(x + place, mask=place < count, other=0.0).to(tl.float32)
    tl.store(y + place, (value / (1.0 + tl.exp(-1.702 * value))).to(y.dtype.element_ty), mask=place < count)


@torch.library.custom_op("vistoken::group_norm", mutates_args=())
def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """Group norm, then SiLU if asked for: (B, C, H, W) -> the same in `x`'s dtype, channels-last."""
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    tiles, width = triton.cdiv(pixels, PIXELS), channels // groups
    grid = tiles, triton.cdiv(channels, CHANNELS), batch
    means, deviations = x.new_empty((2, batch, tiles, channels), dtype=torch.float32)
    moments, y = x.new_empty((batch, groups, 2), dtype=torch.float32), torch.empty_like(x)
    joined = PIXELS, TILES, triton.next_power_of_2(width)
    tile = {"PIXELS": PIXELS, "CHANNELS": CHANNELS, "num_warps": 8, **EXACT}
    with torch.cuda.device_of(x):
        _tile_moments[grid](x, means, deviations, pixels, channels, **tile)
        _group_moments[groups, batch](means, deviations, moments, pixels, tiles, width, eps, *joined, **EXACT)
        _normalise[grid](x, y, moments, weight, bias, pixels, channels, groups, silu, **tile)
    return y


@torch.library.custom_op("vistoken::rotate", mutates_args=())
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: (B, N, 2, heads, D), and (N, D / 2) fp32 twice -> (B, N, 2, heads, D) in `x`'s dtype."""
    batch, tokens, two, heads, width = x.shape
    if x.stride(0) != tokens * x.stride(1) or x.stride()[2:] != (heads * width, width, 1):
        x = x.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    powers = triton.next_power_of_2(two * heads), triton.next_power_of_2(width // 2)
    with torch.cuda.device_of(x):
        _rotate[batch * tokens,](x, y, cos, sin, tokens, x.stride(1), two * heads, width // 2, *powers, **EXACT)
    return y


@torch.library.custom_op("vistoken::quick_gelu", mutates_args=())
def quick_gelu(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _quick_gelu[triton.cdiv(x.numel(), ELEMENTS),](x, y, x.numel(), ELEMENTS, **EXACT)
    return y


@group_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@quick_gelu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
