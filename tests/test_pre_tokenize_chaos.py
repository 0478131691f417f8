"""pre_tokenize.py killed at every write and at random moments, restarted with other splits: always the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from codebook_job import kill_all
from PIL import Image

from pre_tokenize import concat_record

pytestmark = pytest.mark.slow
REPO = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

# Forks a process for each "splits rank deaths" line and lets SIGKILL strike at its n-th fsync, where a write is
# complete but not yet under its name, or has its name and is not yet safe. The parent computes nothing with torch.
MORTAL = """
import os, signal, sys
import pre_tokenize.chameleon, pre_tokenize.job
from pre_tokenize.pre_tokenize import main

def mortal_fsync(descriptor, left=[0]):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

for line in sys.stdin:
    splits, rank, moment = line.split()
    child = os.fork()
    if not child:
        mortal_fsync.__defaults__[0][0] = int(moment)
        os.fsync = mortal_fsync
        os._exit(main([*sys.argv[1:], "--splits", splits, "--rank", rank]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, chameleon_folder):
    """36 items with small images, some of them shared, one missing; a chunk each."""
    folder = tmp_path_factory.mktemp("data")
    items = []
    for i in range(36):
        Image.new("RGB", (64 + i, 80), (7 * i, 200 - 5 * i, 90)).save(folder / f"{i}.png")
        turns = [
            {"from": "human", "value": f"<|image|> What is in picture {i}?"},
            {"from": "gpt", "value": "<|image|>"},
        ]
        items.append({"conversations": turns, "image": [f"{i}.png", "0.png" if i != 5 else "missing.png"]})
    (folder / "data.json").write_text(json.dumps(items))
    flags = {"in_filename": folder / "data.json", "image_dir": folder, "tokenizer_dir": chameleon_folder}
    flags |= {"target_size": 64, "items_per_file": 1, "batch_size": 4, "max_failed": 0.2, "device": "cpu"}
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.fixture(scope="module")
def expected(arguments, tmp_path_factory):
    """The bytes of an uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("expected")
    start([sys.executable, "-u", "pre_tokenize/pre_tokenize.py", *arguments, f"--out_dir={folder}"]).wait()
    return final_bytes(folder)


def final_bytes(folder):
    concat_record.main([f"--sub_record_dir={folder}", f"--save_path={folder / 'record.json'}"])
    assert not list(folder.rglob("*.tmp"))
    paths = [*(folder / "files").iterdir(), *folder.glob("record.*"), folder / "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def start(command, **more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), cwd=REPO, env=environment, start_new_session=True, **more)


def finished_chunks(folder):
    return len(list(folder.glob(".work/results/[0-9]*[0-9].json")))


def kill_on_progress(process, folder, pause):
    """SIGKILL to `process` and all its ranks `pause` seconds after the next chunk is complete."""
    before, patience = finished_chunks(folder), time.monotonic() + 120
    while process.poll() is None and finished_chunks(folder) == before and time.monotonic() < patience:
        time.sleep(0.002)
    time.sleep(pause)
    kill_all(process, folder)


def test_killed_at_every_write(arguments, expected, tmp_path):
    """The n-th run dies at its n-th fsync, with other splits each time; then all ranks of three are let through."""
    command = [sys.executable, "-c", MORTAL, *arguments, f"--out_dir={tmp_path}"]
    process = start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(splits, rank, moment):
        process.stdin.write(f"{splits} {rank} {moment}\n")
        process.stdin.flush()
        answer = ""
        while not answer.lstrip("-").isdigit():  # the command's own report comes first
            answer = process.stdout.readline().strip()
        return int(answer)

    deaths = [run(splits=1 + n % 3, rank=n % (1 + n % 3), moment=n) for n in range(1, 21)]
    assert deaths.count(-signal.SIGKILL) >= 15
    for rank in (0, 1, 2, 1):  # the last again after it has finished
        assert run(splits=3, rank=rank, moment=10**6) == 0
    process.stdin.close()
    process.wait()
    assert final_bytes(tmp_path) == expected


LOOP = """
for i in {{0..{last}}}
do
  export CUDA_VISIBLE_DEVICES=${{i}}
  python -u pre_tokenize/pre_tokenize.py \\
  --splits={splits} \\
  --rank=${{i}} \\
  --in_filename {in_filename} \\
  --out_dir {out_dir} \\
  --target_size 64 {more} &> {out_dir}/${{i}}.log &
done
wait
"""


def loop(splits, out_dir, arguments):
    """The document's loop."""
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    in_filename = flags.pop("in_filename")
    flags.pop("target_size")
    more = " ".join(f"--{name} {value}" for name, value in flags.items())
    script = LOOP.format(last=splits - 1, splits=splits, in_filename=in_filename, out_dir=out_dir, more=more)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return start(["env", f"PATH={path}", "bash", "-c", script])


def test_the_documents_loop_killed_and_restarted_with_other_splits(arguments, expected, tmp_path):
    rng = random.Random(0)
    for splits in (2, 3):
        kill_on_progress(loop(splits, tmp_path, arguments), tmp_path, rng.uniform(0, 0.2))
    kill_on_progress(
        start([*TORCHRUN, "pre_tokenize/pre_tokenize.py", *arguments, f"--out_dir={tmp_path}"]), tmp_path, 0
    )
    assert loop(3, tmp_path, arguments).wait() == 0
    assert final_bytes(tmp_path) == expected
    assert sorted(path.name for path in tmp_path.glob("*-record.jsonl")) == [f"{i}-of-3-record.jsonl" for i in range(3)]


def test_torchrun_gives_the_same_bytes_and_a_rerun_changes_nothing(arguments, expected, tmp_path):
    command = ["pre_tokenize/pre_tokenize.py", *arguments, f"--out_dir={tmp_path}"]
    assert start([*TORCHRUN, *command]).wait() == 0
    assert final_bytes(tmp_path) == expected
    assert start([sys.executable, "-u", *command]).wait() == 0
    assert final_bytes(tmp_path) == expected


def test_a_second_run_in_the_same_folder_is_refused(arguments, tmp_path):
    command = [sys.executable, "-u", "pre_tokenize/pre_tokenize.py", *arguments, f"--out_dir={tmp_path}"]
    first = start(command)
    while not finished_chunks(tmp_path) and first.poll() is None:
        os.kill(first.pid, signal.SIGCONT)
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second = start([*command, "--splits=2"], stderr=subprocess.PIPE, text=True)
        assert "another run is writing here" in second.communicate()[1]
        assert second.returncode == 2
    finally:
        os.kill(first.pid, signal.SIGCONT)
        first.wait()
