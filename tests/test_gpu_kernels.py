"""What the tokenizers do on a GPU, without one: tensors that say they are on CUDA, and formulas that only run there."""

import pytest
import torch
import torch.nn.functional as F
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vision_tokenizer.models import fused
from vision_tokenizer.models.chameleon.vqgan import ChameleonVQGAN, VqganSizes
from vision_tokenizer.models.dualvitok import semantic
from vision_tokenizer.models.dualvitok.config import read_config
from vision_tokenizer.models.dualvitok.model import DualViTok
from vision_tokenizer.models.dualvitok.pixel import Downsample, PixelEncoder, Upsample
from vision_tokenizer.models.dualvitok.vit import Mlp, rotate
from vision_tokenizer.models.layers import ConvSizes, GroupNorm

VIEWS = (
    "view _unsafe_view t transpose permute unsqueeze squeeze expand select slice unbind split split_with_sizes detach "
    "alias as_strided unflatten reshape _reshape_alias empty empty_like empty_strided new_empty lift_fresh device"
)
WAITS = frozenset(("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item"))
LAUNCHES = {"group_norm": 3}  # where an operation is more than one kernel
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
                self.kernels += [name] * LAUNCHES.get(name, 1)
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
    pytest.importorskip("vision_tokenizer.models.triton_kernels", reason="needs Triton", exc_type=ImportError)
    built = {(torch.device("cuda", 0), dtype): "Triton" for dtype in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(fused, "KERNELS", built)
    semantic.clip_statistics.cache_clear()
    yield
    semantic.clip_statistics.cache_clear()


def tokenizers(dualvitok_config):
    dualvitok = DualViTok(read_config(dualvitok_config), decoder=False)
    sizes = VqganSizes(ConvSizes(32, (1, 1, 2, 2, 4), 2, (), 32), n_embed=64, embed_dim=32)
    return {"dualvitok": (dualvitok, 400), "chameleon": (ChameleonVQGAN(sizes, decoder=False), 160)}


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
        assert passes(lambda x: norm(x, silu=True), rows) == ["group_norm"]
        tokens = torch.empty(8, 324, 64, dtype=torch.bfloat16, device="cuda")
        assert [name for name in passes(mlp, tokens) if name != "addmm"] == ["quick_gelu"]
        heads = torch.empty(8, 324, 2, 4, 16, dtype=torch.bfloat16, device="cuda")
        table = torch.empty(324, 8, device="cuda")
        assert passes(rotate, heads, (table, table)) == ["rotate"]


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
