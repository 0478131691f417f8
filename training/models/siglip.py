"""SigLIP's vision tower (Zhai et al., 2023): images to a grid of continuous features.

Attribute names are the released checkpoint's. The pooling head is carried along, so that saved folders stay
complete, and never used: the features come from before it.

Legend: N images, P patches of an image (27 x 27), C width, H heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from training.models.attention import Spans, packed_attention


@dataclass(frozen=True)
class VisionConfig:
    """`vision_config` of a model folder; the defaults are so400m-patch14-384."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 384
    patch_size: int = 14

    @property
    def grid(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.patch_size


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.grid**2, config.hidden_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))  # (N, C, 27, 27)
        patches = patches.flatten(2).transpose(1, 2).flatten(0, 1).contiguous()
        return patches + self.position_embedding.weight.repeat(len(pixels), 1)  # (N * P, C)


class SelfAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, spans: Spans) -> torch.Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(packed_attention(q, k, v, spans, causal=False).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class EncoderLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)

    def forward(self, x: torch.Tensor, spans: Spans) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x), spans)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: torch.Tensor, images: int) -> torch.Tensor:
        """(N * P, C) -> (N * P, C): images follow one another as samples do in the language model."""
        spans = Spans.of([len(x) // images] * images, x.device)
        for layer in self.layers:
            x = layer(x, spans)
        return x


class PoolingHead(nn.Module):
    """Weights only; see the top of the file."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.mlp = MLP(config)


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.head = PoolingHead(config)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) uint8 tiles -> (N, P, C) features, the last layer's after its norm."""
        pixels = tiles.float() / 127.5 - 1  # mean and deviation 0.5
        x = self.encoder(self.embeddings(pixels), len(tiles))
        return self.post_layernorm(x).unflatten(0, (len(tiles), -1))
