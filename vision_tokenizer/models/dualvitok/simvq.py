"""The SimVQ quantizer (arXiv 2411.02038): the codebook is a fixed random one times a trained matrix.

At inference the product is a constant, which `prepare` computes; in training it moves with every step.

Legend: K codes, d code width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_tokenizer.models.nearest import nearest_codes
from vistoken.device import at_least_float32

COMMITMENT = 0.25  # weight of the term that moves features to their rows, beside the one that moves rows


@dataclass(frozen=True)
class QuantizerSizes:
    codebook_size: int
    dim: int


class Quantized(NamedTuple):
    """What training needs of a batch of features (..., d)."""

    values: Tensor  # (..., d), the rows of the codes, with the features' gradient
    codes: Tensor  # (...) int64
    loss: Tensor  # scalar


def straight_through(features: Tensor, rows: Tensor) -> Tensor:
    """`rows`, whose gradient reaches the features as if nothing had been replaced."""
    return features + (rows - features).detach()


def rotation_trick(features: Tensor, rows: Tensor) -> Tensor:
    """`rows`, as a rotation and scaling of the features that is constant for the gradient (arXiv 2410.06424)."""
    with torch.no_grad():
        feature_norm = features.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        row_norm = rows.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        u, v = features / feature_norm, rows / row_norm
        middle = u + v
        middle = middle / middle.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        scale = row_norm / feature_norm
    along_middle = (features * middle).sum(-1, keepdim=True)
    along_u = (features * u).sum(-1, keepdim=True)
    return scale * (features - 2 * along_middle * middle + 2 * along_u * v)


def codebook_loss(features: Tensor, rows: Tensor, commitment: float = COMMITMENT) -> Tensor:
    """Rows move towards the features and, `commitment` times as much, features towards their rows."""
    return F.mse_loss(rows, features.detach()) + commitment * F.mse_loss(features, rows.detach())


class SimVQ(nn.Module):
    """Always fp32. For `encode` and `decode`, call `prepare` once after the weights are in."""

    frozen_codebook: Tensor
    codebook: Tensor
    half_norms: Tensor

    def __init__(self, sizes: QuantizerSizes):
        super().__init__()
        self.register_buffer("frozen_codebook", torch.empty(sizes.codebook_size, sizes.dim))
        self.code_transform = nn.Linear(sizes.dim, sizes.dim, bias=False)
        self.register_buffer("codebook", torch.empty(sizes.codebook_size, sizes.dim), persistent=False)
        self.register_buffer("half_norms", torch.empty(sizes.codebook_size), persistent=False)

    @torch.no_grad()
    def prepare(self) -> None:
        """Compute the codebook, in fp64 so that every machine rounds to the same one."""
        codebook = self.frozen_codebook.double() @ self.code_transform.weight.double().T
        self.codebook = codebook.float()
        self.half_norms = (codebook.square().sum(1) / 2).float()

    def encode(self, features: Tensor) -> Tensor:
        """(..., d) -> (...) int64 codes."""
        return nearest_codes(features, self.codebook, self.half_norms)

    def decode(self, codes: Tensor) -> Tensor:
        """(...) codes -> (..., d) fp32."""
        return self.codebook[codes]

    def forward(self, features: Tensor, rotation: bool = False, commitment: float = COMMITMENT) -> Quantized:
        """Quantize with gradients, by the codebook of the present weights; `prepare` plays no part.

        Autocast is off in here: a codebook rounded to bf16 would give other codes than inference does.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = at_least_float32(features)
            with torch.no_grad():
                codebook = self.code_transform(self.frozen_codebook)
                codes = nearest_codes(features, codebook, codebook.square().sum(1) / 2)
            rows = self.code_transform(self.frozen_codebook[codes])
            values = (rotation_trick if rotation else straight_through)(features, rows)
            return Quantized(values, codes, codebook_loss(features, rows, commitment))
