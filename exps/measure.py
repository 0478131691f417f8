"""What the benchmarks share: two sides by turns, commands as processes, photographs, the matrix rate, the report."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from vistoken.jobs.counts import table

REPO = Path(__file__).parents[1]
PHOTOS = REPO / "configs/data_configs/train_data_examples/examples_generation/images"

# A process begins with its parent's peak as its own, so a small one stands between this large one and the command.
_LAUNCHER = """
import resource, subprocess, sys, time
began = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def measure_command(arguments: list) -> tuple[float, float]:
    """A Python command as a process: its wall seconds and peak memory in MiB."""
    command = [sys.executable, "-c", _LAUNCHER, sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"failed: {' '.join(command[3:])}\n{result.stderr}")
    seconds, peak = map(float, result.stdout.split())
    return seconds, peak


def make_images(folder: Path, count: int, ratio: float = 1.0) -> list[Path]:
    """JPEGs of about a megapixel and of one width / height, made from the example photographs, no two alike."""
    folder.mkdir(parents=True)
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))]
    size = (round((1e6 * ratio) ** 0.5), round((1e6 / ratio) ** 0.5))
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        turned = photos[number % len(photos)].rotate(7 * (number // len(photos)))
        turned.resize(size, Image.Resampling.BICUBIC).save(path, quality=92)
    return paths


def matrix_rate(device: torch.device, dtype: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """The best observed rate of a large square product, FLOP per second of `clock`."""
    size, products = (8192, 10) if device.type == "cuda" else (2048, 1)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in "ab")
    best = 0.0
    for _ in range(8):
        began = clock()
        for _ in range(products):
            product = a @ b
        product[0, 0].item()  # waits for the device
        best = max(best, products * 2 * size**3 / (clock() - began))
    return best


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes. What the device still had to do before does not count, what it is given does."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Rates(NamedTuple):
    """Items per second that passed, and per second of CPU time, which other processes disturb less: of this process
    and of those that it started and that have ended.
    """

    wall: float
    cpu: float


class Clock:
    """Starts when it is made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), sum(os.times()[:4])

    def rates(self, items: int) -> Rates:
        wall, cpu = time.perf_counter() - self._wall, sum(os.times()[:4]) - self._cpu
        return Rates(items / wall, items / max(cpu, 0.01))


def best_by_turns(turns: int, *sides: Callable[[int], Rates]) -> list[Rates]:
    """The best rates of each side, of `turns` runs by turns: other work on the machine comes and goes.

    A side is given the number of the turn.
    """
    runs = [[side(turn) for side in sides] for turn in range(turns)]
    return [Rates(max(run.wall for run in side), max(run.cpu for run in side)) for side in zip(*runs, strict=True)]


def print_report(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """`columns` of all rows as a table, then everything as one line of JSON."""
    print(table([columns, *[[row[column] for column in columns] for row in rows]]))
    print(json.dumps({**report, "runs": rows}))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for the record."""
    processor = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores ({processor})"
    return {"python": platform.python_version(), "torch": torch.__version__, "device": name}
