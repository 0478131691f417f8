"""The training loop: batches in, steps, logs and checkpoints out."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from training import state
from training.config import TrainConfig
from training.data.loading import Loaded, Skipped
from training.parallel import total
from training.report import Flops, Report
from training.state import Progress
from vistoken.errors import UserError

FEW_FAILURES = 10  # the share of failed samples is not judged before there are more


@dataclass(frozen=True)
class Run:
    """Everything the loop uses."""

    config: TrainConfig
    model: nn.Module
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    loader: DataLoader
    epoch_steps: int
    accumulation: int
    device: torch.device
    flops: Flops
    fixed: dict  # what a checkpoint must have been trained with

    @property
    def total_steps(self) -> int:
        steps = self.config.epochs * self.epoch_steps
        return min(steps, self.config.max_steps or steps)


@dataclass(frozen=True)
class Step:
    """What an optimizer step was, over all processes."""

    c_loss: float
    z_loss: float
    grad_norm: float
    tokens: int
    flops: float
    skipped: list[Skipped]


def train(run: Run, progress: Progress, report: Report | None) -> None:
    """Go from `progress` to the last step, with a checkpoint every so many iterations and at the end."""
    config, interval = run.config, run.config.save_iteration_interval
    batches = iter(run.loader)
    while progress.step < run.total_steps:
        lr = learning_rate(progress.epoch + progress.epoch_step / run.epoch_steps, config)
        set_learning_rate(run.optimizer, lr)
        step = train_step(run, batches, progress)
        progress.step += 1
        progress.epoch_step += 1
        progress.tokens += step.tokens
        if report:
            report.step(_metrics(step, progress, run, lr), step.skipped, step.flops)
        if progress.epoch_step == run.epoch_steps:
            progress.epoch, progress.epoch_step = progress.epoch + 1, 0
        iterations = progress.step * run.accumulation
        if iterations // interval > (iterations - run.accumulation) // interval or progress.step == run.total_steps:
            if run.scaler.is_enabled():
                progress.loss_scale = run.scaler.get_scale()
            state.save(config, run.model, run.optimizer, progress, run.fixed)
            if report:
                report.plot()


def train_step(run: Run, batches: Iterator[Loaded | UserError], progress: Progress) -> Step:
    """One optimizer step. The loss is the mean over the labels of all its batches, on all processes: how samples are
    shared out changes nothing.
    """
    loaded = list(itertools.islice(batches, run.accumulation))
    counts = _count(loaded, run)
    world, device = dist.get_world_size(), run.device
    torch.manual_seed(run.config.seed + progress.step * world + dist.get_rank())  # of dropout
    own, losses = [], torch.zeros(2, device=device)
    for batch, _ in loaded:
        loss, sums = run.model(batch.to(device))
        run.scaler.scale(loss * (world / counts.labels)).backward()
        own.append(sums)
        losses += sums
    c_loss, z_loss = (value / counts.labels for value in total(losses.tolist(), device))
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip_grad).full_tensor().item()
    overflow = not math.isfinite(norm) and run.scaler.get_scale() > 1  # the step is left out and the scale halved
    if not math.isfinite(c_loss + z_loss) or not (overflow or math.isfinite(norm)):
        raise _diverged(progress, loaded, own, c_loss, z_loss, norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    _judge(progress, counts, run)
    return Step(c_loss, z_loss, norm, counts.tokens, counts.flops, counts.skipped)


def learning_rate(epoch: float, config: TrainConfig) -> float:
    """Linear warm-up from 0, then half a cosine down to `min_lr`, at a fractional epoch."""
    if epoch < config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: AdamW, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


@dataclass(frozen=True)
class _Counts:
    labels: int
    samples: int
    tokens: int
    flops: float
    skipped: list[Skipped]


def _count(loaded: list[Loaded | UserError], run: Run) -> _Counts:
    """What a step is made of, over all processes. Raises on all of them what went wrong on any."""
    errors = [one for one in loaded if isinstance(one, UserError)]
    batches = [one.batch for one in loaded if isinstance(one, Loaded)]
    skipped = [skip for one in loaded if isinstance(one, Loaded) for skip in one.skipped]
    wrong, labels, samples, tokens, flops, failures = total(
        [
            len(errors),
            sum(batch.label_count for batch in batches),
            sum(len(batch.names) for batch in batches),
            sum(batch.tokens.numel() for batch in batches),
            sum(run.flops.of(batch) for batch in batches),
            len(skipped),
        ],
        run.device,
    )
    if wrong:
        raise next(itertools.chain.from_iterable(_gather(errors)))
    if failures:
        skipped = list(itertools.chain.from_iterable(_gather(skipped)))
    return _Counts(max(int(labels), 1), int(samples), int(tokens), flops, skipped)


def _gather(value: object) -> list:
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _judge(progress: Progress, counts: _Counts, run: Run) -> None:
    """Count the samples of a step, and stop where too many had to be replaced."""
    progress.samples += counts.samples
    progress.skipped += len(counts.skipped)
    if progress.skipped > max(FEW_FAILURES, run.config.max_failed * progress.samples):
        last = counts.skipped[-1] if counts.skipped else None
        raise UserError(
            f"{progress.skipped} of {progress.samples} samples could not be used, more than --max_failed "
            f"{run.config.max_failed:g} allows" + (f"; the last: {last.name}: {last.reason}" if last else "")
        )


def _diverged(
    progress: Progress, loaded: list[Loaded], own: list[torch.Tensor], c_loss: float, z_loss: float, norm: float
) -> UserError:
    """The error for a loss or gradient that is no number, with the samples it came from."""
    bad = [one.batch.names for one, sums in zip(loaded, own, strict=True) if not sums.isfinite().all()]
    names = list(itertools.chain.from_iterable(itertools.chain.from_iterable(_gather(bad))))
    if not names:  # the loss was fine, its gradient was not
        names = list(itertools.chain.from_iterable(_gather([name for one in loaded for name in one.batch.names])))
    return UserError(
        f"step {progress.step + 1}: cross-entropy {c_loss}, z-loss {z_loss}, gradient norm {norm}; stopped before the "
        f"weights changed. The samples: {'; '.join(names)}"
    )


def _metrics(step: Step, progress: Progress, run: Run, lr: float) -> dict:
    """A line of metrics.jsonl. `iter` counts batches in the epoch from 0, `step` optimizer steps from 1."""
    return {
        "epoch": progress.epoch,
        "iter": progress.epoch_step * run.accumulation - 1,
        "step": progress.step,
        "c_loss": step.c_loss,
        "z_loss": step.z_loss,
        "grad_norm": step.grad_norm,
        "lr": lr,
        "vit_lr": lr * run.config.vit_lr_scale,
        "tokens": step.tokens,
    }
