"""Running the codebook command in tests."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from vision_tokenizer.tokenizer.tokenizer_codebook_inference import main

SCRIPT = Path(__file__).parents[1] / "vision_tokenizer" / "tokenizer" / "tokenizer_codebook_inference.py"
OUTPUT_FIELDS = ("image_sizes", "image_embed_inds", "matched_ratios")


def write_config(path: Path, **datasets: dict) -> Path:
    path.write_text(json.dumps(datasets))
    return path


def dataset(root: Path, image_dir: Path, annotation_dir: Path, inference: bool = True) -> dict:
    folders = {"root": str(root), "image_dir": str(image_dir), "annotation_dir": str(annotation_dir)}
    return {**folders, "tokenizer_inference": inference}


def arguments(config: Path, checkpoint: Path, data_config: Path, *more: str) -> list[str]:
    given = ["--model_config", config, "--tokenizer_checkpoint", checkpoint, "--data_config", data_config]
    return [*map(str, given), "--device", "cpu", "--num_workers", "2", *more]


def run_here(*args) -> int:
    """The command in this process; its exit code."""
    return main(arguments(*args))


def launch(*args, ranks: int = 1, **popen) -> subprocess.Popen:
    """The command as a process of its own, under torchrun for several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), *arguments(*args)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


def kill_all(process: subprocess.Popen, mark: Path) -> None:
    """kill -9 for a launched job and its workers, which torchrun puts into sessions of their own: `mark` is in
    all their command lines."""
    process.kill()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may end while we look
            if str(mark).encode() in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
    process.communicate(timeout=60)


def kill_one_rank(process: subprocess.Popen, mark: Path) -> None:
    """kill -9 for one worker of a job launched under torchrun, which then ends the others and itself."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            if str(mark).encode() in command and b"torch.distributed.run" not in command:
                os.kill(int(folder.name), signal.SIGKILL)
                break
    process.communicate(timeout=120)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def output_bytes(root: Path) -> dict[str, bytes]:
    """Every final file below `root` that must not depend on how the job was run."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".work" not in path.parts and path.name != "run_summary.json"
    }
