"""The training loop: batches in, steps, logs and checkpoints out."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from training.assemble import on_rank_0
from training.config import TrainConfig
from training.data.loading import Batches
from training.data.packing import Batch, Skipped
from training.data.sampler import RankBatches
from training.generation.sheet import Sheet, sheet_folder
from training.models.units import LayeredModel
from training.parallel import synchronise_gradients, unsharded
from training.report import Flops, Report
from training.state import Progress, Saver
from training.validation import validation_losses
from vistoken.errors import UserError, is_out_of_memory

T = TypeVar("T")

FEW_FAILURES = 10  # the share of failed samples is not judged before there are more


@dataclass(frozen=True)
class Run:
    """Everything the loop uses."""

    config: TrainConfig
    model: LayeredModel
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    loader: DataLoader
    order: RankBatches  # of what the loader gives
    epoch_steps: int
    accumulation: int  # batches of a process in an optimizer step; with batch_tokens, steps count as one
    whole_gradients: bool  # until the last of them
    device: torch.device
    flops: Flops
    saver: Saver
    validation: Batches | None  # samples that are never trained on
    batch_size: int  # of a process
    sheet: Sheet | None

    @property
    def total_steps(self) -> int:
        steps = self.config.epochs * self.epoch_steps
        return min(steps, self.config.max_steps or steps)


@dataclass(frozen=True)
class Counts:
    """What an optimizer step is made of, over all processes."""

    labels: int
    samples: int
    tokens: int
    flops: float
    skipped: list[Skipped]


class Losses(NamedTuple):
    """Means over the labels of a step, and the norm of its gradient before clipping."""

    c_loss: float
    z_loss: float
    grad_norm: float


def train(run: Run, progress: Progress, report: Report | None) -> None:
    """Go from `progress` to the last step, with a checkpoint every so many iterations and at the end."""
    config, sampler = run.config, run.order.sampler
    if run.sheet and progress.step and not on_rank_0(lambda: sheet_folder(config.output_dir, progress.step).exists()):
        answer_sheet(run, run.sheet, progress.step, report)  # the run before ended between its checkpoint and this
    loader, steps, types = iter(run.loader), run.order.steps(), sampler.order(progress.epoch)
    while progress.step < run.total_steps:
        lr = learning_rate(progress.epoch + progress.epoch_step / run.epoch_steps, config)
        for group in run.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        batches, counts = next_batches(run, loader, len(next(steps)))
        losses = train_step(run, batches, counts.labels, progress.step)

        progress.step += 1
        progress.epoch_step += 1
        progress.tokens += counts.tokens
        progress.samples += counts.samples
        progress.skipped += len(counts.skipped)
        judge_skipped(progress, counts.skipped, config.max_failed)
        held_out = {}
        if run.validation and (progress.step % config.eval_interval == 0 or progress.step == run.total_steps):
            held_out = validation_losses(run.model, run.validation, run.batch_size, config.num_workers, run.device)
        if report:
            metrics = {
                "epoch": progress.epoch,
                "iter": progress.epoch_step * run.accumulation - 1,  # batches in the epoch, from 0
                "step": progress.step,  # optimizer steps, from 1
                **losses._asdict(),
                "lr": lr,
                "vit_lr": lr * config.vit_lr_scale,
                "tokens": counts.tokens,
                "type": sampler.types[types[progress.epoch_step - 1]],  # of all samples of the step
            }
            if held_out:
                metrics["validation"] = held_out
            report.step(metrics, counts.skipped, counts.flops)

        if progress.epoch_step == run.epoch_steps:
            progress.epoch, progress.epoch_step = progress.epoch + 1, 0
            types = sampler.order(progress.epoch)
        iterations, interval = progress.step * run.accumulation, config.save_iteration_interval
        if iterations // interval > (iterations - run.accumulation) // interval or progress.step == run.total_steps:
            if run.scaler.is_enabled():
                progress.loss_scale = run.scaler.get_scale()
            run.saver.save(run.model, run.optimizer, progress)
            if report:
                report.plot()
            if run.sheet:
                answer_sheet(run, run.sheet, progress.step, report)
        run.saver.poll()
    run.saver.finish()


def answer_sheet(run: Run, sheet: Sheet, step: int, report: Report | None) -> None:
    shown = sheet.answer(run.model, run.config.output_dir, step)
    if report:
        report.answers(shown, step)


def next_batches(run: Run, loader: Iterator[Batch | UserError], count: int) -> tuple[list[Batch], Counts]:
    """This process's `count` batches of a step, and what the step is made of. Raises on all processes what failed on
    any.
    """
    loaded = list(itertools.islice(loader, count))
    batches = [one for one in loaded if isinstance(one, Batch)]
    errors = [one for one in loaded if isinstance(one, UserError)]
    skipped = [skip for batch in batches for skip in batch.skipped]
    own = [
        len(errors),
        len(skipped),
        sum(batch.label_count for batch in batches),
        sum(len(batch.names) for batch in batches),
        sum(len(batch.tokens) for batch in batches),
        sum(run.flops.of(batch) for batch in batches),
    ]
    failed, replaced, labels, samples, tokens, flops = total(torch.tensor(own, dtype=torch.float64), run.device)
    if failed:
        raise gather(errors)[0]
    if replaced:
        skipped = gather(skipped)
    return batches, Counts(max(int(labels), 1), int(samples), int(tokens), flops, skipped)


def train_step(run: Run, batches: list[Batch], labels: int, step: int) -> Losses:
    """One optimizer step. The loss is the mean over the labels of all its batches, on all processes: how samples are
    shared out changes nothing.
    """
    world = dist.get_world_size()
    torch.manual_seed(run.config.seed + step * world + dist.get_rank())  # of dropout
    sums = []
    for number, batch in enumerate(batches, start=1):
        synchronise_gradients(run.model, last=number == len(batches), whole=run.whole_gradients)
        try:
            loss, of_batch = run.model(batch.to(run.device))
            run.scaler.scale(loss * (world / labels)).backward()  # gradients are averaged over processes
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(run, batch) from error
        sums.append(of_batch)
    c_loss, z_loss = (value / labels for value in total(torch.stack(sums).sum(0).double(), run.device))
    run.scaler.unscale_(run.optimizer)
    norm = unsharded(nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip_grad)).item()
    overflow = not math.isfinite(norm) and run.scaler.get_scale() > 1  # the step is left out and the scale halved
    if not math.isfinite(c_loss + z_loss) or not (overflow or math.isfinite(norm)):
        names = gather(
            [n for batch, own in zip(batches, sums, strict=True) if not own.isfinite().all() for n in batch.names]
        )
        if not names:  # the loss was fine, its gradient was not
            names = gather([name for batch in batches for name in batch.names])
        raise UserError(
            f"step {step + 1}: cross-entropy {c_loss}, z-loss {z_loss}, gradient norm {norm}; stopped before the "
            f"weights changed. The samples: {'; '.join(names)}"
        )
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return Losses(c_loss, z_loss, norm)


def learning_rate(epoch: float, config: TrainConfig) -> float:
    """Linear warm-up from 0, then half a cosine down to `min_lr`, at a fractional epoch."""
    if epoch < config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def judge_skipped(progress: Progress, skipped: list[Skipped], max_failed: float) -> None:
    """Stop where too many samples had to be replaced; `skipped` are those of the last step."""
    if progress.skipped > max(FEW_FAILURES, max_failed * progress.samples):
        last = f"; the last: {skipped[-1].name}: {skipped[-1].reason}" if skipped else ""
        raise UserError(
            f"{progress.skipped} of {progress.samples} samples could not be used, more than --max_failed "
            f"{max_failed:g} allows{last}"
        )


def out_of_memory(run: Run, batch: Batch) -> UserError:
    """The error for a batch that the device has no room for."""
    size = "--batch_tokens (BATCH_TOKENS)" if run.config.batch_tokens else "--batch_size (BATCH_SIZE)"
    names = {size: len(batch.names) > 1, "--max_seq_len (MAX_SEQ_LEN)": True}
    smaller = " or ".join(name for name, helps in names.items() if helps)
    advice = "" if run.config.checkpointing else ", or give --checkpointing"
    return UserError(
        f"{run.device} has too little memory for a batch of {len(batch.names)} samples, {len(batch.tokens):,} tokens "
        f"and {len(batch.tiles)} tiles. Lower {smaller}{advice}; the global batch stays as it is. Its samples: "
        f"{'; '.join(batch.names)}"
    )


def total(values: torch.Tensor, device: torch.device) -> list[float]:
    """The sum of each value over all processes."""
    values = values.to(device)
    dist.all_reduce(values)
    return values.tolist()


def gather(values: Sequence[T]) -> list[T]:
    """The values of all processes, one after another."""
    everyone: list[Sequence[T]] = [()] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    return list(itertools.chain.from_iterable(everyone))
