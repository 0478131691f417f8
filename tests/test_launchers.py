"""Codebook inference under whatever starts its processes: arrays, srun without torchrun, and signals to make room."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from codebook_job import SCRIPT, arguments, dataset, output_bytes, read_lines, run_here, write_config
from PIL import Image

from vision_tokenizer.codebook import encoder
from vision_tokenizer.codebook import output as codebook_output
from vision_tokenizer.codebook.job import prepare
from vision_tokenizer.models.dualvitok.model import load_dualvitok
from vision_tokenizer.tokenizer.tokenizer_codebook_inference import parse_args
from vistoken import cli
from vistoken.jobs.workers import adopt_slurm_step, first_host

TINY = ("--resolution_type", "fixed", "--resolution", "32", "--batch_size", "2")


@pytest.fixture
def data(tmp_path, tiny_dualvitok):
    """`data(root)` is the call's arguments: two files of 12 and 5 lines, into `root`."""
    for folder in ("images", "annotations"):
        (tmp_path / folder).mkdir()
    for number in range(12):
        Image.new("RGB", (40, 48), (20 * number, 90, 7)).save(tmp_path / "images" / f"{number}.png")
    for name, count in (("a", 12), ("b", 5)):
        lines = [json.dumps({"id": number, "images": [f"{number}.png"]}) for number in range(count)]
        (tmp_path / f"annotations/{name}.jsonl").write_text("\n".join(lines))

    def given(root):
        folders = dataset(tmp_path / root, tmp_path / "images", tmp_path / "annotations")
        return (*tiny_dualvitok, write_config(tmp_path / f"{root}.json", birds=folders), *TINY)

    return given


@pytest.fixture
def small(monkeypatch, tiny_dualvitok):
    """Chunks of two lines, and the model is loaded once."""
    monkeypatch.setitem(codebook_output.CHUNK_ITEMS, "cpu", 2)
    model = load_dualvitok(*tiny_dualvitok, device="cpu")
    monkeypatch.setattr("vision_tokenizer.models.dualvitok.model.load_dualvitok", lambda *args, **options: model)


def array_task(monkeypatch, number: int, count: int) -> None:
    for key, value in {"ID": 5 + number, "MIN": 5, "MAX": 4 + count, "COUNT": count}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", str(value))


def test_an_array_of_four_in_any_order_writes_the_bytes_of_one_process(data, small, tmp_path, monkeypatch, capsys):
    assert run_here(*data("alone")) == 0
    numbers = random.sample(range(4), 4)
    for number in numbers:
        array_task(monkeypatch, number, 4)
        assert not list((tmp_path / "array").rglob("b.jsonl")), numbers
        assert run_here(*data("array"), "--splits", "4") == 0
    assert output_bytes(tmp_path / "array") == output_bytes(tmp_path / "alone")
    assert capsys.readouterr().err.count("others are not through") == 3
    array_task(monkeypatch, 1, 4)  # once more, as after a requeue: there is nothing left to do
    assert run_here(*data("array"), "--splits", "4") == 0
    assert output_bytes(tmp_path / "array") == output_bytes(tmp_path / "alone")


def test_an_array_that_tries_again_what_failed(data, small, tmp_path, monkeypatch):
    image = tmp_path / "images/3.png"
    image.rename(tmp_path / "away")
    for number in range(3):
        run_here(*data("array"), "--splits", "3", "--rank", str(number), "--max_failed", "1")
    folder = tmp_path / "array/jsonl_after_tokenizer/dualvitok/fixed_32"
    assert [line["reason"] for line in read_lines(folder / "a.rejected.jsonl")] == ["image not found"]
    (tmp_path / "away").rename(image)
    for number in range(3):
        assert run_here(*data("array"), "--splits", "3", "--rank", str(number), "--max_failed", "1") == 0
    assert run_here(*data("alone")) == 0
    assert output_bytes(tmp_path / "array") == output_bytes(tmp_path / "alone")


def test_the_rank_comes_from_a_kubernetes_index(data, small, tmp_path, monkeypatch):
    for number in (1, 0):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(number))
        assert run_here(*data("indexed"), "--splits", "2") == 0
    assert run_here(*data("alone")) == 0
    assert output_bytes(tmp_path / "indexed") == output_bytes(tmp_path / "alone")


def test_an_array_with_gaps_must_say_its_rank(data, monkeypatch, capsys):
    array_task(monkeypatch, 0, 2)
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "9")
    with pytest.raises(SystemExit):
        run_here(*data("array"), "--splits", "2")
    assert "say which --rank this task is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nodes", "host"), [("gpu[004-007,9],x", "gpu004"), ("gpu1", "gpu1"), ("a,b", "a"), ("r1-n[2,5]-ib", "r1-n2-ib")]
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_a_batch_step_is_no_srun(monkeypatch):
    """In a batch script SLURM_PROCID and SLURM_NTASKS are set, too, but nobody else runs."""
    monkeypatch.setattr(os, "environ", {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"})
    adopt_slurm_step()
    assert "RANK" not in os.environ


@pytest.mark.slow
def test_srun_with_three_tasks_writes_the_bytes_of_one_process(data, tmp_path):
    """Without torchrun rank 0 holds the store itself, and must not leave while another one still asks it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_ID": "0"}
    environment |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    command = [sys.executable, str(SCRIPT), *arguments(*data("srun"))]
    tasks = [
        subprocess.Popen(
            command,
            env={**environment, "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for task in tasks:
        _, stderr = task.communicate(timeout=300)
        assert task.returncode == 0, stderr
    assert run_here(*data("alone")) == 0
    assert output_bytes(tmp_path / "srun") == output_bytes(tmp_path / "alone")


@pytest.mark.parametrize(
    ("sent", "message"), [("SIGUSR1", "open are finished, [1-9]"), ("SIGTERM", "under way is dropped")]
)
def test_a_signal_to_make_room_ends_with_the_code_that_requeues(
    data, small, tmp_path, monkeypatch, capsys, sent, message
):

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    results = tmp_path / "stopped/jsonl_after_tokenizer/dualvitok/fixed_32/.work"
    load, codes = codebook_output.CodebookOutput.begin, []

    def send():
        while not list(results.glob("a/0*.json")):
            time.sleep(0.001)
        os.kill(os.getpid(), getattr(signal, sent))

    def begin(self, *args):
        threading.Thread(target=send, daemon=True).start()
        return load(self, *args)

    given = data("stopped")

    def prepare_slowly(*args, **options):
        time.sleep(0.1)
        return prepare(*args, **options)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(encoder, "CPU_STREAMS", 1)  # however many cores: not all chunks are taken at once
            patch.setattr(codebook_output.CodebookOutput, "begin", begin)
            patch.setattr("vision_tokenizer.codebook.job.prepare", prepare_slowly)
            cli.run_command(lambda: run_here(*given), leave=codes.append, resumes=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        cli.stopping.clear()
    assert codes == [75]
    assert re.search(message, capsys.readouterr().err)
    assert not list(results.parent.glob("b.jsonl"))
    assert run_here(*given) == 0 and run_here(*data("alone")) == 0
    assert output_bytes(tmp_path / "stopped") == output_bytes(tmp_path / "alone")


def test_the_kubernetes_recipe_is_a_call_that_parses(monkeypatch):
    recipe = yaml.safe_load((SCRIPT.parents[2] / "exps/cluster/kubernetes.yaml").read_text())
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "63")
    args = parse_args(recipe["spec"]["template"]["spec"]["containers"][0]["command"][4:])
    assert (args.rank, args.splits) == (63, recipe["spec"]["completions"])
    assert recipe["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [cli.PREEMPTED]
