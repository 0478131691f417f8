"""Which device and how many threads this process may take for itself."""

import os

import torch

from vision_tokenizer.errors import UserError


def local_device(name: str) -> torch.device:
    """`cpu`, this process's own GPU for `cuda`, or the better of what there is for `auto`."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here. Use --device cpu, or install torch's CUDA build.")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise UserError(f"local rank {index} has no GPU of its own: only {torch.cuda.device_count()} are visible")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def default_workers() -> int:
    """Decoding threads: this process's share of the cores, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
