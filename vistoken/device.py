"""What this process computes with: device, threads, number formats, and how the C library treats freed memory."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vistoken.errors import UserError

# tf32 rounds the inputs of fp32 products on NVIDIA GPUs; elsewhere it computes as fp32 does
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # from malloc.h


def local_device(name: str | torch.device) -> torch.device:
    """`cpu`, this process's own GPU for `cuda`, the better of what there is for `auto`; `cuda:1` means just that."""
    if isinstance(name, torch.device) or ":" in name:
        return torch.device(name)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise UserError(f"unknown device {name!r}: choose auto, cpu, cuda or, say, cuda:1")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here. Use --device cpu, or install torch's CUDA build.")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise UserError(f"local rank {index} has no GPU of its own: only {torch.cuda.device_count()} are visible")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def default_batch_size(device: torch.device) -> int:
    """One image fills a core, and its activations stay nearer to it; a GPU wants many."""
    return 32 if device.type == "cuda" else 1


def default_workers() -> int:
    """Decoding threads: this process's share of the cores, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def keep_freed_memory() -> None:
    """Have the C library reuse freed memory instead of giving it back to the system (Linux with glibc only).

    A model on a CPU allocates and frees the same tens of megabytes at every layer. By default each comes fresh from
    the system, page by page, which took a fifth of DualViTok's time at full size. The process keeps its peak memory.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # the arenas that threads get would be given back, so there is one arena for all
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def choose_dtype(name: str) -> torch.dtype:
    """The torch dtype of one of the names in `DTYPES`. Raises `UserError`."""
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """16-bit numbers widened to fp32; fp64, which checks against reference numbers compute in, stays."""
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Compute fp32 matrix products and convolutions in IEEE fp32, or with TF32 inputs, and restore the setting."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
