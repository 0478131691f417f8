"""Cross-entropy and z-loss straight from hidden states, without the logits of the whole batch.

Legend: N positions with a label, C hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 1 << 28  # fp32 logits that exist at once, 1 GiB: 4096 positions at 65,536 words


class _LinearLoss(torch.autograd.Function):
    """Sums over positions, with the gradients made on the way forward.

    Going chunk by chunk and taking each chunk's gradient while its logits are there costs three matrix products
    instead of the four of recomputation, and sums the weight's gradient in fp32 whatever its dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_weight: float, masked: range | None
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        sums = hidden.new_zeros(2, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        size = max(CHUNK // len(weight), 1)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            h, target = hidden[rows], targets[rows, None]
            logits = F.linear(h, weight).float()  # (size, V)
            if masked is not None:
                logits[:, masked.start : masked.stop] = torch.finfo(logits.dtype).min
            lse = logits.logsumexp(-1, keepdim=True)
            sums += torch.stack(((lse - logits.gather(1, target)).sum(), lse.square().sum()))
            if grad_hidden is None and grad_weight is None:
                continue
            # d/dlogits of (lse - logit[target]) + z * lse^2
            slope = logits.sub_(lse).exp_().mul_(1 + 2 * z_weight * lse)
            slope = slope.scatter_add_(1, target, torch.full_like(lse, -1)).to(h.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = slope @ weight
            if grad_weight is not None:
                grad_weight += slope.T @ h
        ctx.grads, ctx.weight_dtype = (grad_hidden, grad_weight), weight.dtype
        ctx.mark_non_differentiable(sums)
        return sums[0] + z_weight * sums[1], sums

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None  # scaled in place, so there is no second backward pass
        if grad_hidden is not None:
            grad_hidden = (grad_hidden.float() * grad_total).to(grad_hidden.dtype)  # 1 / labels is no 16-bit number
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def linear_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_weight: float, masked: range | None = None
) -> tuple[Tensor, Tensor]:
    """Loss of the words that `hidden @ weight.T` predicts.

    hidden is (N, C), weight (V, C), targets (N,) word ids. Returns the sum over positions of
    cross-entropy + z_weight * logsumexp^2, which carries the gradient, and a (2,) tensor of the two sums,
    cross-entropy and unweighted logsumexp^2, which does not. `masked` words get the dtype's minimum as logit.
    """
    return _LinearLoss.apply(hidden, weight, targets, z_weight, masked)


class Head(nn.Linear):
    """The layer that gives words: their loss where there are targets, else their logits.

    Calling it, instead of reading its weight, is what makes its shards come together under FSDP.
    """

    def forward(
        self, input: Tensor, targets: Tensor | None = None, z_weight: float = 0.0, masked: range | None = None
    ) -> Any:
        if targets is None:
            return super().forward(input)
        return linear_loss(input, self.weight, targets, z_weight, masked)
