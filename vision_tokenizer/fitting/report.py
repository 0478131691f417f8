"""What a training run tells: lines of numbers, TensorBoard, a plot of the losses, held-out pictures."""

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vision_tokenizer.fitting.data import list_images
from vision_tokenizer.fitting.transforms import shorter_side_crop
from vision_tokenizer.fitting.update import Updater
from vision_tokenizer.images.dualvitok import denormalize, normalize, to_image, to_pixels
from vision_tokenizer.images.files import read_image
from vision_tokenizer.review.quality import CodeUse, psnr, ssim
from vistoken.cli import note
from vistoken.errors import Failed, UserError
from vistoken.jobs.files import atomic_write

GROUPS = {"semantic": "semantic_loss", "discriminator": "disc_loss", "logits": "disc_loss"}


class Report:
    """`metrics.jsonl`, TensorBoard where it is installed, `loss.png` where matplotlib is."""

    def __init__(self, folder: Path, resumed_at: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / "metrics.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.rows: list[dict[str, Any]] = [row for row in map(json.loads, lines) if row["step"] <= resumed_at]
        with atomic_write(self.file) as file:  # lines of updates that are made again would stand there twice
            file.writelines(f"{json.dumps(row)}\n".encode() for row in self.rows)
        self.board = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)

    def line(self, step: int, values: dict[str, float]) -> None:
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # in fp16, norms may not be
        row = {"step": step, **{name: float(f"{value:.6g}") for name, value in values.items()}}
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(f"{json.dumps(row)}\n")
        if self.board is not None:
            for name, value in values.items():
                group = next((group for start, group in GROUPS.items() if name.startswith(start)), "gen_loss")
                self.board.add_scalar(f"{group}/{name}", value, step)

    def pictures(self, step: int, sheet: Image.Image) -> None:
        sheet.save(self.folder / "held_out.png")
        if self.board is not None:
            self.board.add_image("held_out", np.asarray(sheet), step, dataformats="HWC")
            self.board.flush()

    def plot(self) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        figure = Figure(figsize=(9, 6))
        axes = figure.subplots(2, 1, sharex=True)
        for name in ("rec_loss", "p_loss", "vq_loss", "semantic_codebook_loss", "semantic_cos_loss"):
            points = [(row["step"], row[name]) for row in self.rows if name in row]
            if points:
                axes[0].plot(*zip(*points, strict=True), label=name)
        held_out = [(row["step"], row["held_out_psnr"]) for row in self.rows if "held_out_psnr" in row]
        if held_out:
            axes[1].plot(*zip(*held_out, strict=True), marker=".")
        axes[0].set_yscale("log")
        axes[0].legend()
        axes[1].set(xlabel="update", ylabel="held-out PSNR, dB")
        with atomic_write(self.folder / "loss.png") as file:
            figure.savefig(file, format="png", dpi=110)


class HeldOut:
    """The same pictures, reconstructed every so often, as squares of one size."""

    SHOWN = 8

    def __init__(self, folder: Path, side: int):
        self.pixels = []
        for path in list_images(folder):
            try:
                self.pixels.append(to_pixels(shorter_side_crop(read_image(path).convert("RGB"), side)))
            except Failed as error:
                note(f"left out of the held-out pictures: {error}")
        if not self.pixels:
            raise UserError(f"{folder}: no picture in it that can be read; --eval_path is to hold some")

    @torch.no_grad()
    def measure(self, fit: Updater) -> tuple[dict[str, float], Image.Image]:
        """Means over the pictures, with the running means of the weights where there are some; and a sheet of
        originals above their reconstructions.
        """
        state = {f"model.{name}": tensor for name, tensor in (fit.ema.means.items() if fit.ema else ())}
        use: dict[str, list[Tensor]] = {}
        rows, scores = [], []
        for pixels in self.pixels:
            x = normalize(pixels[None]).to(fit.device)
            with fit.autocast():
                found = torch.func.functional_call(fit.network, state, (x,))
            for branch, codes in found.codes.items():
                use.setdefault(branch, []).append(codes.flatten().cpu())
            again = denormalize(found.reconstruction[0].float())
            scores.append((psnr(pixels, again), ssim(pixels, again)))
            rows.append((pixels, again))
        psnrs, ssims = zip(*scores, strict=True)
        values = {"held_out_psnr": fmean(psnrs), "held_out_ssim": fmean(ssims)}
        for branch, codes in use.items():
            counted = CodeUse(int(torch.cat(codes).max()) + 1)
            counted.add(torch.cat(codes).numpy())
            values[f"held_out_codes_{branch}"] = counted.distinct
            values[f"held_out_perplexity_{branch}"] = counted.perplexity
        columns = [torch.cat(pair, dim=1) for pair in rows[: self.SHOWN]]
        return values, to_image(torch.cat(columns, dim=2))
