"""The loss of samples that are never trained on, record by record."""

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from training.data.loading import Batches, make_loader
from vistoken.errors import UserError


@torch.no_grad()
def validation_losses(
    model: nn.Module, dataset: Batches, batch_size: int, num_workers: int, device: torch.device
) -> dict[str, float]:
    """Record -> mean cross-entropy over the labels of all its samples, and "all" over those of all records.

    Every process calls the model as often as the others, as sharded weights need it: where a process has no samples
    left it takes some again, and they do not count.
    """
    rank, world, sums = dist.get_rank(), dist.get_world_size(), {}
    model.eval()
    for files, start in zip(dataset.sources, dataset.starts, strict=False):
        by_length = (start + np.argsort(files.lengths, kind="stable")).tolist()
        steps = [by_length[at : at + batch_size * world] for at in range(0, len(by_length), batch_size * world)]
        own = [step[rank::world] for step in steps]
        loader = make_loader(dataset, [mine or step[:1] for mine, step in zip(own, steps, strict=True)], num_workers)
        of_record = torch.zeros(2, dtype=torch.float64, device=device)  # cross-entropy, labels
        for mine, batch in zip(own, loader, strict=True):
            if isinstance(batch, UserError):
                raise batch
            _, losses = model(batch.to(device))
            if mine:
                of_record += torch.stack((losses[0].double(), losses.new_tensor(batch.label_count).double()))
        dist.all_reduce(of_record)
        sums[str(files.record.path)] = of_record.tolist()
    model.train()
    sums["all"] = [sum(column) for column in zip(*sums.values(), strict=True)]
    return {name: loss / max(labels, 1) for name, (loss, labels) in sums.items()}
