"""Both jobs on a real Ray of this machine: equal bytes with two actors, whatever dies."""

import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from codebook_job import arguments, dataset, launch, output_bytes, write_config
from PIL import Image
from sharding import samples, write_tar
from store_server import s3_server

from pre_tokenize import pre_tokenize
from vision_tokenizer.tokenizer.tokenizer_codebook_inference import main
from vistoken.errors import UserError
from vistoken.jobs.files import run_lock
from vistoken.jobs.ray_workers import ATTEMPTS, Queue
from vistoken.store import Url

TINY = ("--resolution_type", "fixed", "--resolution", "32", "--batch_size", "2")


def test_the_queue_hands_out_again_what_a_dead_actor_had():
    queue = Queue()
    assert [queue.claim(0, 5, True), queue.claim(0, 5, False), queue.claim(1, 5, True)] == [(0, 0), (1, 0), (2, 0)]
    queue.finish(0)
    assert queue.lost(0) == 1
    assert queue.claim(1, 5, False) == (3, 0)  # a round that goes on is not given what may be its death
    assert queue.claim(2, 5, True) == (1, 1) and queue.claim(2, 5, False) is None  # alone in its round
    queue.finish(1)
    assert queue.claim(1, 5, False) == (4, 0) and queue.claim(1, 5, False) is None
    assert not queue.state().complete
    for chunk in (2, 3, 4):
        queue.finish(chunk)
    assert queue.state().complete


def test_another_actor_does_the_step_of_a_dead_one():
    queue = Queue()
    assert [queue.step(0, 1), queue.step(1, 1)] == ["do", "wait"]
    queue.lost(0)
    assert queue.step(1, 1) == "do"
    queue.step_done(1)
    assert queue.step(0, 1) == "done"


@pytest.fixture
def job(tmp_path, tiny_dualvitok):
    """`job(root, *flags)` encodes 400 lines, in chunks of 64, into `root`."""
    pytest.importorskip("ray")
    for folder in ("images", "annotations"):
        (tmp_path / folder).mkdir()
    for number in range(40):
        Image.new("RGB", (40, 48), (6 * number, 90, 7)).save(tmp_path / "images" / f"{number}.png")
    for name in "ab":
        lines = [json.dumps({"id": number, "images": [f"{number % 40}.png"]}) for number in range(200)]
        (tmp_path / f"annotations/{name}.jsonl").write_text("\n".join(lines))

    def run(root, *flags):
        folders = dataset(tmp_path / root, tmp_path / "images", tmp_path / "annotations")
        config = write_config(tmp_path / f"{root}.json", birds=folders)
        return main(arguments(*tiny_dualvitok, config, *TINY, *flags))

    return run


def actors(mark: str = "ray::Actor") -> list[int]:
    """The processes of actors: Ray gives them titles."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(mark.encode()):
                found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_two_actors_one_of_them_killed_write_the_bytes_of_one_process(job, tmp_path, capsys):
    assert job("alone") == 0
    killed = []

    def kill_one():
        results = tmp_path / "ray/jsonl_after_tokenizer/dualvitok/fixed_32/.work"
        while not killed:
            if any(results.glob("[ab]/0*.json")) and (found := actors()):
                os.kill(found[0], signal.SIGKILL)
                with pytest.raises(UserError, match="another run is writing here"), run_lock(results):
                    pass
                killed.append(found[0])
            time.sleep(0.01)

    threading.Thread(target=kill_one, daemon=True).start()
    assert job("ray", "--ray", "--ray_cpus", "1") == 0
    assert killed
    assert output_bytes(tmp_path / "ray") == output_bytes(tmp_path / "alone")
    assert "400 images encoded" in capsys.readouterr().out.rpartition("data set")[2]  # the driver's report
    assert job("ray", "--ray", "--ray_cpus", "1") == 0, "nothing is left to do"


@pytest.mark.slow
def test_the_same_command_goes_on_after_its_driver_was_killed(job, tmp_path, tiny_dualvitok):
    assert job("alone") == 0
    config = write_config(
        tmp_path / "ray.json", birds=dataset(tmp_path / "ray", tmp_path / "images", tmp_path / "annotations")
    )
    driver = launch(*tiny_dualvitok, config, *TINY, "--ray", "--ray_cpus", "1")
    results = tmp_path / "ray/jsonl_after_tokenizer/dualvitok/fixed_32/.work"
    while not any(results.glob("[ab]/0*.json")):
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.01)
    driver.kill()
    driver.communicate()
    while actors():  # they end with their driver
        time.sleep(0.1)
    assert not (results.parent / "run_summary.json").exists()
    assert job("ray", "--ray", "--ray_cpus", "1") == 0
    assert output_bytes(tmp_path / "ray") == output_bytes(tmp_path / "alone")


@pytest.mark.slow
def test_a_node_joins_in_mid_run_and_a_node_is_lost(tmp_path, tiny_dualvitok, monkeypatch):
    """Who joins gets tar files; the one that it had when its node went is read by another actor."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    for number in range(30):
        write_tar(tmp_path / f"in/{number:02}.tar", samples(2, first=10 * number))
    entry = {"shards": f"{tmp_path}/in/{{00..29}}.tar", "tokenizer_inference": True}
    configs = [
        write_config(tmp_path / f"{name}.json", set={**entry, "root": str(tmp_path / name)})
        for name in ("alone", "ray")
    ]
    flags = ("--resolution_type", "fixed", "--resolution", "64")
    assert main(arguments(*tiny_dualvitok, configs[0], *flags)) == 0

    log, hurry = tmp_path / "opened.txt", tmp_path / "hurry"
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import os, sys, time\n"
        "def look(event, args):\n"
        "    if event == 'open' and str(args[0]).endswith('.tar'):\n"
        f"        with open({str(log)!r}, 'a') as log: print(os.getpid(), os.path.basename(args[0]), file=log)\n"
        "        for _ in range(20):\n"
        f"            if not os.path.exists({str(hurry)!r}): time.sleep(0.05)\n"
        "sys.addaudithook(look)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def opened() -> list[list[str]]:
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        run = launch(*tiny_dualvitok, configs[1], *flags, "--ray", cluster.address, "--ray_cpus", "1")
        while not opened():
            assert run.poll() is None
            time.sleep(0.05)
        first, node = opened()[0][0], cluster.add_node(num_cpus=1)
        while not (joined := [pid for pid, _ in opened() if pid != first]):
            assert run.poll() is None, "it ended before the node had joined"
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)
        hurry.touch()
        _, stderr = run.communicate(timeout=300)
    finally:
        cluster.shutdown()
    assert run.returncode == 0, stderr
    # the lost actor may have died in the middle of a write: the next run removes what it left
    final = {name: content for name, content in output_bytes(tmp_path / "ray").items() if not name.endswith(".tmp")}
    assert final == output_bytes(tmp_path / "alone")
    lost = [shard for pid, shard in opened() if pid == joined[0]][-1]
    assert [pid for pid, shard in opened() if shard == lost and pid != joined[0]], "it was not handed out again"


@pytest.mark.slow
def test_a_chunk_that_kills_its_actors_fails_alone(job, tmp_path, monkeypatch):
    """Its picture ends the process that decodes it, as a crash in a library would."""
    bad = tmp_path / "images/bad.png"
    bad.write_bytes((tmp_path / "images/0.png").read_bytes())
    file = tmp_path / "annotations/b.jsonl"
    file.write_text(file.read_text().replace('"id": 199, "images": ["39.png"]', '"id": 399, "images": ["bad.png"]'))
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import os, sys\n"
        "def look(event, args):\n"
        "    if event == 'open' and str(args[0]).endswith('bad.png'): os.kill(os.getpid(), 9)\n"
        "sys.addaudithook(look)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert job("ray", "--ray", "--ray_cpus", "1", "--max_failed", "1") == 0
    folder = tmp_path / "ray/jsonl_after_tokenizer/dualvitok/fixed_32"
    failed = [json.loads(line) for line in (folder / "b.rejected.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in failed} == {"worker died"} and len(failed) == 200 % 64
    assert failed[0]["detail"].startswith(f"{ATTEMPTS} workers died")
    assert json.loads((folder / "run_summary.json").read_text())["total"]["done"] == 400 - 200 % 64


@pytest.mark.slow
def test_token_files_made_by_two_actors_in_a_bucket(tmp_path, chameleon_folder):
    """Pre-tokenization on Ray, into a store that answers 500 to every tenth request."""
    pytest.importorskip("ray")
    turns = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "It is."}]
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns}] * 20))
    command = ["--in_filename", tmp_path / "data.json", "--tokenizer_dir", chameleon_folder, "--target_size", "64"]
    command = [*map(str, command), "--device", "cpu", "--items_per_file", "4"]
    assert pre_tokenize.main([*command, "--out_dir", str(tmp_path / "alone")]) == 0
    with s3_server("lab") as server:
        server.every = 10
        assert pre_tokenize.main([*command, "--out_dir", "s3://lab/out", "--ray", "--ray_cpus", "1"]) == 0
        assert server.failed
        server.every = 0
        names = ["manifest.json", "0-of-1-record.jsonl", *(f"files/{n}-{n + 4}.arrow" for n in range(0, 20, 4))]
        assert [(Url("s3://lab/out") / name).read_bytes() for name in names] == [
            (tmp_path / "alone" / name).read_bytes() for name in names
        ]


def test_without_ray_the_flag_names_the_extra(job, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(Exception, match=r"Please install vistoken\[ray\]"):
        job("ray", "--ray")
