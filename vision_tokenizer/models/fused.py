"""Which GPUs compute the encoders' element-wise work with kernels of our own instead of the plain formulas.

Triton builds the kernels where they run, with a C compiler and Python's headers. So each GPU is tried once, before its
first batch: where they cannot be built, or give something else, the plain formulas stay.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from vistoken.cli import note

PLAIN = "plain"
KERNELS: dict[tuple[torch.device, torch.dtype], str] = {}  # what was decided: "Triton 3.6.0", say, or PLAIN


def serves(x: Tensor) -> bool:
    """Whether kernels stand in for the plain formulas on `x`. They have no backward pass; compilers make their own."""
    return (
        not torch.compiler.is_compiling()
        and KERNELS.get((x.device, x.dtype), PLAIN) != PLAIN
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def prepare(device: torch.device, dtype: torch.dtype) -> None:
    """Decide for a GPU and a number format, once, and say why the plain formulas stay where they do."""
    device = torch.empty(0, device=device).device  # with its number
    if device.type == "cuda" and (device, dtype) not in KERNELS:
        kernels, why_not = try_kernels(device, dtype)
        KERNELS[device, dtype] = kernels
        if why_not:
            note(f"{device}: {why_not}, so element-wise work stays with plain formulas, which are slower")


def kernel_facts(device: torch.device) -> dict[str, str]:
    """What a manifest says beside `device_facts`: kernels may change the last bit of a result."""
    decided = sorted({kernels for (of, _), kernels in KERNELS.items() if of == device})
    return {"kernels": ", ".join(decided)} if decided else {}


@contextmanager
def plain_formulas() -> Iterator[None]:
    """No kernels of our own meanwhile, to compare with."""
    kept = dict(KERNELS)
    KERNELS.clear()
    try:
        yield
    finally:
        KERNELS.update(kept)


def try_kernels(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """-> what to compute with, and why it is not Triton."""
    try:
        import triton
        from triton.errors import TritonError

        from vision_tokenizer.models import triton_kernels
    except ImportError:
        return PLAIN, "there is no Triton (pip install triton)"
    try:
        wrong = _disagreeing(triton_kernels, device, dtype)
    except (OSError, RuntimeError, subprocess.SubprocessError, TritonError) as error:
        return PLAIN, f"Triton cannot build kernels ({error})"
    if wrong:
        return PLAIN, f"Triton {triton.__version__} computes another {wrong}: please report it"
    return f"Triton {triton.__version__}", ""


def _disagreeing(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> str:
    """The first kernel whose results are not PyTorch's."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    image, weight, bias, heads, angles = drawn(2, 96, 20, 12), drawn(96), drawn(96), drawn(2, 5, 2, 3, 16), drawn(5, 8)
    image = image.to(memory_format=torch.channels_last)
    turned = torch.complex(*heads.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    found = {
        "group norm": kernels.group_norm(image.to(dtype), weight.to(dtype), bias.to(dtype), 32, 1e-6, True),
        "rotary embedding": kernels.rotate(heads.to(dtype), angles.cos(), angles.sin()),
        "quick GELU": kernels.quick_gelu(heads.to(dtype)),
    }
    wanted = {
        "group norm": F.silu(F.group_norm(image, 32, weight, bias, 1e-6)),
        "rotary embedding": torch.cat([turned.real, turned.imag], -1),
        "quick GELU": heads * torch.sigmoid(1.702 * heads),
    }
    near = 1e-5 if dtype == torch.float32 else 0.05
    return next((name for name in found if not torch.allclose(found[name].float(), wanted[name], near, near)), "")
