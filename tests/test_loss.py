"""The chunked loss against the formula it stands for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import training.models.loss
from training.models.loss import linear_loss


@pytest.mark.parametrize("masked", [None, range(3, 9)])
@pytest.mark.parametrize("count", [0, 1, 10])
def test_equals_the_formula_whatever_the_chunk(monkeypatch, masked, count):
    monkeypatch.setattr(training.models.loss, "CHUNK", 80)  # four positions of twenty words
    torch.manual_seed(0)
    hidden = torch.randn(count, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(9, 20, (count,))
    logits = hidden @ weight.T
    if masked is not None:
        logits = logits.index_fill(1, torch.tensor(list(masked)), torch.finfo(torch.float32).min)
    c_sum = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    z_sum = logits.logsumexp(-1).square().sum()
    expected = torch.autograd.grad(3 * (c_sum + 0.1 * z_sum), (hidden, weight))

    total, sums = linear_loss(hidden, weight, targets, 0.1, masked)
    found = torch.autograd.grad(3 * total, (hidden, weight))
    torch.testing.assert_close(sums.double(), torch.stack((c_sum, z_sum)).detach(), rtol=1e-5, atol=1e-6)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_chunks_logits_are_widened_once_and_then_changed_in_place():
    """At 1 GiB each, copies are what the loss costs."""

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            given = {tensor.data_ptr() for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)}
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if tensor.numel() == 64 * 500 and tensor.data_ptr() not in given:
                    copies.append((function.overloadpacket.__name__, tensor.dtype))
            return result

    copies = []
    hidden, weight = (torch.randn(size, 16).bfloat16().requires_grad_() for size in (64, 500))
    with Copies():
        total, _ = linear_loss(hidden, weight, torch.arange(64), 1e-5, range(100, 200))
        total.backward()
    assert copies == [("mm", torch.bfloat16), ("_to_copy", torch.float32), ("_to_copy", torch.bfloat16)]


def test_a_frozen_head_gets_no_gradient():
    hidden, weight = torch.randn(5, 6, requires_grad=True), torch.randn(20, 6)
    linear_loss(hidden, weight, torch.arange(5), 1e-5)[0].backward()
    assert hidden.grad is not None and weight.grad is None


def test_the_mean_of_a_16_bit_loss_keeps_its_scale():
    """1 / labels is rounded to eight bits nowhere."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(size, 256).bfloat16() for size in (512, 500))
    targets = torch.randint(0, 500, (512,))
    norms = []
    for factor in (1, 1 / 777):
        leaf = hidden.detach().requires_grad_()
        (linear_loss(leaf, weight, targets, 0.0)[0] * factor).backward()
        norms.append(leaf.grad.float().norm().item() / factor)
    assert norms[1] == pytest.approx(norms[0], rel=5e-4)
