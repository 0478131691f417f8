"""What the tokenizers do on a GPU, without one: tensors that say they are on CUDA, and formulas that only run there."""

import pytest
import torch
import torch.nn.functional as F
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vision_tokenizer.models import layers
from vision_tokenizer.models.chameleon.vqgan import ChameleonVQGAN, VqganSizes
from vision_tokenizer.models.dualvitok import semantic
from vision_tokenizer.models.dualvitok.config import read_config
from vision_tokenizer.models.dualvitok.model import DualViTok, place
from vision_tokenizer.models.dualvitok.pixel import Downsample, PixelEncoder, Upsample
from vision_tokenizer.models.dualvitok.vit import Mlp, rotary_table, rotate, rotate_in_few_passes
from vision_tokenizer.models.layers import ConvSizes, GroupNorm

VIEWS = (
    "view _unsafe_view t transpose permute unsqueeze squeeze expand select slice unbind split split_with_sizes detach "
    "alias as_strided unflatten reshape _reshape_alias empty empty_like empty_strided new_empty lift_fresh device"
)
WAITS = frozenset(("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item"))
CHANNELS_LAST = torch.channels_last


class Log(TorchDispatchMode):
    """The kernels that run; operations that mix devices; operations that make the host wait for the GPU."""

    def __init__(self):
        super().__init__()
        self.kernels, self.mixed, self.waits, self.layouts = [], [], [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves([args, kwargs, result]) if isinstance(leaf, torch.Tensor)]
        if any(tensor.is_cuda for tensor in tensors):
            if name not in VIEWS.split():
                self.kernels.append(name)
            if name in WAITS or (name in ("_to_copy", "copy_") and not result.is_cuda):
                self.waits.append(name)
            if name not in ("_to_copy", "copy_") and any(not t.is_cuda and t.dim() for t in tensors):
                self.mixed.append(name)
            if name == "convolution" and args[0].dim() == 4 and args[0].shape[2] > 1:
                self.layouts.append(args[0].is_contiguous(memory_format=CHANNELS_LAST))
        return result


def on_cuda(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give a model parameters that say they are on a GPU: codebooks fp32, the rest in `dtype`, as `place` does."""
    for path, module in model.named_modules():
        kind = torch.float32 if "quantize" in path else dtype
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    layout = CHANNELS_LAST if tensor.dim() == 4 else torch.contiguous_format
                    empty = torch.empty(tensor.shape, dtype=kind, device="cuda", memory_format=layout)
                    is_buffer = store is module._buffers
                    store[name] = empty if is_buffer else torch.nn.Parameter(empty, requires_grad=False)
        if isinstance(module, Mlp):
            module.folded = True


def cuda_unshuffle(x, factor):
    """The kernel that CUDA uses: the one of `pixel_unshuffle` for a CPU keeps channels-last, this one does not."""
    unshuffle = torch.ops.aten.pixel_unshuffle.default
    return unshuffle._op_dk(DispatchKey.CompositeExplicitAutogradNonFunctional, x, factor)


def cuda_shuffle(x, factor):
    shuffle = torch.ops.aten.pixel_shuffle.default
    return shuffle._op_dk(DispatchKey.CompositeExplicitAutogradNonFunctional, x, factor)


@pytest.fixture
def cuda_kernels(monkeypatch):
    monkeypatch.setattr(F, "pixel_unshuffle", cuda_unshuffle)
    monkeypatch.setattr(F, "pixel_shuffle", cuda_shuffle)
    # asks for a cuDNN that is not here; this is what it answers where the input is channels-last
    monkeypatch.setattr(torch._C, "_conv_determine_backend_memory_format", lambda *_: CHANNELS_LAST)
    semantic._clip_statistics.cache_clear()
    yield
    semantic._clip_statistics.cache_clear()


def tokenizers(dualvitok_config):
    dualvitok = DualViTok(read_config(dualvitok_config), decoder=False)
    sizes = VqganSizes(ConvSizes(32, (1, 1, 2, 2, 4), 2, (), 32), n_embed=64, embed_dim=32)
    return {"dualvitok": (dualvitok, 1040), "chameleon": (ChameleonVQGAN(sizes, decoder=False), 730)}


@pytest.mark.parametrize("name", ["dualvitok", "chameleon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_encoding_on_cuda_mixes_no_devices_never_waits_and_keeps_its_layout(
    name, dtype, dualvitok_config, cuda_kernels
):
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model, budget = tokenizers(dualvitok_config)[name]
        on_cuda(model.eval(), dtype)
        pixels = torch.empty(2, 3, 64, 64, device="cuda")
        model.encode(pixels)  # what is made once, such as the statistics of CLIP's images
        with Log() as log:
            grids = model.encode(pixels)
    assert all(grid.device.type == "cuda" and grid.dtype == torch.int64 for grid in grids)
    assert not log.mixed and not log.waits
    assert log.layouts and all(log.layouts), "a convolution's input is not channels-last"
    assert len(log.kernels) <= budget, len(log.kernels)


def passes(work, *given) -> list[str]:
    """The kernels that read or write as much as the largest of `given` has."""

    class Large(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = [leaf for leaf in tree_leaves([args, kwargs, result]) if isinstance(leaf, torch.Tensor)]
            name = function.overloadpacket.__name__
            if name not in VIEWS.split() and any(tensor.numel() >= largest for tensor in tensors):
                kernels.append(name)
            return result

    kernels, largest = [], max(tensor.numel() for tensor in given if isinstance(tensor, torch.Tensor)) // 2
    with torch.no_grad(), Large():
        work(*given)
    return kernels


def test_passes_over_memory(cuda_kernels):
    """Element-wise kernels are half of the time in bf16, and each reads and writes gigabytes."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        norm, mlp = GroupNorm(64), Mlp(64, 256)
        for module in (norm, mlp):
            on_cuda(module, torch.bfloat16)
        rows = torch.empty(2, 64, 32, 32, dtype=torch.bfloat16, device="cuda").to(memory_format=CHANNELS_LAST)
        taken = passes(lambda x: F.silu(norm(x), inplace=True), rows)
        assert taken == ["mean", "sub", "linalg_vector_norm", "addcmul", "silu_"]
        tokens = torch.empty(8, 324, 64, dtype=torch.bfloat16, device="cuda")
        assert [name for name in passes(mlp, tokens) if name != "addmm"] == ["silu_"]
        heads = torch.empty(8, 324, 2, 4, 16, dtype=torch.bfloat16, device="cuda")
        table = torch.empty(324, 8, device="cuda")
        assert passes(rotate, heads, (table, table)) == ["mul", "addcmul"] * 2


@pytest.mark.parametrize("resample", [Downsample, Upsample])
def test_channels_last_is_kept_where_cuda_loses_it(resample, cuda_kernels):
    x = torch.randn(2, 8, 6, 6).to(memory_format=CHANNELS_LAST)
    plain = cuda_unshuffle(x, 2) if resample is Downsample else cuda_shuffle(x, 2)
    assert not plain.is_contiguous(memory_format=CHANNELS_LAST), "CUDA's kernel keeps the layout now"
    module = resample(8).to(memory_format=CHANNELS_LAST)
    assert module(x).is_contiguous(memory_format=CHANNELS_LAST)


def test_channels_last_is_kept_through_the_whole_encoder(cuda_kernels):
    seen = []
    encoder = PixelEncoder(ConvSizes(32, (1, 1, 2, 2, 4), 1, (4,), 32)).to(memory_format=CHANNELS_LAST).eval()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d | GroupNorm):
            module.register_forward_pre_hook(
                lambda module, args: seen.append(args[0].is_contiguous(memory_format=CHANNELS_LAST))
            )
    with torch.no_grad():
        encoder(torch.randn(1, 3, 64, 64).to(memory_format=CHANNELS_LAST))
    assert len(seen) > 20 and all(seen)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_rotary_in_few_passes_is_rotary(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 2, 3, 16, generator=generator, dtype=torch.float64).to(dtype)
    table = rotary_table(torch.randint(0, 9, (5, 2), generator=generator), 16)
    found = rotate_in_few_passes(x, table)
    assert found.dtype == dtype and torch.equal(found, rotate(x, table))
    cos, sin = (term.double()[:, None, None, :] for term in table)
    first, second = x.double().chunk(2, -1)
    wanted = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max()


def test_folded_weights_compute_the_quick_gelu():
    torch.manual_seed(0)
    mlp, x = Mlp(16, 64).double(), torch.randn(4, 16, dtype=torch.float64)
    with torch.no_grad():
        h = mlp.fc1(x)
        wanted = mlp.fc2(h * torch.sigmoid(1.702 * h))
        assert torch.allclose(mlp(x), wanted, rtol=0, atol=1e-14)
        mlp.fold()
        assert torch.allclose(mlp(x), wanted, rtol=0, atol=1e-14)


def test_weights_are_folded_on_a_gpu_only(dualvitok_config, monkeypatch):
    with torch.device("meta"):
        model = DualViTok(read_config(dualvitok_config), decoder=False).requires_grad_(False)
    model.to_empty(device="cpu")
    place(model, torch.device("cpu"), "fp32")
    assert not any(module.folded for module in model.modules() if isinstance(module, Mlp))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)  # the GPU is not there
    place(model, torch.device("cuda"), "bf16")
    assert all(module.folded for module in model.modules() if isinstance(module, Mlp))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("flat", [False, True], ids=["photo", "one colour but for a line"])
def test_group_norm_as_a_gpu_computes_it(dtype, tolerance, flat, monkeypatch):
    monkeypatch.setattr(layers, "_scaled", lambda rows, scale, shift: torch.addcmul(shift, rows, scale, out=rows))
    generator = torch.Generator().manual_seed(0)
    norm = GroupNorm(64).to(dtype).requires_grad_(False)
    torch.nn.init.normal_(norm.weight, generator=generator)
    x = torch.randn(2, 64, 24, 32, generator=generator) + 3 * torch.randn(2, 64, 1, 1, generator=generator)
    if flat:
        x = torch.full_like(x, 3.0) + torch.randn(2, 64, 1, 1, generator=generator)
        x[:, :, :3] += 0.25
    x = x.to(dtype, memory_format=CHANNELS_LAST)
    wanted = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    found = norm(x)
    assert found.is_contiguous(memory_format=CHANNELS_LAST) and found.dtype == dtype
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max()
