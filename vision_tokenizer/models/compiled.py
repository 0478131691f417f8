"""Compiling a tokenizer's encoder, so that what is element by element becomes part of fewer passes over memory."""

from collections.abc import Iterable

import torch
from torch import nn

from vistoken.errors import UserError


def compile_modules(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Kernels of its own for every resolution: codes must not depend on which one came first.

    On a GPU kernels are tried out, and the fastest stays; which one that is may differ from process to process, and its
    results in the last bit. So trying out is switched off, module by module: PyTorch takes back what the configuration
    says of it with the first that is compiled. Raises `UserError` for a PyTorch that cannot.
    """
    import torch._inductor.config as inductor  # takes seconds

    can = hasattr(inductor, "deterministic")
    if device.type == "cuda" and not can:
        raise UserError("--compile needs PyTorch 2.10 or later on a GPU: earlier ones choose kernels by timing them")
    torch._dynamo.config.cache_size_limit = 64  # beyond it, further resolutions would not be compiled
    for module in modules:
        module.compile(dynamic=False, options={"deterministic": True} if can else None)
