"""Start a Chameleon VQGAN as a linear autoencoder of the training pictures.

Drawn at random, a VQGAN spends its first hours on finding out where in a cell a colour lies: its decoder repeats every
cell four times, and only differences between neighbours tell the copies apart. What it finds at first is linear, and
that can be solved for. The encoder's downsampling becomes a PCA of 2 x 2 neighbours at every level, the decoder's
upsampling the 3 x 3 convolution that comes closest to the encoder's components of the finer level, by least squares.

All this runs along the shortcuts, in the first channels of every level. Residual branches add nothing yet, and the
other channels stay as drawn. A norm and a SiLU stand before each half's last convolution. They pass x on unchanged
where a group of channels holds x, -x and large constants: silu(t) - silu(-t) = t, and the constants fix the scale.

Legend: B pictures, C channels, k components, h w a level's height and width.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_tokenizer.models.chameleon.vqgan import ChameleonVQGAN
from vision_tokenizer.models.layers import GroupNorm, Level
from vistoken.errors import UserError

PIXELS = 8_000_000  # to look at
KEPT = 0.75  # of a level's channels: so many carry components
LARGE = 6.0  # the constants of a group; what it carries has a variance of 1 or less


class Components(NamedTuple):
    """What a level carries: `values` (B, k, h, w) of unit variance, and what they were divided by, `spread` (k,)."""

    values: Tensor
    spread: Tensor


@torch.no_grad()
def start_linear(model: ChameleonVQGAN, batches: Iterable[Tensor]) -> None:
    """Set the weights of `model` by pictures (B, 3, H, W) in [-1, 1]. Raises `UserError` if it is too narrow."""
    pictures: list[Tensor] = []
    for batch in batches:
        pictures.append(batch.float())
        if sum(picture[:, 0].numel() for picture in pictures) >= PIXELS:
            break
    pixels = torch.cat(pictures)
    levels = set_encoder(model, Components(pixels, pixels.new_ones(3)))
    set_decoder(model, levels)


def set_encoder(model: ChameleonVQGAN, pixels: Components) -> list[Components]:
    """Returns the components of every level; the last has as many as a code is wide, strongest first."""
    encoder, width = model.encoder, model.quant_conv.out_channels
    levels = [pixels]
    carrier = encoder.conv_in
    _pass_on(carrier, 3)
    *finer, last = cast("Iterable[Level]", encoder.down)
    for level in finer:
        _pass_on_level(level, len(levels[-1].spread))
        carrier = cast("nn.Conv2d", level.downsample.conv)
        levels.append(_principal(carrier, levels[-1], int(KEPT * carrier.out_channels)))
    if len(levels[-1].spread) < width or encoder.conv_out.out_channels < width:
        raise UserError(f"linear_start: embed_dim {width} is more than z_channels or the last level can carry")
    values, spread = levels[-1]
    levels[-1] = Components(values[:, :width], spread[:width])
    carrier = _pass_on_level(last, len(spread)) or carrier
    _pass_on(model.quant_conv, width)
    gain = _unit(spread[:width])
    _through_norm(carrier, encoder.norm_out, encoder.conv_out, gain, lambda: encoder(pixels.values[:32]))
    return levels


def set_decoder(model: ChameleonVQGAN, levels: list[Components]) -> None:
    decoder = model.decoder
    found, spread = levels[-1]
    _pass_on(model.post_quant_conv, len(spread))
    _pass_on(decoder.conv_in, len(spread))
    decoder.conv_in.weight[: len(spread)] /= _unit(spread)[:, None, None, None]
    first, *coarser = cast("Iterable[Level]", decoder.up)
    for level, target in zip(reversed(coarser), reversed(levels[:-1]), strict=True):
        _pass_on_level(level, found.shape[1])
        carrier = cast("nn.Conv2d", level.upsample.conv)
        found = _closest(carrier, found, target.values[:, : carrier.out_channels])
    carrier = _pass_on_level(first, 3) or carrier
    features = levels[-1].values[:32] * _unit(spread)[:, None, None]
    gain, norm = spread.new_ones(3), cast("GroupNorm", decoder.norm_out)
    _through_norm(carrier, norm, decoder.conv_out, gain, lambda: decoder(model.post_quant_conv(features)))


def _unit(spread: Tensor) -> Tensor:
    """(k,) -> (k,) with a mean square of 1: so much of each component is in a code, whose error is the picture's."""
    return spread / spread.square().mean().sqrt()


def _pass_on(conv: nn.Conv2d, count: int) -> None:
    """The first `count` channels leave `conv` as they came."""
    if count > (room := min(conv.in_channels, conv.out_channels)):
        raise UserError(f"linear_start: {count} components do not fit {room} channels: raise ch")
    middle = conv.kernel_size[0] // 2
    conv.weight[:count] = 0
    conv.weight[range(count), range(count), middle, middle] = 1
    cast("Tensor", conv.bias)[:count] = 0


def _pass_on_level(level: Level, count: int) -> nn.Conv2d | None:
    """The convolution that the level's shortcut ends with, if it has one."""
    last = None
    for block in level.block:
        if block.widens:
            last = cast("nn.Conv2d", block.nin_shortcut)
            _pass_on(last, count)
    return last


def _principal(conv: nn.Conv2d, finer: Components, most: int) -> Components:
    """Make `conv`, of stride 2, the PCA of 2 x 2 neighbours; returns the up to `most` strongest components."""
    width = len(finer.spread)
    cells = F.pixel_unshuffle(finer.values * finer.spread[:, None, None], 2)  # (B, 4 C, h / 2, w / 2)
    rows = cells.permute(0, 2, 3, 1).flatten(0, 2)
    mean = rows.mean(0)
    rows = rows - mean
    variances, directions = torch.linalg.eigh((rows.T.double() @ rows.double()) / len(rows))
    keep = min(most, 4 * width)
    spread = variances.flip(0)[:keep].clamp_min(1e-12).sqrt().float()
    directions = directions.flip(1)[:, :keep].float() / spread  # (4 C, k)
    values = (rows @ directions).unflatten(0, (len(cells), *cells.shape[2:])).permute(0, 3, 1, 2)
    conv.weight[:keep] = 0
    conv.weight[:keep, :width, :2, :2] = directions.T.unflatten(1, (width, 2, 2)) * finer.spread[:, None, None]
    cast("Tensor", conv.bias)[:keep] = -mean @ directions
    return Components(values, spread)


def _closest(conv: nn.Conv2d, coarse: Tensor, wanted: Tensor) -> Tensor:
    """Make `conv`, which follows a doubling of h and w, come closest to `wanted`; returns how close it comes."""
    count, width = wanted.shape[1], coarse.shape[1]
    products = torch.zeros(9 * width + 1, 9 * width + 1 + count, dtype=torch.float64, device=coarse.device)
    for some, target in zip(coarse.split(16), wanted.split(16), strict=True):
        windows = F.unfold(F.interpolate(some, scale_factor=2, mode="nearest"), 3, padding=1)  # (B, 9 C, h * w)
        windows = F.pad(windows, (0, 0, 0, 1), value=1.0).mT.flatten(0, 1)
        products += (windows.T @ torch.cat([windows, target.flatten(2).mT.flatten(0, 1)], 1)).double()
    squares, targets = products.split([9 * width + 1, count], dim=1)
    squares.diagonal().add_(1e-4 * squares.diagonal().mean())
    solved = torch.linalg.solve(squares, targets).T.float()  # (k, 9 C + 1)
    conv.weight[:count] = 0
    conv.weight[:count, :width] = solved[:, :-1].unflatten(1, (width, 3, 3))
    cast("Tensor", conv.bias)[:count] = solved[:, -1]
    weight, bias = conv.weight[:count, :width], cast("Tensor", conv.bias)[:count]
    doubled = (F.interpolate(some, scale_factor=2, mode="nearest") for some in coarse.split(16))
    return torch.cat([F.conv2d(some, weight, bias, padding=1) for some in doubled])


def _through_norm(carrier: nn.Conv2d, norm: GroupNorm, out: nn.Conv2d, gain: Tensor, run: Callable[[], Tensor]) -> None:
    """Bring the first channels of `carrier` through norm and SiLU to `out`, each `gain` (k,) times as large.

    `run` calls the network on pictures, to see by what each group is divided.
    """
    groups, each = norm.num_groups, norm.num_channels // norm.num_groups
    pairs = -(-len(gain) // groups)  # in a group
    if 4 * pairs > each:
        raise UserError(
            f"linear_start: {len(gain)} components need {4 * pairs} channels in each of {groups} groups, "
            f"ch * ch_mult gives {each}: raise ch, or change num_groups"
        )
    weight, bias = carrier.weight.clone(), cast("Tensor", carrier.bias)
    offset = bias.clone()
    for group in range(groups):
        constants = slice(group * each + 2 * pairs, group * each + 4 * pairs)
        carrier.weight[constants] = 0
        bias[constants] = LARGE * torch.tensor([1.0, -1.0] * pairs, device=bias.device)
    plus = torch.tensor([(j % groups) * each + 2 * (j // groups) for j in range(len(gain))], device=bias.device)
    for channels, sign in ((plus, 1), (plus + 1, -1)):
        carrier.weight[channels] = sign * weight[: len(gain)]
        bias[channels] = sign * offset[: len(gain)]
    entering: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    run()
    hook.remove()
    divisor = entering[0].unflatten(1, (groups, each)).var((2, 3, 4), correction=0).mean(0).sqrt()
    middle = out.kernel_size[0] // 2
    out.weight[: len(gain)] = 0
    for channels, sign in ((plus, 1), (plus + 1, -1)):
        out.weight[range(len(gain)), channels, middle, middle] = sign * gain * divisor[plus // each]
    cast("Tensor", out.bias)[: len(gain)] = 0
