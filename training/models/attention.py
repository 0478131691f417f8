"""Attention inside each of the samples of a packed sequence.

One call of PyTorch's variable-length kernel for all samples where there is one (CUDA, 16 bits), else one call of its
fused kernels a sample, or a single one where all samples are equally long. No (T, T) mask is ever built.

Legend: T packed tokens, H heads, K key/value heads, D head size.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from inspect import signature
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

CAUSAL: dict[str, Any] = {"window_size": (-1, 0)}
varlen_attn: Callable[..., Any] | None = None  # the parameters differ between releases
with suppress(ImportError):
    from torch.nn.attention import varlen  # PyTorch 2.10 and later

    varlen_attn = varlen.varlen_attn
    if "window_size" not in signature(varlen_attn).parameters:  # in its first release
        CAUSAL = {"is_causal": True}


class Spans(NamedTuple):
    """Where the samples of a packed sequence start, and as the last value where it ends."""

    bounds: torch.Tensor  # (samples + 1,) int32 on CPU
    on_device: torch.Tensor  # the same beside the tokens
    ruler: torch.Tensor  # as long as the longest sample, one number in memory: compiled layers take a size that
    # changes from batch to batch, while for another number they would be compiled again

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> "Spans":
        """For samples of these sizes. Nothing here waits for the device."""
        bounds = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
        ruler = torch.zeros(1, dtype=torch.int32).expand(max(sizes))
        return cls(bounds, bounds.to(device, non_blocking=True), ruler)


def varlen_takes(q: torch.Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, *, causal: bool = True
) -> torch.Tensor:
    """q is (T, H, D), k and v are (T, K, D). Returns (T, H, D)."""
    if varlen_attn and varlen_takes(q):
        if q.shape[1] != k.shape[1]:  # the flag for fewer key/value heads is younger than the function
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        bounds, longest = spans.on_device, spans.ruler.shape[0]
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, **(CAUSAL if causal else {}))
    if torch.compiler.is_compiling():  # the number of samples changes with every batch: the loop stays out of the graph
        return _opaque_attention(q, k, v, spans.bounds, causal)
    return attention_by_sample(q, k, v, spans.bounds, causal)


def attention_by_sample(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, causal: bool
) -> torch.Tensor:
    attend = partial(F.scaled_dot_product_attention, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    sizes = bounds.diff().tolist()
    if len(set(sizes)) == 1:
        q, k, v = (x.unflatten(0, (len(sizes), -1)).transpose(1, 2) for x in (q, k, v))  # (samples, H, length, D)
        return attend(q, k, v).transpose(1, 2).flatten(0, 1)
    outputs = []
    for parts in zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in parts)  # (1, H, length, D)
        outputs.append(attend(q, k, v)[0].transpose(0, 1))
    return torch.cat(outputs)


@torch.library.custom_op("vistoken::packed_attention", mutates_args=())
def _opaque_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, causal: bool
) -> torch.Tensor:
    """`attention_by_sample` as one node of a compiled graph. Its forward runs once more in the backward pass."""
    return attention_by_sample(q, k, v, bounds, causal).contiguous()


@_opaque_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, causal: bool) -> torch.Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("vistoken::packed_attention_backward", mutates_args=())
def _opaque_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes, group = bounds.diff().tolist(), q.shape[1] // k.shape[1]
    found = []
    for part in zip(*(x.split(sizes) for x in (grad, q, k, v)), strict=True):
        of_output, *inputs = (x.transpose(0, 1).float() for x in part)
        found.append(_backward_of_sample(of_output, *inputs, group=group, causal=causal))
    of_q, of_k, of_v = (
        torch.cat([x.transpose(0, 1) for x in column]).to(q.dtype) for column in zip(*found, strict=True)
    )
    return of_q, of_k, of_v


def _backward_of_sample(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, group: int, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v of one sample, all (heads, length, D). Autograd does not reach into an operation."""
    k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    scale, length = q.shape[-1] ** -0.5, q.shape[1]
    scores = q @ k.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    shares = scores.softmax(-1)
    slopes = grad @ v.mT
    slopes = shares * (slopes - (shares * slopes).sum(-1, keepdim=True)) * scale
    of_kv = (x.unflatten(0, (-1, group)).sum(1) for x in (slopes.mT @ q, shares.mT @ grad))
    return slopes @ k, *of_kv


@_opaque_backward.register_fake
def _(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_opaque_backward(grad, *ctx.saved_tensors, ctx.causal), None, None


_opaque_attention.register_autograd(_backward, setup_context=_save)
