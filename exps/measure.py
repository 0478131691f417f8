"""What the benchmarks share: commands as processes, and the machine in words."""

import os
import platform
import subprocess
import sys

import torch

# A process begins with its parent's peak as its own, so a small one stands between this large one and the command.
_LAUNCHER = """
import resource, subprocess, sys, time
began = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def run_command(arguments: list) -> tuple[float, float]:
    """A Python command as a process: its wall seconds and peak memory in MiB."""
    command = [sys.executable, "-c", _LAUNCHER, sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"failed: {' '.join(command[3:])}\n{result.stderr}")
    seconds, peak = map(float, result.stdout.split())
    return seconds, peak


def describe_machine(device: torch.device) -> dict[str, str]:
    """Versions and hardware, for the record."""
    processor = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores ({processor})"
    return {"python": platform.python_version(), "torch": torch.__version__, "device": name}
