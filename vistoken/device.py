"""What this process computes with: device, threads, number formats, and how the C library treats freed memory."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vistoken.cli import BATCH_ON_CPU, BATCH_ON_GPU, MAX_WORKERS
from vistoken.errors import UserError, is_out_of_memory

# the names are those of cli.py; tf32 rounds the inputs of fp32 products on NVIDIA GPUs, elsewhere it computes as fp32
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
    index, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if visible == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        index = 0  # Slurm shows each of its processes its own GPU alone; those of one torchrun would all share it
    if index >= visible:
        raise UserError(f"local rank {index} has no GPU of its own: only {visible} are visible")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def default_batch_size(device: torch.device) -> int:
    return BATCH_ON_GPU if device.type == "cuda" else BATCH_ON_CPU


def default_workers() -> int:
    """Decoding threads: this process's share of the cores, at most `MAX_WORKERS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@contextmanager
def memory_named(device: torch.device, flag: str, size: int, what: str) -> Iterator[None]:
    """Turn a failed allocation into a `UserError` that names `flag`, its value `size`, and a smaller one to try.

    `what` says what there was no memory for, such as "32 images of 512 x 512".
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = f"Try {flag} {max(size // 2, 1)}." if size > 1 else f"{flag} is 1 already: it takes more memory."
        raise UserError(f"{device} has too little memory for {what}, with {flag} {size}. {advice}") from error


def device_facts(device: torch.device) -> dict[str, str]:
    """What of the machine may change the last bit of a result: two that differ in it may differ in codes.

    On a CPU that is its kind of instructions, which torch chooses its kernels by.
    """
    if device.type != "cuda":
        return {"type": device.type, "capability": torch.backends.cpu.get_cpu_capability()}
    return {
        "type": device.type,
        "name": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }


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
    """Compute fp32 matrix products and convolutions in IEEE fp32, or with TF32 inputs, and restore the setting.

    PyTorch 2.9 has a second set of switches, and raises where the first is read while the two disagree, as they do
    after transformers has used the second. So both are written, and the first is read only where there is no second.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches = [matmul, cudnn.conv, cudnn.rnn] if hasattr(cudnn, "conv") else []
    precisions = [switch.fp32_precision for switch in switches]
    first = [name == "tf32" for name in precisions[:2]] or [matmul.allow_tf32, cudnn.allow_tf32]

    def write(first: list[bool], precisions: list[str]) -> None:
        matmul.allow_tf32, cudnn.allow_tf32 = first
        for switch, precision in zip(switches, precisions, strict=True):
            switch.fp32_precision = precision

    write([tf32, tf32], ["tf32" if tf32 else "ieee"] * len(switches))
    try:
        yield
    finally:
        write(first, precisions)
