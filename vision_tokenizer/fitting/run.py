"""A training run from settings to checkpoints: the loop behind `train_dualvitok.py`."""

import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vision_tokenizer.fitting import checkpoint
from vision_tokenizer.fitting.config import RunSettings
from vision_tokenizer.fitting.data import Batch, Photographs, batch_order, batches_from, find_images
from vision_tokenizer.fitting.discriminator import PatchDiscriminator
from vision_tokenizer.fitting.linear_start import start_linear
from vision_tokenizer.fitting.lite0 import Lite0Distance, load_lite0
from vision_tokenizer.fitting.networks import build, fit_codebooks, load_weights
from vision_tokenizer.fitting.perceptual import LINEAR_SOURCE, VGG_SOURCE, load_lpips
from vision_tokenizer.fitting.report import HeldOut, Report
from vision_tokenizer.fitting.update import Updater
from vision_tokenizer.images.dualvitok import normalize
from vision_tokenizer.models.chameleon.vqgan import ChameleonVQGAN
from vistoken.cli import note
from vistoken.device import float32_products, keep_freed_memory, local_device
from vistoken.errors import UserError
from vistoken.jobs.progress import bar


def train(settings: RunSettings) -> Path:
    """Train to the last update; returns the last checkpoint's path. Raises `UserError`."""
    device = local_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    batches, per_epoch = open_data(settings, world)
    total = settings.max_steps or settings.epochs * per_epoch
    fit = make_updater(settings, device)
    folder = settings.folder / "checkpoints"
    found = [Path(settings.vq_ckpt)] if settings.vq_ckpt else checkpoint.checkpoints(folder)[-1:]
    failed = 0
    if found:
        failed = int(checkpoint.resume(found[0], fit, settings)["failed"])
        note(f"resumed {found[0]} after update {fit.step}")
    else:
        fit_to_data(fit, settings, batches)
    if dist.is_initialized():
        for tensor in fit.network.state_dict().values():
            dist.broadcast(tensor, 0)
    report = Report(settings.folder, fit.step) if rank == 0 else None
    held_out = HeldOut(Path(settings.eval_path), settings.eval_side) if settings.eval_path and rank == 0 else None
    window = Window(device)
    path = found[0] if found else folder
    with bar("training", total, initial=fit.step, disable=rank != 0) as progress, float32_products(tf32=True):
        for micro_batches in batches(fit.step):
            if fit.step >= total:
                break
            failed += sum(len(batch.failed) for batch in micro_batches)
            require_readable(failed, (fit.step + 1) * settings.global_batch_size // world, micro_batches, settings)
            torch.manual_seed(settings.global_seed * 1_000_003 + fit.step * world + rank)  # code dropping draws
            lr = learning_rate(fit.step + 1, total, settings)
            pixels = [normalize(batch.pixels.to(device, non_blocking=True)) for batch in micro_batches]
            terms, outputs = fit.update(pixels, lr, names=[name for batch in micro_batches for name in batch.names])
            window.add(terms, outputs.codes, settings.global_batch_size)
            progress.update()
            if fit.step % settings.log_every == 0 or fit.step == total:
                values = window.close() | {"lr": lr, "unreadable": failed}
                progress.set_postfix_str(f"{values['images_per_second']:.1f} images/s, rec {values['rec_loss']:.4f}")
                if report:
                    report.line(fit.step, values)
            if fit.step % settings.ckpt_every == 0 or fit.step == total:
                if report:
                    path = checkpoint.save(folder, fit, settings, {"failed": failed})
                    if held_out:
                        values, sheet = held_out.measure(fit)
                        report.line(fit.step, values)
                        report.pictures(fit.step, sheet)
                        note(f"update {fit.step}: held-out PSNR {values['held_out_psnr']:.2f} dB")
                    report.plot()
                if dist.is_initialized():
                    dist.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()
    return path


def learning_rate(update: int, total: int, settings: RunSettings) -> float:
    """Of update `update`, counted from 1, of `total`, as published."""
    lr, rising = settings.lr, settings.warmup * total
    if update <= rising:
        return lr * update / rising
    after = update - rising
    if settings.lr_decay_style == "linear":
        return lr * (total - after) / total
    if settings.lr_decay_style == "cosine":
        fall = (1 + math.cos(math.pi * min(1.0, after / total))) * (1 / settings.lr_decay_ratio - 1) / 2
        return lr * settings.lr_decay_ratio * (fall + 1)
    return lr


def open_data(settings: RunSettings, world: int) -> tuple[Callable, int]:
    """A function from updates made to the batches that follow; updates per epoch."""
    together = world * settings.gradient_accumulation_steps
    if settings.global_batch_size % together:
        raise UserError(
            f"global_batch_size {settings.global_batch_size} cannot be shared by {world} processes with "
            f"{settings.gradient_accumulation_steps} micro-batches each: make it a multiple of {together}"
        )
    files = find_images(settings.data_args)
    order = batch_order(files, settings.data_args, settings.global_batch_size // together, settings.global_seed)
    data = Photographs([path for path, _ in files], settings.data_args)
    note(f"{len(files):,} pictures, {order.length() * order.batch * world:,} of them in each epoch's batches")
    micro_batches = settings.gradient_accumulation_steps
    return partial(batches_from, data, order, micro_batches, settings.num_workers), order.length() // micro_batches


def make_updater(settings: RunSettings, device: torch.device) -> Updater:
    """Network, discriminator, perceptual loss and optimizers, at update 0."""
    torch.manual_seed(settings.global_seed)
    network = build(settings)
    load_weights(network, settings)
    if settings.freeze_encoder:
        for part in network.encoding:
            network.model.get_submodule(part).requires_grad_(False)
    losses = settings.vq_loss
    discriminator = None
    if losses.disc_weight:
        discriminator = PatchDiscriminator(losses.disc_dim, losses.disc_num_layers).to(device)
    perceptual = perceptual_loss(settings).to(device) if losses.perceptual_weight else None
    network.to(device)
    if settings.compile:
        for part in network.convolutional:
            network.model.get_submodule(part).compile()
    return Updater(network, settings, discriminator, perceptual)


def perceptual_loss(settings: RunSettings) -> torch.nn.Module:
    if settings.perceptual == "lite0":
        return Lite0Distance(load_lite0())
    if not (settings.lpips_vgg and settings.lpips_linear):
        raise UserError(
            "vq_loss.perceptual_weight is above 0, so LPIPS needs two files, which are not fetched by themselves:\n"
            f"  --lpips_vgg=PATH     {VGG_SOURCE}\n"
            f"  --lpips_linear=PATH  {LINEAR_SOURCE}\n"
            "Or do without: --vq_loss.perceptual_weight=0, or --perceptual=lite0 (offline, another measure)."
        )
    return load_lpips(Path(settings.lpips_vgg), Path(settings.lpips_linear))


def fit_to_data(fit: Updater, settings: RunSettings, batches: Callable) -> None:
    """What is computed from pictures before the first update."""

    def pictures() -> Iterator[Tensor]:
        return (normalize(micro_batches[0].pixels).to(fit.device) for micro_batches in batches(0))

    if settings.linear_start and isinstance(fit.network.model, ChameleonVQGAN):
        note("starting as a linear autoencoder of the pictures")
        start_linear(fit.network.model, pictures())
    if settings.fit_codebooks != "none":
        note(f"fitting the codebooks to the encoder ({settings.fit_codebooks})")
        with fit.autocast():
            fit_codebooks(fit.network, pictures(), settings.fit_codebooks)
    if fit.ema is not None:
        fit.ema.restart(fit.network.model)


def require_readable(failed: int, seen: int, micro_batches: list[Batch], settings: RunSettings) -> None:
    for batch in micro_batches:
        for problem in batch.failed:
            note(f"skipped, another picture stands in: {problem}")
    if failed > max(settings.data_args.max_failed * seen, 3):
        raise UserError(
            f"{failed} of {seen} pictures could not be read, more than data_args.max_failed="
            f"{settings.data_args.max_failed} allows; the messages above name them"
        )


class Window:
    """Means over the updates since the last line, over all ranks; which codes occurred in them."""

    def __init__(self, device: torch.device):
        self.device = device
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.updates, self.images, self.began = 0, 0, time.monotonic()
        self.codes: dict[str, list[Tensor]] = {}

    def add(self, terms: dict[str, Tensor], codes: dict[str, Tensor], images: int) -> None:
        self.updates += 1
        self.images += images
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0) + term.detach().float()
        for branch, grid in codes.items():
            self.codes.setdefault(branch, []).append(grid.flatten().unique())

    def close(self) -> dict[str, float]:
        names = sorted(self.sums)
        means = torch.stack([self.sums[name] for name in names]) / self.updates
        if dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        values = dict(zip(names, means.tolist(), strict=True))
        for branch, found in self.codes.items():
            values[f"codes_in_use_{branch}"] = len(torch.cat(found).unique())
        values["images_per_second"] = self.images / max(time.monotonic() - self.began, 1e-9)
        self._clear()
        return values
