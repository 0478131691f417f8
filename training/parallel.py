"""One model over many processes: FSDP2 sharding, and whole weights out again. One process is the smallest mesh.

Master weights are fp32 and sharded on their first dimension; computation is in the chosen precision.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from vistoken.device import choose_dtype, local_device


def _under_torchrun() -> bool:
    """Some clusters set WORLD_SIZE for every job; torchrun sets all of these."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def launched() -> tuple[int, int]:
    """How many processes there are and this one's number on its node."""
    return (int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0))) if _under_torchrun() else (1, 0)


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join torchrun's processes, or be the only one; gives the device of this one."""
    device = local_device("auto")
    alone = {} if _under_torchrun() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **alone)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, device: torch.device, precision: str, reshard: bool) -> None:
    """Move a model to the device in fp32 and shard it: each of its `units()` on its own, then what is left, so that no
    more than one of them is ever there as a whole.

    With `reshard` a unit's weights are gathered again for the backward pass (ZeRO-3), without they stay (ZeRO-2).
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=choose_dtype(precision), reduce_dtype=torch.float32)
    for unit in model.units():
        unit.to(device, torch.float32)
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    model.to(device, torch.float32)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


@torch.no_grad()
def gather(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole fp32 CPU tensor) of each weight, one at a time; all processes must iterate together."""
    for name, parameter in model.named_parameters():
        yield name, parameter.full_tensor().cpu()
