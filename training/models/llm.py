"""The Chameleon language model: a decoder that normalises queries and keys.

Samples are packed: one sequence of T tokens holds whole samples one after another, without padding, and
attention stays inside each sample.

Legend: T packed tokens, C hidden size, H heads, K key/value heads, D head size, M MLP size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from training.models.attention import Spans, packed_attention
from vistoken.errors import UserError

# `packed_attention` to new tokens, whose keys and values one layer of a cache then keeps, and to those before
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LLMConfig:
    """The sizes in a model folder's `config.json`; the defaults are those of the 7B model."""

    vocab_size: int = 65536
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise UserError(
                f"config.json: hidden_size {self.hidden_size} is not {self.num_attention_heads} heads of an even size"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"config.json: num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def rotary_angles(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(T,) positions -> cosines and sines, each (T, 1, D) float32, for `rotate`."""
    steps = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None].float() * theta ** (-steps / head_dim)  # (T, D/2)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding over the whole head, halves paired (Su et al., 2021). x is (T, H, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class HeadNorm(nn.Module):
    """LayerNorm over each head, one set of weights for all; stored as (model_parallel_size, D) = (1, D)."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, head_dim))
        self.bias = nn.Parameter(torch.zeros(1, head_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight[0], self.bias[0], eps=1e-5)


class Attention(nn.Module):
    def __init__(self, config: LLMConfig):
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        self.head_dim = d
        self.q_proj = nn.Linear(c, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(c, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(c, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, c, bias=False)
        self.q_norm = HeadNorm(d)
        self.k_norm = HeadNorm(d)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spans: Spans, attend: Attend | None = None
    ) -> torch.Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        attended = attend(q, k, v) if attend else packed_attention(q, k, v, spans)
        return self.o_proj(attended.flatten(-2))


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: LLMConfig, dropout: float):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spans: Spans, attend: Attend | None = None
    ) -> torch.Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, spans, attend))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Token embeddings, layers and the last norm: what checkpoints name `model.*`."""

    def __init__(self, config: LLMConfig, dropout: float):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, dropout) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor, cached: Sequence[Attend] | None = None
    ) -> torch.Tensor:
        """(T, C) embeddings, (T,) positions inside each sample, (samples,) lengths on CPU -> (T, C) hidden states.

        With `cached`, one a layer, the tokens go on from those that a cache holds.
        """
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        spans = Spans.of(lengths.tolist(), x.device)
        each: Sequence[Attend | None] = cached or [None] * len(self.layers)
        for layer, attend in zip(self.layers, each, strict=True):
            x = layer(x, cos, sin, spans, attend)
        return self.norm(x)
