"""The training forward of both tokenizers: pixels in, reconstruction and the quantizers' losses out.

The networks are those of inference; what differs is that gradients pass through the codes.

Legend: B batch, H W pixels, h w a code grid, C width of the semantic target.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vision_tokenizer.models.chameleon.vqgan import ChameleonVQGAN, Codebook
from vision_tokenizer.models.dualvitok.model import DualViTok, join_branches
from vision_tokenizer.models.dualvitok.semantic import CELL, vit_input
from vision_tokenizer.models.dualvitok.simvq import Quantized, SimVQ, codebook_loss, straight_through
from vision_tokenizer.models.nearest import nearest_codes


@dataclass(frozen=True)
class CodeDropping:
    """Of every chosen image, codes are replaced at random: "noise injection" of the published training."""

    rate: float = 0.0  # of the codes of a chosen image
    image_rate: float = 0.1  # of the images
    noise: str = "random"  # or "zero"


@dataclass(frozen=True)
class QuantizerOptions:
    rotation_trick: bool = True
    commitment: float = 0.25
    weight: float = 1.0  # of the quantizer's whole loss


@dataclass
class Outputs:
    reconstruction: Tensor  # (B, 3, H, W), not clamped
    codebook_losses: dict[str, Tensor]  # branch -> scalar
    codes: dict[str, Tensor]  # branch -> (B, h, w)
    semantic: Tensor | None = None  # (B, h, w, C), what the semantic codes say of the target
    target: Tensor | None = None  # (B, h, w, C), constant
    features: dict[str, Tensor] = field(default_factory=dict)  # branch -> (B, h, w, d), before quantizing


class TrainableDualViTok(nn.Module):
    """`model` with a training forward; its ViT is frozen."""

    last_layer = "pixel_decoder.conv_out.weight"
    convolutional = ("pixel_encoder", "pixel_decoder")  # nearly all of the time
    encoding = ("semantic_encoder", "semantic_quantizer", "pixel_encoder", "pixel_quant_conv", "pixel_quantizer")

    def __init__(self, model: DualViTok, dropping: CodeDropping, semantic: QuantizerOptions, pixel: QuantizerOptions):
        super().__init__()
        self.model, self.dropping = model, dropping
        self.options = {"semantic": semantic, "pixel": pixel}
        model.semantic_encoder.model.requires_grad_(False)

    def features(self, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What each quantizer sees, (B, h, w, d), and the semantic target (B, h, w, C), a constant."""
        model = self.model
        with torch.no_grad():
            image = vit_input(pixels)
            target = model.semantic_encoder.target(image)
        height, width = image.shape[2] // CELL, image.shape[3] // CELL
        features = {
            "semantic": model.semantic_encoder.features(target, height, width),
            "pixel": model.pixel_quant_conv(model.pixel_encoder(pixels)).permute(0, 2, 3, 1),
        }
        return features, target.unflatten(1, (height, width))

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Outputs:
        """`keep` (B, 1, h, w) says which pixel codes stay; drawn here if code dropping is on and none is given."""
        model = self.model
        features, target = self.features(pixels)
        semantic = self._quantize("semantic", features["semantic"])
        pixel = self._quantize("pixel", features["pixel"])
        values = pixel.values
        if self.dropping.rate:
            keep = draw_kept(values, self.dropping) if keep is None else keep
            values = dropped(values, keep, self.dropping.noise)
        zq = join_branches(semantic.values, values)
        return Outputs(
            reconstruction=model.pixel_decoder(model.pixel_post_quant_conv(zq), zq),
            codebook_losses={
                name: self.options[name].weight * found.loss
                for name, found in zip(features, (semantic, pixel), strict=True)
            },
            codes={"semantic": semantic.codes, "pixel": pixel.codes},
            semantic=model.semantic_decoder(semantic.values),
            target=target,
            features=features,
        )

    def quantizer(self, branch: str) -> SimVQ:
        return self.model.semantic_quantizer if branch == "semantic" else self.model.pixel_quantizer

    def _quantize(self, branch: str, features: Tensor) -> Quantized:
        options = self.options[branch]
        return self.quantizer(branch)(features, rotation=options.rotation_trick, commitment=options.commitment)


def draw_kept(values: Tensor, dropping: CodeDropping) -> Tensor:
    """(B, h, w, d) -> (B, 1, h, w) of 0 and 1: one draw per image and one per code."""
    batch, height, width, _ = values.shape
    image = torch.rand(batch, 1, 1, 1, device=values.device) > dropping.image_rate
    code = torch.rand(batch, 1, height, width, device=values.device) > dropping.rate
    return (image | code).to(values.dtype)


def dropped(values: Tensor, keep: Tensor, noise: str) -> Tensor:
    """Codes that are not kept become those of the previous image of the batch at the same place, or zeros."""
    keep = keep.permute(0, 2, 3, 1)
    other = values.detach().roll(1, 0) if noise == "random" else torch.zeros_like(values)
    return values * keep + other * (1 - keep)


class TrainableVqgan(nn.Module):
    """Chameleon's VQGAN with a training forward: rows of the codebook are trained themselves."""

    last_layer = "decoder.conv_out.weight"
    convolutional = ("encoder", "decoder")
    encoding = ("encoder", "quant_conv", "quantize")

    def __init__(self, model: ChameleonVQGAN):
        super().__init__()
        self.model = model
        self.options = QuantizerOptions()
        model.quantize.embedding.weight.requires_grad_(True)

    def quantizer(self, branch: str) -> Codebook:
        return self.model.quantize

    def features(self, pixels: Tensor) -> tuple[dict[str, Tensor], None]:
        return {"image": self.model.quant_conv(self.model.encoder(pixels)).permute(0, 2, 3, 1)}, None

    def forward(self, pixels: Tensor) -> Outputs:
        model = self.model
        (features,) = self.features(pixels)[0].values()
        with torch.autocast(pixels.device.type, enabled=False):
            codebook = model.quantize.embedding.weight
            wide = features.to(codebook.dtype)
            with torch.no_grad():
                codes = nearest_codes(wide, codebook, codebook.square().sum(1) / 2)
            rows = model.quantize.embedding(codes)
            loss = self.options.weight * codebook_loss(wide, rows, self.options.commitment)
            values = straight_through(wide, rows)
        return Outputs(
            reconstruction=model.decoder(model.post_quant_conv(values.permute(0, 3, 1, 2))),
            codebook_losses={"image": loss},
            codes={"image": codes},
            features={"image": features},
        )


Trainable = TrainableDualViTok | TrainableVqgan
