"""The nearest-code search and the norm that flat images need, against plain fp64 computations."""

import pytest
import torch
import torch.nn.functional as F

from vision_tokenizer.models import nearest as numerics
from vision_tokenizer.models.layers import GroupNorm
from vision_tokenizer.models.nearest import nearest_codes
from vistoken.device import choose_dtype, float32_products
from vistoken.errors import UserError


def half_norms(codebook):
    return (codebook.double().square().sum(1) / 2).float()


def test_nearest_codes_of_many_blocks(monkeypatch):
    monkeypatch.setattr(numerics, "TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(numerics, "CODES_AT_ONCE", 10)
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(64, 8, generator=generator)
    features = torch.randn(2, 3, 5, 8, generator=generator)
    wanted = torch.cdist(features.double().view(-1, 8), codebook.double()).argmin(1).view(2, 3, 5)
    assert torch.equal(nearest_codes(features, codebook, half_norms(codebook)), wanted)


def test_the_lowest_index_wins_a_tie_within_a_block_and_between_blocks(monkeypatch):
    monkeypatch.setattr(numerics, "CODES_AT_ONCE", 3)
    codebook = torch.tensor([[9.0, 9.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    features = torch.tensor([[0.9, 0.0], [0.0, 0.9], [0.5, 0.5]])
    assert nearest_codes(features, codebook, half_norms(codebook)).tolist() == [1, 4, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_feature_that_is_not_finite_has_no_code(bad):
    features = torch.tensor([[1.0, 0.0], [bad, 0.0], [0.0, 1.0]])
    codebook = torch.eye(2)
    assert nearest_codes(features, codebook, half_norms(codebook)).tolist() == [0, -1, 1]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("flat", [False, True])
def test_group_norm(dtype, tolerance, flat):
    """An image of one colour but for a line is where cancelling variances show."""
    generator = torch.Generator().manual_seed(0)
    norm = GroupNorm(64).to(dtype)
    torch.nn.init.normal_(norm.weight, generator=generator)
    torch.nn.init.normal_(norm.bias, generator=generator)
    x = torch.randn(2, 64, 48, 64, generator=generator) + 3 * torch.randn(2, 64, 1, 1, generator=generator)
    if flat:
        x = torch.full_like(x, 3.0) + torch.randn(2, 64, 1, 1, generator=generator)
        x[:, :, :3] += 0.25
    x = x.to(dtype, memory_format=torch.channels_last)
    wanted = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    with torch.no_grad():
        found = norm(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max()


def test_precision_is_restored():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with float32_products(tf32=True):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        with pytest.raises(ZeroDivisionError), float32_products(tf32=False):
            assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
            raise ZeroDivisionError
        assert torch.backends.cuda.matmul.allow_tf32
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_unknown_dtype():
    with pytest.raises(UserError, match=r"'fp8'.*bf16"):
        choose_dtype("fp8")
