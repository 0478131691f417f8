"""The Chameleon VQGAN (arXiv 2405.09818), a VQGAN as in arXiv 2012.09841: one grid of codes, 16 x 16 pixels each.

Attribute names are those of the published checkpoint, so that it loads strictly.

Legend: B batch, C channels, H W pixels or a level's height and width, h w the code grid, d code width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_tokenizer.models import fused
from vision_tokenizer.models.compiled import compile_modules
from vision_tokenizer.models.layers import ConvSizes, Decoder, Encoder, GroupNorm
from vision_tokenizer.models.nearest import nearest_codes
from vistoken.device import choose_dtype, float32_products, keep_freed_memory, local_device
from vistoken.errors import UserError
from vistoken.files import read_yaml
from vistoken.store import Location, location
from vistoken.weights import fingerprint, load_strict, read_state_dict

ENCODING = ("encoder.", "quant_conv.", "quantize.")
DECODING = ("decoder.", "post_quant_conv.")
TRAINING = ("loss.", "model_ema.", "discriminator.", "perceptual_loss.")  # of no use here, ignored by name


@dataclass(frozen=True)
class VqganSizes:
    conv: ConvSizes
    n_embed: int
    embed_dim: int

    @property
    def side(self) -> int:
        """Pixels per code."""
        return 2 ** (len(self.conv.ch_mult) - 1)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2), padded on the right and at the bottom only."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Codebook(nn.Module):
    """Call `prepare` once after the weights are in; always fp32."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        # without random values: drawing them on the meta device imports torch's compiler, which takes seconds
        self.embedding = nn.Embedding.from_pretrained(torch.empty(size, dim))
        self.register_buffer("half_norms", torch.empty(size), persistent=False)

    @torch.no_grad()
    def prepare(self) -> None:
        self.embedding.float()
        self.half_norms = (self.embedding.weight.double().square().sum(1) / 2).float()

    def encode(self, features: Tensor) -> Tensor:
        """(..., d) -> (...) int64 codes."""
        return nearest_codes(features, self.embedding.weight, self.half_norms)

    def decode(self, codes: Tensor) -> Tensor:
        """(...) codes -> (..., d) fp32."""
        return self.embedding(codes)


class ChameleonVQGAN(nn.Module):
    """An `ImageTokenizer`. `load_chameleon` makes one that is ready for use."""

    name = "chameleon"
    branches = ("image",)

    def __init__(self, sizes: VqganSizes, *, decoder: bool):
        super().__init__()
        self.encoder = Encoder(sizes.conv, Downsample)
        self.quant_conv = nn.Conv2d(sizes.conv.z_channels, sizes.embed_dim, 1)
        self.quantize = Codebook(sizes.n_embed, sizes.embed_dim)
        if decoder:
            self.post_quant_conv = nn.Conv2d(sizes.embed_dim, sizes.conv.z_channels, 1)
            self.decoder = Decoder(sizes.conv, Upsample, partial(GroupNorm, num_groups=sizes.conv.num_groups))
        self.has_decoder = decoder
        self.side = sizes.side
        self.codebook_sizes = (sizes.n_embed,)
        self.fingerprint = ""  # set where the weights come in
        self.tf32 = False

    @property
    def device(self) -> torch.device:
        return self.quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    def grid_sizes(self, height: int, width: int) -> tuple[tuple[int, int]]:
        """(h, w) of the codes of an H x W image."""
        if height % self.side or width % self.side or min(height, width) < self.side:
            raise ValueError(f"{height} x {width}: both sides must be multiples of {self.side}")
        return ((height // self.side, width // self.side),)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor]:
        """(B, 3, H, W) float32 in [-1, 1] -> codes (B, h, w) int64."""
        self.grid_sizes(*pixels.shape[2:])
        return (self.quantize.encode(self.features(pixels)),)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, d), what the codebook sees."""
        pixels = pixels.to(self.device, non_blocking=True).to(self.dtype, memory_format=torch.channels_last)
        with float32_products(tf32=self.tf32):
            return self.quant_conv(self.encoder(pixels)).permute(0, 2, 3, 1)

    @torch.no_grad()
    def decode(self, grids: tuple[Tensor, ...]) -> Tensor:
        """Codes (B, h, w) -> (B, 3, H, W) float32, nominally [-1, 1] but not clamped."""
        if not self.has_decoder:
            raise UserError("this Chameleon VQGAN was loaded for encoding only; load it with decoder=True to decode")
        rows = self.quantize.decode(grids[0].to(self.device)).to(self.dtype)
        with float32_products(tf32=self.tf32):
            return self.decoder(self.post_quant_conv(rows.permute(0, 3, 1, 2))).float().contiguous()


def read_sizes(path: Location) -> VqganSizes:
    """Sizes from a `vqgan.yaml`. Raises `UserError`, which names the file and the field."""
    if not path.exists():
        raise UserError(f"{path}: no such file; its folder must hold vqgan.yaml and vqgan.ckpt")
    content = read_yaml(path, "VQGAN config")
    try:
        params = content["model"]["params"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not the YAML of a VQGAN: it has no model.params") from error
    return sizes_of(params, path)


def sizes_of(params: Any, source: str | Location) -> VqganSizes:
    """Sizes from what a `vqgan.yaml` has under model.params. Raises `UserError`, which blames `source`."""
    try:
        conv = params["ddconfig"]
        resolution, mults = int(conv["resolution"]), tuple(int(mult) for mult in conv["ch_mult"])
        by_resolution = {resolution // 2**i: i for i in range(len(mults))}  # attention is listed by resolution
        sizes = ConvSizes(
            ch=int(conv["ch"]),
            ch_mult=mults,
            num_res_blocks=int(conv["num_res_blocks"]),
            attn_levels=tuple(by_resolution[r] for r in conv["attn_resolutions"] if r in by_resolution),
            z_channels=int(conv["z_channels"]),
            num_groups=int(conv.get("num_groups", 32)),  # our own key: a small VQGAN needs fewer
        )
        for width in sizes.widths:
            if sizes.num_groups < 1 or width % sizes.num_groups:
                raise UserError(
                    f"{source}: ddconfig: ch * ch_mult is {width}, which {sizes.num_groups} groups of normalisation "
                    "cannot share: make it a multiple, or set num_groups"
                )
        _require_plain(source, conv)
        return VqganSizes(sizes, n_embed=int(params["n_embed"]), embed_dim=int(params["embed_dim"]))
    except KeyError as error:
        raise UserError(f"{source}: has no {error} under model.params; it is no VQGAN config") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{source}: not the YAML of a VQGAN: {error}") from error


def _require_plain(path: str | Location, conv: Mapping[str, Any]) -> None:
    for key, only in (("double_z", False), ("in_channels", 3), ("out_ch", 3)):
        if conv.get(key, only) != only:
            raise UserError(f"{path}: model.params.ddconfig.{key} must be {only}, found {conv[key]!r}")


def load_chameleon(
    folder: str | Location,
    *,
    device: str | torch.device = "auto",
    dtype: str = "fp32",
    decoder: bool = False,
    compile: bool = False,
) -> ChameleonVQGAN:
    """The VQGAN of a folder's `vqgan.yaml` and `vqgan.ckpt`, on its device and in its dtype. Raises `UserError`."""
    folder = location(folder).expanduser()
    target, kind, sizes = local_device(device), choose_dtype(dtype), read_sizes(folder / "vqgan.yaml")
    if target.type == "cpu":
        keep_freed_memory()
    checkpoint = folder / "vqgan.ckpt"
    state = read_state_dict(checkpoint)
    with torch.device("meta"):
        model = ChameleonVQGAN(sizes, decoder=decoder).eval().requires_grad_(False)
    load_strict(model, state, source=checkpoint, ignore=TRAINING if decoder else (*TRAINING, *DECODING))
    encoding = {name: tensor for name, tensor in state.items() if name.startswith(ENCODING)}
    model.fingerprint = fingerprint(encoding, str(sizes))
    model.tf32 = dtype == "tf32"
    model.quantize.prepare()
    fused.prepare(target, kind)
    for part in model.children():
        if part is model.quantize:
            part.to(target)  # stays fp32
        else:
            part.to(target, kind).to(memory_format=torch.channels_last)
    if compile:
        compile_modules([model.encoder], target)
    return model
