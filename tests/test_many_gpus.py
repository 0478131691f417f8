"""What eight GPUs would meet, without one: collectives are counted in a process group of eight that is not there,
CUDA's device rules are checked on tensors without memory, and compiled layers with a backend that only traces.
"""

import os
import subprocess
import sys
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_small import flags, text_samples, write_data_config, write_model, write_record

import training.models.attention as attention
from training.assemble import freeze, on_rank_0, open_model, open_records
from training.config import STAGES, resolve
from training.data.index import fingerprint
from training.data.loading import read_data_config
from training.data.packing import Sample, pack
from training.models import causal_lm
from training.models.llm import LLMConfig
from training.models.siglip import VisionConfig
from training.models.unitoken import UniToken
from training.models.units import compile_unit, recompute
from training.parallel import TIMEOUT, process_group, shard, synchronise_gradients

LAYERS = 2
LLM = LLMConfig(9100, 64, 128, LAYERS, 4, 2)
TOWER = VisionConfig(32, 64, LAYERS, 2, image_size=28)  # four continuous tokens a tile


def batch(length, samples, tiles):
    """`samples` samples of `length` tokens and more, each with `tiles` tiles."""
    made = []
    for number in range(samples):
        ids = np.random.default_rng(number).integers(8900, 9100, length + number)
        features = np.full(len(ids), -1)
        features[:4] = np.arange(4)
        images = [np.zeros((tiles, 3, 28, 28), np.uint8)] if tiles else []
        made.append(Sample(str(number), ids, ids, features if tiles else np.full(len(ids), -1), images, 4 * tiles))
    return pack(made, 28)


def unitoken(stage, **settings):
    torch.manual_seed(0)
    model = UniToken(LLM, TOWER, z_weight=1e-5, **settings)
    freeze(model, STAGES[stage]["trainable_params"])
    return model


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def eight_processes():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("alone", [True, False])
def test_a_collective_that_nobody_joins_ends_in_minutes_and_after_an_error_none_is_waited_for(monkeypatch, alone):
    """As NCCL does where a group is left in order, without a word."""
    begun, left = [], []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, *, timeout, **how: begun.append(timeout))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append("in order"))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
        if alone:
            monkeypatch.delenv(name)
    with process_group("cpu"):
        pass
    assert left == ["in order"]
    with pytest.raises(ValueError), process_group("cpu"):
        raise ValueError
    assert len(left) == (2 if alone else 1)
    assert timedelta(minutes=5) <= begun[0] <= timedelta(minutes=15)


def collectives_of_a_step(model, batches, whole):
    """Operation -> calls in an optimizer step of so many batches."""
    with CommDebugMode() as counted:
        for number in range(1, batches + 1):
            synchronise_gradients(model, last=number == batches, whole=whole)
            loss, _ = model(batch(20, 2, 1))
            loss.backward()
    return {str(operation).rpartition(".")[2]: calls for operation, calls in counted.get_comm_counts().items()}


@pytest.mark.parametrize(("stage", "trained"), [("I", LAYERS + 1), ("II", 2 * LAYERS + 3)])
@pytest.mark.parametrize("whole", [False, True])
def test_gradients_are_sent_once_a_step_where_whole_ones_fit(eight_processes, stage, trained, whole):
    """One message for each unit that is trained: the layers, the embeddings, the head, and the rest."""
    model = unitoken(stage)
    shard(model, torch.device("cpu"), "bf16", reshard=True)
    found = collectives_of_a_step(model, 4, whole)
    assert found["_reduce_scatter_base_"] == trained * (1 if whole else 4)


def test_copies_of_the_model_add_up_once_a_step(eight_processes):
    """Four processes share a copy: sums inside it after each batch, over copies after the last."""
    model = unitoken("II")
    shard(model, torch.device("cpu"), "bf16", reshard=True, over=4)
    found = collectives_of_a_step(model, 4, whole=False)
    assert found["_reduce_scatter_base_"] == 4 * (2 * LAYERS + 3) and found["allreduce_"] == 2 * LAYERS + 3


def test_weights_come_layer_by_layer_and_never_all_at_once(eight_processes):
    model = unitoken("II")
    shard(model, torch.device("cpu"), "bf16", reshard=True)
    found = collectives_of_a_step(model, 1, whole=False)
    assert found["_allgather_base_"] == 2 * 2 * LAYERS + 3  # layers twice; embeddings, head and rest stay


@torch.library.custom_op("test_many_gpus::varlen", mutates_args=())
def mixed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest_q: int, longest_k: int
) -> torch.Tensor:
    """For attention by a kernel that a CPU lacks, in one call for all samples: what it is given counts here."""
    assert bounds.diff().max() == longest_q == longest_k
    return q * k + v


mixed.register_fake(lambda q, k, v, bounds, longest_q, longest_k: torch.empty_like(q))


def mixed_backward(ctx, grad):
    q, k = ctx.saved_tensors
    return grad * k, grad * q, grad, None, None, None


mixed.register_autograd(mixed_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "selective", "kernel"), [("I", False, 0), ("II", False, 1), ("II", True, 0)])
def test_compiled_layers_are_made_once_for_all_sizes_and_give_the_same(
    one_process, monkeypatch, stage, selective, kernel
):
    """Tiles, samples and lengths of any number, among them one, and the hidden size: a graph a kind of layer. Also
    where a kernel is told how long the longest sample is.
    """
    if kernel:
        monkeypatch.setattr(attention, "varlen_takes", lambda q: True)
        monkeypatch.setattr(
            attention, "varlen_attn", lambda q, k, v, bounds, *rest, **_: mixed(q, k, v, bounds, *rest[1:])
        )
    torch._dynamo.reset()
    counters.clear()
    sizes = [(40, 4, 1), (50, 3, 2), (64, 1, 1), (33, 1, 5), (90, 1, 1), (20, 6, 1), (64, 2, 0)]
    found = {}
    for compiled in (False, True):
        model = unitoken(stage, dropout=0.0)
        for unit in model.units():
            recompute(unit, selective=selective)
        shard(model, torch.device("cpu"), "fp32", reshard=True)
        for unit in model.units() if compiled else ():
            compile_unit(unit, "aot_eager")
        losses, graphs = [], []
        for size in sizes:
            loss, _ = model(batch(*size))
            loss.backward()
            losses.append(loss.item())
            graphs.append(counters["stats"]["unique_graphs"])
        norms = [p.grad.full_tensor().norm().item() for p in model.parameters() if p.grad is not None]
        found[compiled] = losses + norms
    assert found[True] == pytest.approx(found[False], rel=1e-5, abs=1e-6)
    assert not counters["graph_break"]
    assert graphs[0] == graphs[-1] <= 3  # the tower's first layer, whose input is not trained, the others, the decoder


def test_selective_recomputation_repeats_half_of_the_products_and_no_attention():
    """In the backward pass, beside what it computes anyway. A layer's last product is of no use there."""
    again = {}
    for way in (None, True, False):
        model = unitoken("II")
        for unit in model.units() if way is not None else ():
            recompute(unit, selective=way)
        loss, _ = model(batch(20, 2, 1))
        with Log("cpu") as log:
            loss.backward()
        again[way] = [sum(name.startswith(kind) for name in log.kernels) for kind in ("mm", "addmm", "_scaled_dot")]
    plain, selective, full = (np.array(again[way]) for way in (None, True, False))
    assert (full - plain)[:2].tolist() == [LAYERS * 6, LAYERS * 5]  # of the decoder, and of the tower, with a bias
    assert (selective - plain).tolist() == [LAYERS * 3, LAYERS * 3, 0] and full[2] > plain[2]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what is read of a mapped file")
def test_a_process_reads_its_own_rows_of_the_weights_and_a_resumed_one_none(text_run):
    """What the others read is theirs: each byte once on a node."""
    file = text_run[0] / "model.safetensors"
    settings = {"init_from": str(text_run[0]), "data_config": "x", "output_dir": "x"}
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    try:
        read = {}
        for filled in (True, False):
            model, folder = open_model(resolve(settings), resumed=not filled)
            before = bytes_read(file)
            shard(model, torch.device("cpu"), "bf16", reshard=True, filled=filled)
            read[filled] = bytes_read(file) - before
            for name, parameter in model.named_parameters() if filled else ():
                own = folder.tensors[name].chunk(8)[5:6]
                assert parameter.to_local().numel() == sum(rows.numel() for rows in own)
                assert all(torch.equal(parameter.to_local(), rows.float()) for rows in own), name
            del model, folder
    finally:
        dist.destroy_process_group()
    assert 0.1 < read[True] / file.stat().st_size < 0.5, "an eighth, and pages around it"
    assert read[False] == 0


def bytes_read(file: Path) -> int:
    """Of a file that is mapped: the pages that this process has touched."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


class Log(TorchDispatchMode):
    """What runs: kernels, and operations that put tensors of two devices together or ask the device for a number."""

    VIEWS = (
        "view _unsafe_view t transpose permute unsqueeze squeeze expand select slice unbind split split_with_sizes "
        "detach alias as_strided unflatten reshape _reshape_alias empty empty_strided new_empty lift_fresh device"
    )
    WAITS = frozenset(("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"))

    def __init__(self, device="cuda"):
        super().__init__()
        self.device = device
        self.kernels, self.mixed, self.waits = [], [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves([args, kwargs, result]) if isinstance(leaf, torch.Tensor)]
        on_gpu = [tensor for tensor in tensors if tensor.device.type == self.device]
        if on_gpu and name not in self.VIEWS.split():
            self.kernels.append(name)
        if on_gpu and name in self.WAITS:
            self.waits.append(name)
        elsewhere = [tensor for tensor in tensors if tensor.device.type != self.device and tensor.dim()]
        if on_gpu and elsewhere and name not in ("_to_copy", "copy_"):
            self.mixed.append(name)
        return result


@pytest.mark.parametrize("tiles", [1, 5])
def test_the_forward_pass_on_cuda_mixes_no_devices_and_never_waits(monkeypatch, tiles):
    """On tensors that say they are on a GPU. Attention stands in for the kernel that CUDA has."""
    seen = []

    def varlen(q, k, v, bounds_q, bounds_k, longest_q, longest_k, **options):
        seen.append((q.device.type, bounds_q.device.type, bounds_q.dtype, longest_q, options))
        return q + k + v

    monkeypatch.setattr(attention, "varlen_attn", varlen)
    monkeypatch.setattr(
        torch._C, "_conv_determine_backend_memory_format", lambda *_: torch.contiguous_format
    )  # asks for a cuDNN
    model = UniToken(LLM, TOWER, z_weight=1e-5, masked=range(4, 8196), dropout=0.05)
    on_cpu = batch(40, 3, tiles)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
                    module._parameters[name] = torch.nn.Parameter(empty)
        tensors = {f.name: getattr(on_cpu, f.name) for f in fields(on_cpu)}
        moved = {
            name: mode.from_tensor(tensor).to("cuda")
            for name, tensor in tensors.items()
            if isinstance(tensor, torch.Tensor) and name != "lengths"
        }
        with Log() as log:
            loss, _ = model(replace(on_cpu, **moved))  # its gradients begin here, too
    assert loss.device.type == "cuda"
    assert not log.mixed and not log.waits
    assert len(log.kernels) <= 150, "a budget for two layers of each kind"
    tower, decoder = seen[0], seen[-1]
    assert tower == ("cuda", "cuda", torch.int32, 4, {})
    assert decoder == ("cuda", "cuda", torch.int32, 42, attention.CAUSAL)


@pytest.mark.parametrize(("stage", "selective", "budget"), [("I", None, 660), ("II", None, 700), ("II", False, 960)])
def test_a_step_mixes_no_devices_and_never_waits(stage, selective, budget):
    """Backward pass, clipping and optimizer, too. On meta tensors: autograd wants a real GPU for those that only say
    they are on one. What asks them for a number raises; the loop itself asks for the norm, once a step.
    """
    model = unitoken(stage, masked=range(4, 8196), dropout=0.05)
    for unit in model.units() if selective is not None else ():
        recompute(unit, selective=selective)
    model.to(torch.bfloat16).to("meta")
    on_cpu = batch(40, 3, 2)
    moved = {f.name: getattr(on_cpu, f.name) for f in fields(on_cpu) if f.name != "lengths"}
    moved = {name: value.to("meta") for name, value in moved.items() if isinstance(value, torch.Tensor)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True)
    with Log("meta") as log:
        loss, _ = model(replace(on_cpu, **moved))
        loss.backward()
        forward_and_back = len(log.kernels)
        torch.nn.utils.clip_grad_norm_(trained, 4.0)
        optimizer.step()  # makes its moments
        before = len(log.kernels)
        optimizer.step()
    assert all(parameter.grad is not None for parameter in trained)
    assert not log.mixed and not log.waits
    assert forward_and_back <= budget, forward_and_back
    assert len(log.kernels) - before <= 40, "for all tensors at once"


@pytest.mark.parametrize("words", [500, 5])
def test_new_words_have_the_mean_and_the_covariance_of_those_there_are(monkeypatch, words):
    """As transformers draws them, one word at a time. Five words have no full covariance."""
    monkeypatch.setattr(causal_lm, "NARROW", 1.0)  # 1e-9 of it is what fp32 leaves of a mean of this size
    torch.manual_seed(0)
    known = 3 + torch.randn(words, 24) @ torch.randn(24, 24)
    found, again = torch.empty(2, 40_000, 24)
    for out in (found, again):
        causal_lm.draw_words(known, torch.Generator().manual_seed(3), out=out)
    assert torch.equal(found, again) and not torch.equal(found[0], found[1])
    deviation = known.std(0)
    assert ((found.mean(0) - known.mean(0)).abs() < 0.03 * deviation).all()
    expected, drawn = known.T.cov(correction=0), found.T.cov()
    assert ((drawn - expected).abs() < 0.06 * deviation[:, None] * deviation).all()
    kurtosis = ((found - found.mean(0)) / found.std(0)).pow(4).mean(0)
    assert (kurtosis - 3).abs().max() < 0.8, "about normal"


def test_new_words_are_hardly_more_than_the_mean():
    known = 3 + torch.randn(500, 200)
    found = torch.empty(1000, 200)
    causal_lm.draw_words(known, torch.Generator().manual_seed(3), out=found)
    away = (found - known.mean(0)).std().item()
    assert away == pytest.approx(1e-9**0.5, rel=0.05)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    record = write_record(folder / "tokens", text_samples(20))
    return write_model(folder / "model"), write_data_config(folder / "data.yaml", record)


FAILING = """
import os, sys
import torch
import training.loop
step = training.loop.train_step
def fails(*args):
    if os.environ["RANK"] == "1":
        raise {error}
    return step(*args)
training.loop.train_step = fails
from training.train import main
from vistoken.cli import leave_at_once, run_command
run_command(main, leave_at_once)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "told"), [("ValueError('a defect')", "ValueError: a defect"), ("MemoryError()", "out of memory")]
)
def test_an_error_on_one_process_ends_all_at_once(tmp_path, text_run, error, told):
    """The other one waits in a collective, and the one that failed must not wait for it."""
    (tmp_path / "failing.py").write_text(FAILING.format(error=error))
    model, data = text_run
    arguments = flags(model, data, tmp_path / "output", batch_size=1, epochs=1)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "failing.py")]
    process = subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,  # less than a collective waits
    )
    assert process.returncode and told in process.stderr + process.stdout, process.stderr


def test_the_others_wait_for_a_long_start(monkeypatch, tmp_path):
    """Writing the index of hundreds of millions of samples outlasts what a collective of a step waits for."""
    waits, waited = {}, []
    new_group, broadcast, barrier = dist.new_group, dist.broadcast_object_list, dist.barrier

    def made(**given):
        group = new_group(**given)
        waits[group] = given["timeout"]
        return group

    monkeypatch.setattr(dist, "new_group", made)
    monkeypatch.setattr(
        dist, "broadcast_object_list", lambda box, group: waited.append(waits[group]) or broadcast(box, group=group)
    )
    monkeypatch.setattr(dist, "barrier", lambda group: waited.append(waits[group]) or barrier(group))
    sources = read_data_config(write_data_config(tmp_path / "data.yaml", write_record(tmp_path / "t", text_samples(3))))
    config = Mock(output_dir=str(tmp_path / "out"), cache_ann_on_disk=False)
    with process_group("cpu"):
        digests = on_rank_0(lambda: [fingerprint(source.path) for source in sources])
        (record,), _ = open_records(config, sources, digests, local_rank=0)
    assert len(record) == 3 and waited == [timedelta(days=1)] * 2
    assert waited[0] > TIMEOUT
