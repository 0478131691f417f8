"""Our kernels without a GPU: computed step by step by Triton's interpreter, and built for the GPUs that people have."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

from vision_tokenizer.models import fused, triton_kernels  # noqa: E402
from vision_tokenizer.models.dualvitok.model import load_dualvitok  # noqa: E402
from vision_tokenizer.models.dualvitok.vit import rotary_table, rotate  # noqa: E402
from vision_tokenizer.models.layers import GroupNorm  # noqa: E402

CPU = torch.device("cpu")
NEAR = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
every_dtype = pytest.mark.parametrize("dtype", NEAR)


def image(*shape: int, dtype: torch.dtype = torch.float32, flat: bool = False) -> torch.Tensor:
    """Channels whose means differ more than their values; `flat`: of one colour but for a line."""
    generator = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(*shape[:2], 1, 1, generator=generator)
    x = torch.zeros(shape) if flat else torch.randn(shape, generator=generator)
    x[:, :, :3] += 0.25
    return (x + means).to(dtype, memory_format=torch.channels_last)


@every_dtype
@pytest.mark.parametrize("flat", [False, True], ids=["photo", "one colour but for a line"])
def test_group_norm_and_silu(dtype, flat):
    norm = GroupNorm(96, 8).requires_grad_(False)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    x = image(2, 96, 20, 9, dtype=dtype, flat=flat)  # two tiles of pixels, two of channels, each cut off
    wanted = F.silu(F.group_norm(x.double(), 8, norm.weight.double(), norm.bias.double(), norm.eps))
    found = triton_kernels.group_norm(x, norm.weight, norm.bias, 8, norm.eps, True)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    assert (found - wanted).abs().max() < NEAR[dtype] * wanted.abs().max()


def test_an_image_is_normalised_the_same_whatever_its_neighbours():
    x, weight, bias = image(3, 96, 20, 9), torch.ones(96), torch.zeros(96)
    together = triton_kernels.group_norm(x, weight, bias, 8, 1e-6, False)
    for place in range(3):
        assert torch.equal(
            together[place : place + 1], triton_kernels.group_norm(x[place:][:1], weight, bias, 8, 1e-6, False)
        )


@every_dtype
def test_rotary_embedding_and_quick_gelu(dtype):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 5, 3, 3, 20, generator=generator).to(dtype)
    table = rotary_table(torch.randint(0, 9, (5, 2), generator=generator), 20)
    for x in (qkv[:, :, :2], qkv[:, :, :2].contiguous(), qkv.transpose(0, 1)[:5, :, :2].transpose(0, 1)):
        found, wanted = triton_kernels.rotate(x, *table), rotate(x, table)
        assert found.dtype == dtype and torch.allclose(found, wanted, rtol=0, atol=4 * NEAR[dtype])
    wanted = qkv.double() * torch.sigmoid(1.702 * qkv.double())
    assert (triton_kernels.quick_gelu(qkv) - wanted).abs().max() < NEAR[dtype] * wanted.abs().max()


@pytest.mark.slow
def test_a_whole_encoder_with_our_kernels(tiny_dualvitok, monkeypatch):
    model, pixels = load_dualvitok(*tiny_dualvitok, device="cpu"), image(1, 3, 32, 32).clamp(-1, 1)
    with torch.no_grad():
        plain = model.semantic_features(pixels), model.pixel_features(pixels)
        monkeypatch.setitem(fused.KERNELS, (CPU, torch.float32), "Triton")
        found = model.semantic_features(pixels), model.pixel_features(pixels)
    for ours, wanted in zip(found, plain, strict=True):
        assert not torch.equal(ours, wanted), "the kernels were not asked"
        assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_kernels_are_tried_before_they_are_trusted(monkeypatch):
    assert fused.try_kernels(CPU, torch.float32) == (f"Triton {triton.__version__}", "")
    monkeypatch.setattr(triton_kernels, "rotate", lambda x, cos, sin: x)
    kernels, why_not = fused.try_kernels(CPU, torch.float32)
    assert kernels == "plain" and "computes another rotary embedding" in why_not

    def no_compiler(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton_kernels, "group_norm", no_compiler)
    kernels, why_not = fused.try_kernels(CPU, torch.float32)
    assert kernels == "plain" and "Failed to find C compiler" in why_not


def test_kernels_are_left_alone_where_gradients_or_other_numbers_are(monkeypatch):
    monkeypatch.setattr(fused, "KERNELS", {(CPU, torch.float32): "Triton", (CPU, torch.float16): "plain"})
    assert fused.serves(torch.ones(1)) and fused.kernel_facts(CPU) == {"kernels": "Triton, plain"}
    assert not fused.serves(torch.ones(1, dtype=torch.float16)) and not fused.serves(torch.ones(1, dtype=torch.float64))
    assert not fused.serves(torch.ones(1, requires_grad=True))
    with fused.plain_formulas():
        assert not fused.serves(torch.ones(1)) and fused.kernel_facts(CPU) == {}
    assert fused.serves(torch.ones(1))


LAUNCH = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from vision_tokenizer.models import triton_kernels

class Driver:  # builds for a GPU that is not there, and launches nothing
    def __init__(self, capability):
        self.utils = self
        self.launcher_cls = lambda source, metadata: lambda *given: print(metadata.name)
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device = self.get_current_stream = lambda *_: 0
        self.get_device_properties = lambda device: {"max_shared_mem": 163840}
        self.get_active_torch_device = lambda: torch.device("cpu")

    def load_binary(self, name, binary, shared, device):
        assert len(binary) > 1000
        return 0, 0, 64, 0, 1024

for capability, dtype in ((80, torch.bfloat16), (90, torch.float16), (90, torch.float32)):
    driver.set_active(Driver(capability))
    for channels, side in ((128, 32), (512, 8), (96, 7), (32, 1)):
        x, weight = torch.ones(2, channels, side, side, dtype=dtype), torch.ones(channels, dtype=dtype)
        triton_kernels.group_norm(x, weight, weight, 32, 1e-6, True)
    qkv = torch.ones(2, 9, 3, 16, 80, dtype=dtype)
    triton_kernels.rotate(qkv[:, :, :2], torch.ones(9, 40), torch.ones(9, 40))
    triton_kernels.quick_gelu(qkv)
"""


@pytest.mark.slow
def test_kernels_are_built_and_called_as_on_an_a100_and_an_h100(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", LAUNCH], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    group_norm = ["_tile_moments", "_group_moments", "_normalise"]
    assert done.stdout.split() == [*group_norm * 4, "_rotate", "_quick_gelu"] * 3
