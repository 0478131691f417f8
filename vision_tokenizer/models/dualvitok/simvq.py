"""The SimVQ quantizer (arXiv 2411.02038) as it is at inference: a constant codebook.

Legend: K codes, d code width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vision_tokenizer.models.nearest import nearest_codes


@dataclass(frozen=True)
class QuantizerSizes:
    codebook_size: int
    dim: int


class SimVQ(nn.Module):
    """Call `prepare` once after the weights are in; always fp32."""

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
