"""Results, locks, manifests and workers: what a job's exactness rests on."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest

from pre_tokenize.job import one_ahead
from vistoken.errors import Failed, UserError
from vistoken.jobs import progress
from vistoken.jobs.chunks import Item, chunk_table
from vistoken.jobs.counts import Counts, Problem, counts_table
from vistoken.jobs.files import atomic_write, remove_leftovers, run_lock, write_bytes
from vistoken.jobs.manifest import check_manifest, read_manifest
from vistoken.jobs.progress import Progress, Stopwatch
from vistoken.jobs.results import Result, Results, WholeResult
from vistoken.jobs.run import Output, Source, Writer, todo
from vistoken.jobs.workers import FixedRange, OneProcess

PROBLEM = Problem.of(Failed("image not found", "x.png"), Path("a.jsonl"), Item.of(2, "line 3", b"", {"id": "x"}))


def counts(items: int, failed: int = 0) -> Counts:
    reasons = Counter({("failed", "image not found"): failed}) if failed else Counter()
    return Counts(items=items, done=items - failed, reasons=reasons)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    write_bytes(path, b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_refuses_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write"):
        write_bytes(tmp_path / "file" / "below", b"")
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "other"):
        (tmp_path / "input").read_bytes()  # not the disk that is written to


def test_leftovers_of_the_dead_go_and_of_the_living_stay(tmp_path):
    host = os.uname().nodename
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (tmp_path / f"a.jsonl.{host}-{pid}.tmp").touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"a.jsonl.{host}-{os.getpid()}.tmp"]


@pytest.mark.parametrize("kind", ["chunk", "whole"])
def test_a_result_comes_back_and_must_add_up(kind, tmp_path):
    folder = tmp_path / "results"
    results = Results(folder) if kind == "chunk" else WholeResult(folder, tmp_path / "a.jsonl")
    assert results.read(0) is None
    results.write(0, Result(counts(3, failed=1), [PROBLEM], {results.path(0, ".jsonl"): b"lines"}))
    back = results.read(0)
    assert (back.counts, back.problems) == (counts(3, failed=1), [PROBLEM])
    if kind == "chunk":
        results.path(0, ".json").write_text("{")
    else:
        (tmp_path / "a.rejected.jsonl").write_text("")
    assert results.read(0) is None
    with pytest.raises(AssertionError, match="3 items in, but 2 done"):
        results.write(1, Result(Counts(items=3, done=2)))


@pytest.mark.parametrize("kind", ["chunk", "whole"])
def test_a_result_is_replaced_whole_or_done_again(kind, tmp_path, monkeypatch):
    """Killed between the new files and the new entry, the old entry must not vouch for the new files."""
    folder = tmp_path / "results"
    results = Results(folder) if kind == "chunk" else WholeResult(folder, tmp_path / "a.jsonl")
    payload = results.path(0, ".jsonl")
    results.write(0, Result(counts(3, failed=1), [PROBLEM], {payload: b"two lines"}))

    def killed(path, content, **options):
        write_bytes(path, content, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr("vistoken.jobs.results.write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        results.write(0, Result(counts(3), [], {payload: b"three lines"}))
    assert payload.read_bytes() == b"three lines"
    assert results.read(0) is None
    monkeypatch.undo()
    results.write(0, Result(counts(3), [], {payload: b"three lines"}))
    assert results.read(0).problems == [] and not (tmp_path / "a.rejected.jsonl").exists()


def test_a_chunk_costs_a_sync_for_each_of_its_files_and_no_more(tmp_path, monkeypatch):
    """Those of folders are slow on a shared disk, which 64 processes write to. A lost file is found by its size."""
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    results = Results(tmp_path / "results")
    for index in range(3):
        results.write(index, Result(counts(3), [], {results.path(index, ".jsonl"): b"lines"}))
    assert len(synced) == 3 * 2


def test_a_result_whose_files_are_lost_is_none(tmp_path):
    """As after a power cut, or where somebody deleted a damaged file."""
    results = Results(tmp_path / "results")
    elsewhere = tmp_path / "files" / "0.arrow"
    for lose in (elsewhere.unlink, lambda: elsewhere.write_bytes(b"toke")):
        results.write(0, Result(counts(3), [], {elsewhere: b"tokens", results.path(0, ".jsonl"): b""}))
        assert results.read(0) is not None
        lose()
        assert results.read(0) is None


def test_a_write_that_fails_is_raised_by_the_loop():
    class Chunk:
        def write(self, fails):
            if fails:
                raise UserError("disk full")

    with Writer(Stopwatch()) as writer:
        with pytest.raises(UserError, match="disk full"):
            for number in range(10):
                writer.write(Chunk(), number == 0)
        with pytest.raises(UserError, match="disk full"):
            writer.write(Chunk(), True)
            writer.flush()


def test_a_write_that_has_failed_is_raised_with_the_next_chunk():
    """Not only when so many wait: images were encoded for nothing meanwhile."""
    chunk = Mock(write=Mock(side_effect=UserError("disk full")))
    with Writer(Stopwatch()) as writer, pytest.raises(UserError, match="disk full"):
        writer.write(chunk)
        while not chunk.write.called:
            time.sleep(0.01)
        time.sleep(0.1)
        writer.write(Mock())
        pytest.fail("it was not raised")


def test_one_run_at_a_time(tmp_path):
    holder = (
        "import sys, time; from pathlib import Path; from vistoken.jobs.files import run_lock\n"
        f"with run_lock(Path({str(tmp_path)!r}), 1, 3): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with run_lock(tmp_path, 0, 3):
        pass  # another worker of the same run
    with pytest.raises(UserError, match=f"process {process.pid} on"), run_lock(tmp_path, 1, 3):
        pass
    with pytest.raises(UserError, match=f"process {process.pid} on"), run_lock(tmp_path):
        pass
    process.kill()
    process.wait()
    with run_lock(tmp_path):
        pass  # the kernel freed the lock of the killed one


def test_a_lock_on_a_full_disk_is_named(tmp_path):
    (tmp_path / "0-of-1.lock").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"0-of-1\.lock: cannot write"), run_lock(tmp_path):
        pass


def test_a_manifest_refuses_another_device_unless_that_is_allowed(tmp_path):
    first = {"device": {"type": "cuda", "name": "A100", "cudnn": "90100"}, "settings": {"resolution": 256}}
    other = {**first, "device": {**first["device"], "name": "H100"}}
    check_manifest(tmp_path, first)
    with pytest.raises(UserError, match=r"device.name = 'A100', now it is 'H100'.*--allow_other_devices"):
        check_manifest(tmp_path, other)
    check_manifest(tmp_path, other, other_devices=True)
    assert read_manifest(tmp_path) == first  # what it was begun with
    with pytest.raises(UserError, match=r"settings.resolution"):
        check_manifest(tmp_path, {**other, "settings": {"resolution": 512}}, other_devices=True)


def test_a_manifest_refuses_another_value_and_takes_new_inputs(tmp_path):
    first = {"settings": {"resolution": 256}, "inputs": {"a.jsonl": "1"}}
    check_manifest(tmp_path, first)
    check_manifest(tmp_path, first)
    with pytest.raises(UserError, match=r"settings.resolution = 256, now it is 512"):
        check_manifest(tmp_path, {**first, "settings": {"resolution": 512}})
    with pytest.raises(UserError, match=r"inputs.a.jsonl = '1', now it is '2'"):
        check_manifest(tmp_path, {**first, "inputs": {"a.jsonl": "2"}})
    check_manifest(tmp_path, {**first, "inputs": {"a.jsonl": "1", "b.jsonl": "2"}})
    assert read_manifest(tmp_path)["inputs"] == {"a.jsonl": "1", "b.jsonl": "2"}
    with pytest.raises(UserError, match=r"inputs.b.jsonl = '2', now it is None"):
        check_manifest(tmp_path, first)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(UserError, match=r"manifest.json: cannot read \(Is a directory\)"):
        read_manifest(tmp_path)


def test_a_manifest_binds_once_something_is_done(tmp_path):
    """A first try with a batch too large for the memory must not refuse the second with a smaller one."""

    def begin(batch_size, worker=0):
        output = Output(tmp_path / "out", {"settings": {"batch_size": batch_size}}, sources(tmp_path))
        return output.begin(FixedRange(worker, 2))

    with begin(4096):
        pass
    with begin(8):
        with pytest.raises(UserError, match=r"batch_size = 8, now it is 1"), begin(1, worker=1):
            pass  # the first worker is at it
        Results(tmp_path / "out" / ".work" / "a").write(0, Result(counts(3)))
    with pytest.raises(UserError, match=r"batch_size = 8, now it is 4"), begin(4):
        pass


def test_processes_on_two_kinds_of_gpu_are_not_mixed_unless_that_is_allowed(tmp_path):
    class Later(OneProcess):
        """One that finds the output begun by the first."""

        def on_first(self, step):
            pass

    def begin(name, workers, **allowed):
        return Output(tmp_path / "out", {"device": {"name": name}}, sources(tmp_path)).begin(workers, **allowed)

    with begin("A100", OneProcess()), begin("A100", Later()):
        with pytest.raises(UserError, match=r"device.name = 'A100', now it is 'H100'"), begin("H100", Later()):
            pass
        with begin("H100", Later(), other_devices=True):
            pass


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 20])
def test_splits_share_out_every_chunk_once(splits):
    claimed = [number for rank in range(splits) for number in FixedRange(rank, splits).claim(range(10))]
    assert sorted(claimed) == list(range(10))


def sources(tmp_path: Path) -> list[Source]:
    made = []
    for name, items in (("a", 5), ("b", 3)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f'{{"id": {n}}}\n' for n in range(items)))
        table = chunk_table(path, 2, tmp_path / "work" / f"{name}.chunks.json")
        made.append(Source(table, Results(tmp_path / "work" / name)))
    return made


def run_job(tmp_path: Path, fail: bool) -> list[tuple[str, int, bool]]:
    workers, seen = OneProcess(), []
    with Progress(workers, 8, "test") as progress:
        for task in todo(sources(tmp_path), workers, progress):
            source, chunk = task.source, task.chunk
            seen.append((source.table.path.stem, chunk.index, task.previous is not None))
            failed = int(fail and chunk.index == 1)
            source.results.write(chunk.index, Result(counts(chunk.items, failed), [PROBLEM] * failed))
    return seen


def test_a_rerun_does_what_failed_and_nothing_else(tmp_path):
    assert [(name, index) for name, index, _ in run_job(tmp_path, fail=True)] == [
        *(("a", 0), ("a", 1), ("a", 2)),
        *(("b", 0), ("b", 1)),
    ]
    assert run_job(tmp_path, fail=False) == [("a", 1, True), ("b", 1, True)]
    assert run_job(tmp_path, fail=False) == []


def test_a_queue_hears_of_each_chunk_that_has_nothing_left_to_do(tmp_path):
    """Ray's driver waits until every chunk that was claimed is finished."""
    run_job(tmp_path, fail=False)
    found, workers, heard = sources(tmp_path), OneProcess(), []
    found[0].was_finished = True
    workers.finished = heard.append
    with Progress(workers, 8, "test") as progress:
        assert not list(todo(found, workers, progress))
    assert heard == [0, 1, 2, 3, 4]


def test_text_is_tokenised_one_chunk_ahead_and_no_more_of_it_once_the_run_is_stopped():
    begun, waits, release = [], [], threading.Event()

    def open_chunk(number):
        begun.append(number)
        assert number == 0 or release.wait(60)
        return number

    def stopped(stage):
        waits.append(stage)
        if len(waits) == 2:  # for chunk 1, with chunk 2 in the queue
            threading.Timer(0.05, release.set).start()
            raise KeyboardInterrupt
        return nullcontext()

    chunks = one_ahead(map(str, range(9)), lambda task: open_chunk(int(task)), stopped)
    assert next(chunks) == 0
    with pytest.raises(KeyboardInterrupt):
        next(chunks)
    assert 2 not in begun


def test_a_defect_of_the_text_ends_the_run_with_its_own_error():
    def open_chunk(task):
        raise UserError(f"{task}: cannot read the input")

    with pytest.raises(UserError, match=r"a\.json: cannot read"):
        next(one_ahead(iter(["a.json"]), open_chunk, Stopwatch()))


def test_the_table_shows_that_items_add_up():
    text = counts_table({"birds": counts(1200, failed=3)})
    assert text.splitlines()[2].split() == ["birds", "1,200", "1,197", "0", "3"]
    assert "failed: image not found: 3" in text


def test_the_bar_moves_with_every_item_and_counts_images_as_the_summary_does(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN", 0.0)
    workers, names = OneProcess(), ("items", "images", "failed")
    with progress.Progress(workers, 4, "codes") as shown:
        chunk = progress.ItemsUnderWay(shown)

        def now(image=None, encoded=True):
            if image:
                chunk.image_done(image, encoded)
            return tuple(workers.totals(names).values())

        chunk.expect(0, ["a", "b", "a"])
        chunk.expect(1, ["a"])
        assert now() == (0, 0, 0)
        assert now("a") == (1, 1, 0)
        assert now("b") == (2, 4, 0)  # item 0 names an image twice, and the summary counts it twice
        chunk.expect(2, ["b", "c"])
        assert now("c", encoded=False) == (3, 4, 0)
        counts = Counts(items=4, done=2)
        counts.reasons["failed", "image not found"] = 2  # the fourth was no JSON: nothing of it was to be encoded
        shown.done(counts, chunk.shown)
        assert now() == (4, 4, 2)
