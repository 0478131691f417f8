"""The codebook command as real processes: killed, restarted, in crews of any size, and as the document runs it."""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from codebook_job import SCRIPT, arguments, dataset, kill_all, launch, output_bytes, read_lines, write_config
from PIL import Image

pytestmark = pytest.mark.slow
REPO = Path(__file__).parents[1]
FAST = ("--resolution_type", "fixed", "--resolution", "64", "--batch_size", "4", "--max_failed", "1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, golden) -> Path:
    """Two data sets of a few thousand lines: few small pictures, some missing, some rejected, some lines broken."""
    base = tmp_path_factory.mktemp("flock")
    photo = Image.open(golden / "images" / "photo.jpg")
    (base / "images").mkdir()
    for number in range(12):
        photo.rotate(30 * number).resize((96 + 8 * number, 96)).save(base / "images" / f"{number}.png")
    photo.resize((400, 40)).save(base / "images" / "12.png")
    names = random.Random(0)
    for name, files, lines in (("birds", 3, 300), ("fish", 1, 500)):
        (base / name).mkdir()
        for file in range(files):
            picked = [f"{names.randint(0, 13)}.png" for _ in range(lines)]  # 13.png does not exist
            text = [json.dumps({"images": [one], "id": n}) for n, one in enumerate(picked)]
            text[17] = text[17][:-3]
            (base / name / f"{file:04}.jsonl").write_text("\n".join(text))
    return base


def job(folders: Path, root: Path) -> Path:
    root.mkdir(exist_ok=True)
    sets = {name: dataset(root / name, folders / "images", folders / name) for name in ("birds", "fish")}
    return write_config(root / "meta.json", **sets)


def result(root: Path) -> dict[str, bytes]:
    return {name: content for name, content in output_bytes(root).items() if name != "meta.json"}


@pytest.fixture(scope="module")
def uninterrupted(folders, tiny_dualvitok, tmp_path_factory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("uninterrupted")
    process = launch(*tiny_dualvitok, job(folders, root), *FAST)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "birds" in stdout
    return result(root)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(ranks, folders, tiny_dualvitok, uninterrupted, tmp_path):
    process = launch(*tiny_dualvitok, job(folders, tmp_path), *FAST, ranks=ranks)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert result(tmp_path) == uninterrupted
    for name, items in (("birds", 900), ("fish", 500)):
        summary = next((tmp_path / name).rglob("run_summary.json"))
        total = json.loads(summary.read_text())["total"]
        assert total["items"] == items == total["done"] + total["rejected"] + total["failed"]


def test_killed_and_restarted_at_random_it_writes_the_same_bytes(folders, tiny_dualvitok, uninterrupted, tmp_path):
    """Each run is killed a little after its next result, or while it still starts, with other ranks each time."""
    config, chance = job(folders, tmp_path), random.Random(0)
    kills = 0
    for number in range(7):
        before, more = parts_written(tmp_path), chance.randint(0, 1)
        process = launch(*tiny_dualvitok, config, *FAST, ranks=1 + number % 3)
        while process.poll() is None and parts_written(tmp_path) < before + more:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 1.0 if more == 0 else 0.05))
        kills += process.poll() is None  # a fast machine may be through before the last ones
        kill_all(process, config)
    assert kills >= 3
    process = launch(*tiny_dualvitok, config, *FAST, ranks=2)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert result(tmp_path) == uninterrupted


def parts_written(root: Path) -> int:
    return sum(1 for _ in root.glob("*/*/*/*/.work/*/*.json"))


def test_two_machines_share_a_folder(folders, tiny_dualvitok, uninterrupted, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "flock"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *endpoint]
    command = [*torchrun, str(SCRIPT), *arguments(*tiny_dualvitok, job(folders, tmp_path), *FAST)]
    agents = [
        subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for agent in agents:
        _, stderr = agent.communicate(timeout=300)
        assert agent.returncode == 0, stderr
    assert result(tmp_path) == uninterrupted


def test_a_second_run_on_the_same_output_is_refused(folders, tiny_dualvitok, tmp_path):
    config = job(folders, tmp_path)
    first = launch(*tiny_dualvitok, config, *FAST)
    while not parts_written(tmp_path):
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # it is still there, however slowly the second starts
    second = launch(*tiny_dualvitok, config, *FAST)
    _, stderr = second.communicate(timeout=60)
    kill_all(first, config)
    assert second.returncode == 2
    assert f"another run is writing here (process {first.pid} on {socket.gethostname()}" in stderr


def test_a_full_disk_is_an_error_and_leaves_nothing_half_written(folders, tiny_dualvitok, uninterrupted, tmp_path):
    config = job(folders, tmp_path)

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write past the limit fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = launch(*tiny_dualvitok, config, *FAST, preexec_fn=small_disk)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "cannot write (File too large)" in stderr
    assert "Traceback" not in stderr
    assert not list(tmp_path.rglob("*.tmp"))
    assert not [name for name in result(tmp_path) if name.endswith(".jsonl")]
    process = launch(*tiny_dualvitok, config, *FAST)
    process.communicate(timeout=300)
    assert result(tmp_path) == uninterrupted


@pytest.mark.parametrize(
    ("block", "tag", "generated"), [("illume_fixed_256", "fixed_256", 5), ("illume_fixed_anchors", "fixed_anchors", 8)]
)
def test_the_documents_command_as_written(block, tag, generated, tiny_dualvitok, tmp_path):
    """In a checkout whose config and checkpoint, at the document's paths, are those of the tiny tokenizer."""
    examples = "configs/data_configs/train_data_examples"
    for folder in ("vision_tokenizer", examples):
        made = shutil.ignore_patterns("jsonl_after_tokenizer", "__pycache__")
        shutil.copytree(REPO / folder, tmp_path / folder, ignore=made)
    config, checkpoint = tiny_dualvitok
    for source, target in (
        (config, "configs/example/dualvitok/dualvitok_anyres_max512.py"),
        (checkpoint, "checkpoints/dualvitok/pytorch_model.bin"),
    ):
        (tmp_path / target).parent.mkdir(parents=True)
        shutil.copy(source, tmp_path / target)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    script = "set -e\n" + (REPO / "tests" / "documents" / f"{block}.sh").read_text()
    run = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    for name, items in (("examples_generation", generated), ("examples_editing", 3)):
        folder = tmp_path / examples / name / "jsonl_after_tokenizer"
        lines = [line for file in sorted((folder / "dualvitok" / tag).glob("????.jsonl")) for line in read_lines(file)]
        assert len(lines) == items
        assert sum(json.loads((folder / f"{tag}_data_statistic.json").read_text()).values()) == items
