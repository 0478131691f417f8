"""What a run tells: a line per interval, metrics.jsonl, TensorBoard, loss.png."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import nn

from training.data.packing import Batch, Skipped
from training.generation.answers import Said
from training.models.llm import LLMConfig
from training.models.siglip import VisionConfig
from vistoken.cli import FULL
from vistoken.errors import UserError
from vistoken.jobs.files import write_bytes

METRICS, SKIPPED = "metrics.jsonl", "skipped.jsonl"
# dense bf16 or fp16 matrix products, in 10^12 operations a second, by a part of the device's name; from the data sheets
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "A800": 312, "H800": 989, "L40S": 362}


class Report:
    """Rank 0's log. The other ranks have none."""

    def __init__(self, output: Path, step: int, total_steps: int, interval: int, world: int, precision: str):
        """`step` is where the run goes on: what an interrupted one logged beyond it is dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self.output, self.total_steps, self.interval = output, total_steps, interval
        self.peak = peak_flops(precision) * world
        threading.excepthook = _quiet_on_full_disk
        with _writing(output):
            _drop_after(output / METRICS, step)
            _drop_after(output / SKIPPED, step)
            self._metrics = (output / METRICS).open("a", buffering=1)
            self._skipped = (output / SKIPPED).open("a", buffering=1)
            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
        self._since, self._tokens, self._flops, self._steps = time.monotonic(), 0, 0.0, 0

    def step(self, metrics: dict[str, Any], skipped: Sequence[Skipped], flops: float) -> None:
        """Log a step. `metrics` has epoch, iter, step, c_loss, z_loss, grad_norm, lr, vit_lr, tokens;
        now and then validation, the loss of each record's held-out samples.
        """
        left_out = not isfinite(metrics["grad_norm"])
        self._append(self._metrics, metrics | ({"grad_norm": None} if left_out else {}))
        if left_out:
            print(f"step {metrics['step']} left out: a gradient overflowed fp16; the loss scale is halved", flush=True)
        for one in skipped:
            self._append(self._skipped, {"step": metrics["step"], **one._asdict()})
            print(f"replaced {one.name} by {one.instead}: {one.reason}", flush=True)
        self._tokens += metrics["tokens"]
        self._flops += flops
        self._steps += 1
        if held_out := metrics.get("validation"):
            losses = ", ".join(f"{name} {loss:.4f}" for name, loss in held_out.items())
            print(f"step {metrics['step']} | loss of held-out samples: {losses}", flush=True)
            with _writing(self.output):
                for name, loss in held_out.items():
                    self._board.add_scalar(f"validation/{name}", loss, metrics["step"])
        if metrics["step"] % self.interval == 0 or metrics["step"] in (1, self.total_steps):
            self._line(metrics)

    def _append(self, file: TextIO, content: dict[str, Any]) -> None:
        with _writing(self.output):
            file.write(json.dumps(content) + "\n")

    def _line(self, metrics: dict[str, Any]) -> None:
        elapsed = time.monotonic() - self._since
        rate = self._tokens / elapsed
        left = (self.total_steps - metrics["step"]) * elapsed / self._steps
        mfu = f" | MFU {self._flops / elapsed / self.peak:.1%}" if self.peak else ""
        print(
            f"step {metrics['step']}/{self.total_steps} | epoch {metrics['epoch']} | loss {metrics['c_loss']:.4f} | "
            f"z {metrics['z_loss']:.3f} | norm {metrics['grad_norm']:.3f} | lr {metrics['lr']:.2e} | "
            f"{rate:,.0f} tok/s{mfu} | {memory_used() / 2**30:.1f} GiB | {timedelta(seconds=int(left))} left",
            flush=True,
        )
        with _writing(self.output):
            numbers = {name: value for name, value in metrics.items() if name not in ("type", "validation")}
            for name, value in (numbers | {"tokens_per_second": rate}).items():
                self._board.add_scalar(name, value, metrics["step"])
        self._since, self._tokens, self._flops, self._steps = time.monotonic(), 0, 0.0, 0

    def answers(self, shown: Sequence[tuple[str, Said]], step: int) -> None:
        """Show the prompt sheet's answers, each with its prompt's name, in TensorBoard."""
        with _writing(self.output):
            for name, said in shown:
                self._board.add_text(f"samples/{name}", said.text, step)
                for number, picture in enumerate(said.pictures):
                    self._board.add_image(f"samples/{name}/{number}", np.asarray(picture), step, dataformats="HWC")

    def plot(self) -> None:
        """Draw loss.png; left out where matplotlib, an extra, is not installed."""
        if find_spec("matplotlib") is None:
            return
        from matplotlib.figure import Figure

        lines = list(read_metrics(self.output / METRICS))
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="optimizer step", ylabel="cross-entropy")
        types = sorted({line.get("type", "") for line in lines})
        for name in types:  # text alone has another loss than images: one line for both would only jump
            of_type = [line for line in lines if line.get("type", "") == name]
            axes.plot([line["step"] for line in of_type], [line["c_loss"] for line in of_type], linewidth=1, label=name)
        if held_out := [line for line in lines if "validation" in line]:
            losses = [line["validation"]["all"] for line in held_out]
            axes.plot([line["step"] for line in held_out], losses, marker="o", markersize=3, label="validation")
        if len(types) > 1 or held_out:
            axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        with _writing(self.output):
            figure.savefig(self.output / "loss.png", dpi=120)

    def close(self) -> None:
        with _writing(self.output):
            self._metrics.close()
            self._skipped.close()
            self._board.close()


def _quiet_on_full_disk(died: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread, and raises what that met in ours, too: one message is enough."""
    if not (isinstance(died.exc_value, OSError) and died.exc_value.errno in FULL):
        threading.__excepthook__(died)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write the logs ({error.strerror or error}). Make room, then run the same command again."
        ) from error


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The steps in a metrics file. A line that was cut off by a kill ends it."""
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


def _drop_after(path: Path, step: int) -> None:
    kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
    write_bytes(path, "".join(kept).encode())


def memory_used() -> int:
    """Bytes at the peak: of the GPU, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(precision: str) -> float:
    """The device's peak in operations a second, 0 where it is not known, as in fp32 and tf32."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() and precision in ("bf16", "fp16") else ""
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)


class Flops:
    """Operations that a batch needs: 2 per weight and token forward, 2 for the gradient that flows on and 2 for the
    weight's own where it is trained; attention's products besides. Recomputation does not count as useful.
    """

    def __init__(self, model: nn.Module, llm: LLMConfig, vision: VisionConfig | None):
        self.features_per_tile = vision.grid**2 if vision else 0
        self.attention = 6 * llm.hidden_size * llm.num_hidden_layers  # causal: half of 12
        self.parts: Counter[str] = Counter()
        for name, parameter in model.named_parameters():
            part = name.split(".")[0]
            if "embed" not in name and not name.startswith("vit.head."):
                self.parts[part if part in ("lm_head", "vit", "adapter") else "decoder"] += parameter.numel() * (
                    6 if parameter.requires_grad else 4
                )

    def of(self, batch: Batch) -> float:
        squares = batch.lengths.double().square().sum().item()
        return self.count(len(batch.tokens), batch.label_count, len(batch.tiles), squares)

    def count(self, tokens: int, labels: int, tiles: int, squares: float) -> float:
        """`squares` is the sum of the samples' squared lengths."""
        return (
            self.parts["decoder"] * tokens
            + self.parts["lm_head"] * labels
            + (self.parts["vit"] + self.parts["adapter"]) * tiles * self.features_per_tile
            + self.attention * squares
        )
