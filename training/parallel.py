"""One model over many processes: FSDP2 sharding, and whole weights out again. One process is the smallest mesh.

Master weights are fp32 and sharded on their first dimension; computation is in the chosen precision.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from training.models.units import LayeredModel
from vistoken.device import choose_dtype, local_device

TIMEOUT = timedelta(minutes=10)  # of a collective: no process is busy alone for so long
PATIENCE = timedelta(days=1)  # at the start, where one may be: an index of 100 million samples takes some minutes


def _under_torchrun() -> bool:
    """Some clusters set WORLD_SIZE for every job; torchrun sets all of these."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def launched() -> tuple[int, int]:
    """How many processes there are and this one's number on its node."""
    return (int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0))) if _under_torchrun() else (1, 0)


@contextmanager
def process_group(device_name: str = "auto") -> Iterator[torch.device]:
    """Join torchrun's processes, or be the only one; gives the device of this one.

    An error does not leave the group in order: that waits for the other processes, which may be waiting for this one
    in a collective. The process has to end, and torchrun then ends the others.
    """
    device = local_device(device_name)
    backend, alone = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", not _under_torchrun()
    if alone:
        dist.init_process_group(backend, timeout=TIMEOUT, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=TIMEOUT)
    finished = False
    try:
        yield device
        finished = True
    finally:
        if finished or alone:
            dist.destroy_process_group()


@contextmanager
def patient() -> Iterator[dist.ProcessGroup]:
    """All processes, for a collective that they may wait in for long while one of them works. An error leaves it as it
    is, as in `process_group`.
    """
    group = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=PATIENCE))
    yield group
    dist.destroy_process_group(group)


def shard(
    model: LayeredModel,
    device: torch.device,
    precision: str,
    *,
    reshard: bool,
    over: int | None = None,
    filled: bool = True,
) -> None:
    """Shard a model on the device in fp32: each of its layers and its `ends()` on its own, then what is left. So only
    a few of them are there as a whole, and the next one's weights come while this one computes.

    With `reshard` a layer's weights are gathered again for the backward pass (ZeRO-3), without they stay (ZeRO-2).
    `over` is how many processes share one copy of the model, neighbours in rank, as on a node; all of them if None.
    Of weights that are mapped from files each process reads its own rows; with `filled` false none, as a checkpoint
    will fill them.
    """
    world = dist.get_world_size()
    over = over or world
    if over < world:
        mesh = init_device_mesh(device.type, (world // over, over), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    policy = MixedPrecisionPolicy(param_dtype=choose_dtype(precision), reduce_dtype=torch.float32)
    units = [(unit, reshard) for unit in model.units()] + [(end, False) for end in model.ends()] + [(model, False)]
    weights = {name: parameter.data for name, parameter in model.named_parameters()} if filled else {}
    for unit, again in units:
        for parameter in unit.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = torch.empty_like(parameter, dtype=torch.float32, device=device)
        unit.to(device).to(torch.float32)  # what is no parameter
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=again)
    register_fsdp_forward_method(model, "ends")  # `ends_whole` may come before the first batch: this finds the root
    part = mesh.get_local_rank("shard")
    with torch.no_grad():
        for name, parameter in model.named_parameters() if filled else ():
            rows = -(-len(weights[name]) // mesh["shard"].size())
            own = weights.pop(name)[part * rows : (part + 1) * rows]
            assert isinstance(parameter, DTensor)  # by now
            parameter.to_local().copy_(own.to(device))  # 16 bits cross the bus, the device widens them


def synchronise_gradients(model: nn.Module, *, last: bool, whole: bool) -> None:
    """What the next backward pass does with gradients; `last` is the last one of an optimizer step.

    By default each pass leaves every process the sum of its shard, and only the last adds up over copies of the
    model. With `whole`, the passes before the last keep whole gradients, 4 bytes a trained weight, and send nothing.
    """
    assert isinstance(model, FSDPModule)  # which `shard` made it
    model.set_requires_gradient_sync(last or not whole)
    model.set_requires_all_reduce(last)


@contextmanager
def ends_whole(model: LayeredModel) -> Iterator[None]:
    """For calls of a sharded model's parts instead of the model itself, by all processes alike: what belongs to none
    of its layers is whole meanwhile. Layers come together when they are called, as ever.
    """
    ends = [end for end in (*model.ends(), model) if isinstance(end, FSDPModule)]
    for end in ends:
        end.unshard()
    try:
        yield
    finally:
        for end in ends:
            end.reshard()


@torch.no_grad()
def gather(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole fp32 CPU tensor) of each weight, one at a time; all processes must iterate together."""
    for name, parameter in model.named_parameters():
        yield name, unsharded(parameter).cpu()


def unsharded(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process has a part; all of them must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
