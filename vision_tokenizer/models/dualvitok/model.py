"""DualViTok (ILLUME+, arXiv 2504.01934): two grids of codes per image, one of meaning and one of pixels.

Attribute names are those of the published checkpoint, so that it loads strictly.

Legend: B batch, H W pixels, h w a branch's code grid, d code width.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_tokenizer.models import fused
from vision_tokenizer.models.compiled import compile_modules
from vision_tokenizer.models.dualvitok.config import DualViTokSizes, read_config
from vision_tokenizer.models.dualvitok.pixel import PixelDecoder, PixelEncoder
from vision_tokenizer.models.dualvitok.semantic import CELL, SemanticDecoder, SemanticEncoder, vit_input, vit_input_size
from vision_tokenizer.models.dualvitok.simvq import SimVQ
from vistoken.cli import note
from vistoken.device import choose_dtype, float32_products, keep_freed_memory, local_device
from vistoken.errors import UserError
from vistoken.weights import fingerprint, load_strict, read_state_dict

SIDE = 16  # pixels per code of the pixel branch
ENCODING = ("semantic_encoder.", "semantic_quantizer.", "pixel_encoder.", "pixel_quant_conv.", "pixel_quantizer.")


def grid_sizes(height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(h, w) of the semantic and of the pixel codes of an H x W image."""
    if height % SIDE or width % SIDE or min(height, width) < SIDE:
        raise ValueError(f"{height} x {width}: both sides must be multiples of {SIDE}")
    vit_height, vit_width = vit_input_size(height, width)
    return (vit_height // CELL, vit_width // CELL), (height // SIDE, width // SIDE)


def join_branches(semantic: Tensor, pixel: Tensor) -> Tensor:
    """Codebook rows (B, h, w, d) of both branches -> what the decoder reads, (B, d + d', h, w) on the pixel grid."""
    semantic, pixel = semantic.permute(0, 3, 1, 2), pixel.permute(0, 3, 1, 2)
    semantic = F.interpolate(semantic, pixel.shape[2:], mode="bicubic", align_corners=False)
    return torch.cat([semantic, pixel], dim=1)


class DualViTok(nn.Module):
    """An `ImageTokenizer`. `load_dualvitok` makes one that is ready for use."""

    name = "dualvitok"
    branches = ("semantic", "pixel")

    def __init__(self, sizes: DualViTokSizes, *, decoder: bool):
        super().__init__()
        semantic, pixel = sizes.semantic_quantizer, sizes.pixel_quantizer
        self.semantic_encoder = SemanticEncoder(sizes.semantic_encoder)
        self.semantic_quantizer = SimVQ(semantic)
        self.pixel_encoder = PixelEncoder(sizes.pixel_encoder)
        self.pixel_quant_conv = nn.Conv2d(sizes.pixel_encoder.z_channels, pixel.dim, 1)
        self.pixel_quantizer = SimVQ(pixel)
        if decoder:
            joined = semantic.dim + pixel.dim
            self.semantic_decoder = SemanticDecoder(sizes.semantic_decoder)
            self.pixel_post_quant_conv = nn.Conv2d(joined, sizes.pixel_decoder.z_channels, 1)
            self.pixel_decoder = PixelDecoder(sizes.pixel_decoder, joined)
        self.has_decoder = decoder
        self.codebook_sizes = (semantic.codebook_size, pixel.codebook_size)
        self.fingerprint = ""  # set where the weights come in
        self.tf32 = False

    @property
    def device(self) -> torch.device:
        return self.pixel_quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pixel_quant_conv.weight.dtype

    def grid_sizes(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return grid_sizes(height, width)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) float32 in [-1, 1] -> semantic and pixel codes, (B, h, w) int64 each."""
        grid_sizes(*pixels.shape[2:])
        pixels = pixels.to(self.device, non_blocking=True)
        semantic, pixel = self.semantic_features(pixels), self.pixel_features(pixels)
        return self.semantic_quantizer.encode(semantic), self.pixel_quantizer.encode(pixel)

    def semantic_features(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, d), what the semantic quantizer sees."""
        with float32_products(tf32=self.tf32):
            return self.semantic_encoder(vit_input(pixels))

    def pixel_features(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, d), what the pixel quantizer sees."""
        pixels = pixels.to(self.dtype, memory_format=torch.channels_last)
        with float32_products(tf32=self.tf32):
            return self.pixel_quant_conv(self.pixel_encoder(pixels)).permute(0, 2, 3, 1)

    @torch.no_grad()
    def decode(self, grids: tuple[Tensor, ...]) -> Tensor:
        """Semantic and pixel codes -> (B, 3, H, W) float32, nominally [-1, 1] but not clamped."""
        self._require_decoder()
        zq = join_branches(*self._rows(grids)).to(self.dtype, memory_format=torch.channels_last)
        with float32_products(tf32=self.tf32):
            return self.pixel_decoder(self.pixel_post_quant_conv(zq), zq).float().contiguous()

    def _rows(self, grids: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Codes -> codebook rows, (B, h, w, d) fp32 each."""
        semantic, pixel = (grid.to(self.device) for grid in grids)
        return self.semantic_quantizer.decode(semantic), self.pixel_quantizer.decode(pixel)

    def _require_decoder(self) -> None:
        if not self.has_decoder:
            raise UserError("this DualViTok was loaded for encoding only; load it with decoder=True to decode")


def load_dualvitok(
    config: str | Path,
    checkpoint: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str = "fp32",
    use_ema: bool = False,
    decoder: bool = False,
    compile: bool = False,
) -> DualViTok:
    """A DualViTok with its weights, on its device and in its dtype (`fp32`, `tf32`, `bf16` or `fp16`).

    Without `decoder`, its 560 M parameters (at full size) are neither built nor read. Raises `UserError`.
    """
    target, sizes = local_device(device), read_config(config)
    choose_dtype(dtype)  # a wrong name is told before gigabytes are read
    if target.type == "cpu":
        keep_freed_memory()
    state = read_state_dict(checkpoint, use_ema=use_ema, keep=None if decoder else ENCODING)
    with torch.device("meta"):
        model = DualViTok(sizes, decoder=decoder).eval().requires_grad_(False)
    load_strict(model, state, source=checkpoint)
    encoding = {name: tensor for name, tensor in state.items() if name.startswith(ENCODING)}
    model.fingerprint = fingerprint(encoding, f"{sizes.semantic_encoder} {sizes.pixel_encoder}")
    heads = sizes.semantic_encoder.vit.num_heads
    note(f"DualViTok {model.fingerprint[:12]}: its config gives the ViT {heads} attention heads, which no weight tells")
    place(model, target, dtype)
    if compile:
        compile_encoder(model)
    return model


def place(model: DualViTok, device: torch.device, dtype: str) -> None:
    """Bring a loaded model to `device` and into `dtype`, pixel parts channels-last; codebooks stay fp32."""
    kind, model.tf32 = choose_dtype(dtype), dtype == "tf32"
    fused.prepare(device, kind)
    for name, part in model.named_children():
        if isinstance(part, SimVQ):
            part.prepare()
            part.to(device)
        elif name.startswith("pixel"):
            part.to(device, kind).to(memory_format=torch.channels_last)
        else:
            part.to(device, kind)


def compile_encoder(model: DualViTok) -> None:
    """Block by block in the semantic branch, since all blocks of a kind share what is compiled once."""
    blocks = (*model.semantic_encoder.model.blocks, *model.semantic_encoder.blocks)
    compile_modules((*blocks, model.pixel_encoder), model.device)
