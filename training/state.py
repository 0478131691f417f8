"""Checkpoints of a run: complete or absent, the newest few kept, readable by any number of processes.

`checkpoints/step_00001000/` holds the tensors in PyTorch's distributed format and `progress.json`. Dropout is seeded
by the step and the order of the data is a function of the position, so no state of either has to be kept.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from training.config import TrainConfig
from vistoken.errors import Preempted, UserError
from vistoken.jobs.files import sync_folder, write_bytes

FOLDER, PROGRESS = "checkpoints", "progress.json"


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0  # optimizer steps done
    epoch: int = 0
    epoch_step: int = 0  # steps done in this epoch
    samples: int = 0
    tokens: int = 0
    skipped: int = 0  # samples that were replaced
    loss_scale: float = 65536.0  # of fp16


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in (output / FOLDER).glob(f"step_*[0-9]/{PROGRESS}"))


def read_progress(checkpoint: Path, fixed: dict[str, Any]) -> Progress:
    """Where `checkpoint` stands. `fixed` is what must not have changed since; raises `UserError` naming what has."""
    progress, stored, _ = read_stored(checkpoint)
    for name, value in fixed.items():
        if stored.get(name) != value:
            raise UserError(
                f"{checkpoint}: was trained with {name} = {stored.get(name)!r}, now it is {value!r}. Go on with the "
                "former value, or start anew in another --output_dir."
            )
    return progress


def changed(checkpoint: Path, config: TrainConfig) -> str:
    """The settings that are no longer those of the run that wrote `checkpoint`, in words."""
    before, now = dataclasses.asdict(read_stored(checkpoint)[2]), dataclasses.asdict(config)
    return ", ".join(f"{name} {value!r} -> {now[name]!r}" for name, value in before.items() if now[name] != value)


def read_stored(checkpoint: Path) -> tuple[Progress, dict[str, Any], TrainConfig]:
    """Where `checkpoint` stands, what must not change, and the whole configuration of the run that wrote it."""
    path = checkpoint / PROGRESS
    try:
        content = json.loads(path.read_text())
        return Progress(**content["progress"]), content["fixed"], TrainConfig(**content["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a complete checkpoint of this trainer ({error})") from error


class Saver:
    """Writes checkpoints; all processes take part. One gets its name when everything in it is on disk.

    With `config.async_save` a step waits only until the tensors are copied to main memory. They are then written beside
    the training, and `poll`, called after every step, gives the checkpoint its name.
    """

    def __init__(self, config: TrainConfig, fixed: dict[str, Any]):
        self._config, self._fixed, self._folder = config, fixed, Path(config.output_dir) / FOLDER
        # of its own: messages of the writing thread must not meet those of the training
        group = dist.new_group(backend="gloo") if config.async_save else None
        self._group = group if isinstance(group, dist.ProcessGroup) else None
        self._writing: Future | None = None
        self._progress, self._weights = Progress(), 0  # of the checkpoint that is being written, and its bytes

    def save(self, model: nn.Module, optimizer: Optimizer, progress: Progress) -> None:
        self.finish()
        self._progress = dataclasses.replace(progress)
        self._weights = sum(parameter.numel() * 4 for parameter in model.parameters())
        temporary = self._temporary()
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        state = _state(model, optimizer)
        if self._group:
            if next(model.parameters()).device.type == "cpu":  # which PyTorch does not always copy
                state = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, state)
            saved = dcp.async_save(state, checkpoint_id=temporary, process_group=self._group)
            self._writing = saved if isinstance(saved, Future) else saved.upload_completion
            return
        with _failures_named(temporary, self._weights):
            dcp.save(state, checkpoint_id=temporary)
        self._publish()
        dist.barrier()

    def poll(self) -> None:
        """Finish the checkpoint that is being written, if all of it is on disk."""
        if self._writing and self._writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self._writing:
            writing, self._writing = self._writing, None
            with _failures_named(self._temporary(), self._weights):
                writing.result()
            self._publish()

    def _temporary(self) -> Path:
        return self._folder / f"step_{self._progress.step:08d}.tmp"

    def _publish(self) -> None:
        if dist.get_rank() > 0:
            return
        temporary, target = self._temporary(), self._folder / f"step_{self._progress.step:08d}"
        settings = dataclasses.asdict(self._config)
        content = {"progress": dataclasses.asdict(self._progress), "fixed": self._fixed, "config": settings}
        write_bytes(temporary / PROGRESS, json.dumps(content, indent=2).encode())
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        sync_folder(target.parent)
        for old in checkpoints(self._folder.parent)[: -self._config.ckpt_max_keep]:
            (old / PROGRESS).unlink()  # first, so that a half-removed one is never taken for complete
            shutil.rmtree(old)


@contextmanager
def _failures_named(temporary: Path, weights: int) -> Iterator[None]:
    """`weights` is the least that a checkpoint takes, in bytes."""
    try:
        yield
    except CheckpointException as error:
        _let_stop(error)
        free = shutil.disk_usage(temporary).free
        full = f"the disk is full, {free / 1e6:.1f} MB are left and the weights alone take {weights / 1e6:.1f}"
        raise UserError(
            f"{temporary}: cannot write this checkpoint ({full if free < weights else _first_failure(error)}). "
            "Earlier ones are kept: make room, then run the same command again."
        ) from error


def load(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Fill a sharded model and its optimizer, whatever the number of processes that wrote the checkpoint."""
    state = _state(model, optimizer)
    read_tensors(checkpoint, state)
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for group, now in zip(optimizer.param_groups, settings, strict=True):
        group.update(now)  # weight decay and shares of the learning rate are this run's, not the checkpoint's


def read_tensors(checkpoint: Path, state: dict[str, Any]) -> None:
    """Fill the tensors of `state`. Raises `UserError` where the files are damaged or hold other shapes."""
    try:
        dcp.load(state, checkpoint_id=checkpoint)
    except CheckpointException as error:
        _let_stop(error)
        raise UserError(
            f"{checkpoint}: cannot read this checkpoint ({_first_failure(error)}). Remove it to go on from the one "
            "before."
        ) from error


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def _let_stop(error: CheckpointException) -> None:
    """Raise the Ctrl-C or SIGTERM, on whichever rank, that PyTorch took for a failure of the checkpoint."""
    for cause, _ in error.failures.values():
        if isinstance(cause, KeyboardInterrupt | Preempted):
            raise cause from error


def _first_failure(error: CheckpointException) -> str:
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"
