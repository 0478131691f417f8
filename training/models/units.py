"""Models by their layers, and what is done to each of these: recomputing its activations, and compiling it."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

ATTENTION = (  # whose results `selective` keeps, by the name of the operation
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_varlen_attn",
    "packed_attention",
)
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class LayeredModel(nn.Module):
    """A model that is trained on packed batches, its layers one by one."""

    def units(self) -> list[nn.Module]:
        """The layers: what is compiled, recomputed and sharded on its own."""
        raise NotImplementedError

    def ends(self) -> list[nn.Module]:
        """The large modules before and after the layers, which are sharded on their own, too."""
        raise NotImplementedError


def recompute(unit: nn.Module, *, selective: bool) -> None:
    """Do not keep the unit's activations for the backward pass, but compute them again there.

    `selective` keeps the results of attention and of every second matrix product: more memory, half of the extra work.
    """
    forward = unit.forward
    options: dict[str, Any] = {"context_fn": _selective} if selective else {}

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    unit.forward = run


def compile_unit(unit: nn.Module, backend: str = "inductor") -> None:
    """Compile a unit for any number of tokens and samples.

    Around the recomputation, so that forward and recomputation are one graph; and inside of what FSDP does before and
    after a unit, so that no collective is in a graph. What changes from batch to batch is marked: left to itself, the
    compiler takes sizes that happen to be equal in the first batch to be the same.
    """
    compiled = torch.compile(unit.forward, backend=backend)

    def run(*args: Any, **kwargs: Any) -> Any:
        for tensor in tree_leaves([args, kwargs]):
            if isinstance(tensor, torch.Tensor):
                last = max(tensor.ndim - 1, 1)  # the width, which never changes
                torch._dynamo.maybe_mark_dynamic(tensor, [n for n, size in enumerate(tensor.shape[:last]) if size > 1])
        return compiled(*args, **kwargs)

    unit.forward = run


def _selective() -> tuple[AbstractContextManager, AbstractContextManager]:
    products = {False: 0, True: 0}  # of the forward pass and of the recomputation, where they come in the same order

    def policy(context: SelectiveCheckpointContext, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = operation.__name__.split(".")[0] in ATTENTION
        if operation in PRODUCTS:
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 0
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
