"""Codebook inference that is stopped at every single step of writing, and what may not be mixed or overwritten."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest
from codebook_job import dataset, output_bytes, read_lines, run_here, write_config
from PIL import Image

from vision_tokenizer.codebook import output as codebook_output
from vision_tokenizer.models.dualvitok.model import load_dualvitok
from vistoken.errors import UserError
from vistoken.jobs.workers import OneProcess

TINY = ("--resolution_type", "fixed", "--resolution", "32", "--batch_size", "2", "--max_failed", "1")


class Killed(BaseException):
    pass


class Death:
    """Lets `steps` files below a folder come and go, then none at all: from there on each try raises `Killed`.

    It listens to the interpreter's own audit events, so nothing is patched and files elsewhere are nobody's business.
    """

    STEPS = ("os.rename", "os.remove", "shutil.rmtree")

    def __init__(self) -> None:
        self.folder, self.steps = "", None
        sys.addaudithook(self._strike)

    def _strike(self, event: str, arguments: tuple) -> None:
        if self.steps is None or event not in self.STEPS or not os.fspath(arguments[0]).startswith(self.folder):
            return
        if self.steps == 0:
            raise Killed
        self.steps -= 1

    @contextmanager
    def after(self, steps: int, folder: Path) -> Iterator[None]:
        self.folder, self.steps = str(folder), steps
        try:
            yield
        finally:
            self.steps = None


@pytest.fixture(scope="session")
def death() -> Death:
    return Death()  # a hook stays for as long as the interpreter does


@pytest.fixture(scope="module")
def tokenizer(tiny_dualvitok):
    return load_dualvitok(*tiny_dualvitok, device="cpu")


@pytest.fixture
def job(tmp_path, tiny_dualvitok, tokenizer, monkeypatch):
    """`job(*flags)` runs it over two files, in chunks of two lines; `b.png` is missing at first."""
    monkeypatch.setitem(codebook_output.CHUNK_ITEMS, "cpu", 2)
    monkeypatch.setattr("vision_tokenizer.models.dualvitok.model.load_dualvitok", lambda *args, **options: tokenizer)
    for folder in ("images", "annotations"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (40, 40), "teal").save(tmp_path / "images" / "a.png")
    for name, images in (("0", "abb"), ("1", "a")):
        lines = [json.dumps({"images": [f"{image}.png"], "id": n}) for n, image in enumerate(images)]
        # a carriage return inside an object is white space for JSON, but the end of a line for many programs
        (tmp_path / "annotations" / f"{name}.jsonl").write_bytes("\n".join(lines).replace(", ", ",\r").encode())
    config = write_config(
        tmp_path / "meta.json", birds=dataset(tmp_path / "out", tmp_path / "images", tmp_path / "annotations")
    )
    return lambda *flags: run_here(*tiny_dualvitok, config, *TINY, *flags)


def killed_everywhere(death: Death, folder: Path, prepare, run) -> Iterator[int]:
    """Call `prepare()`, then `run()`, which is killed one step later each time, until it comes to its end."""
    for steps in count():
        prepare()
        with suppress(Killed), death.after(steps, folder):
            run()
            return
        yield steps


@pytest.mark.slow
def test_a_retry_killed_at_every_step_ends_in_the_same_bytes(job, tmp_path, death):
    def some_failed():
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "images" / "b.png").unlink(missing_ok=True)
        job()
        Image.new("RGB", (40, 48), "red").save(tmp_path / "images" / "b.png")

    some_failed()
    job()
    uninterrupted = output_bytes(tmp_path / "out")
    assert len(read_lines(tmp_path / "out/jsonl_after_tokenizer/dualvitok/fixed_32/0.jsonl")) == 3
    deaths = 0
    for _ in killed_everywhere(death, tmp_path / "out", some_failed, job):
        deaths += 1
        job()
        assert output_bytes(tmp_path / "out") == uninterrupted
        assert not list((tmp_path / "out").rglob("*.tmp"))
        assert not list((tmp_path / "out").rglob(".work/*/*"))  # nothing is left to retry
    assert deaths > 10


@pytest.mark.slow
def test_beginning_anew_killed_at_every_step_never_mixes_settings(job, tmp_path, death):
    Image.new("RGB", (40, 48), "red").save(tmp_path / "images" / "b.png")
    other = ("--crop_percent_thresh", "0.1")  # rejects what the former settings encode
    job("--overwrite", *other)
    anew = output_bytes(tmp_path / "out")
    job("--overwrite")
    former = output_bytes(tmp_path / "out")

    def unfinished():
        shutil.rmtree(tmp_path / "out")
        hidden = (tmp_path / "images" / "b.png").rename(tmp_path / "images" / "hidden")
        job()
        hidden.rename(tmp_path / "images" / "b.png")

    deaths = 0
    for _ in killed_everywhere(death, tmp_path / "out", unfinished, lambda: job("--overwrite", *other)):
        deaths += 1
        try:
            job(*other)  # without --overwrite: goes on with the new settings, or is refused
            assert output_bytes(tmp_path / "out") == anew
        except UserError as error:
            assert "crop_percent_thresh" in str(error)
            job()
            assert output_bytes(tmp_path / "out") == former
    assert deaths > 10


def test_what_a_killed_process_left_is_removed(job, tmp_path):
    job()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = tmp_path / "out/jsonl_after_tokenizer"
    for name in ("dualvitok/fixed_32/0.jsonl", "dualvitok/fixed_32/.work/0.done.json", "fixed_32_data_statistic.json"):
        (folder / f"{name}.{os.uname().nodename}-{dead.pid}.tmp").touch()
    job()
    assert not list(folder.rglob("*.tmp"))


def test_one_bad_annotation_file_does_not_keep_the_others(job, tmp_path, capsys):
    (tmp_path / "annotations" / "2.json").write_text('{"images": []}')
    (tmp_path / "annotations" / "3.jsonl").write_text("\n")
    (tmp_path / "annotations" / "4.json").mkdir()
    assert job() == 1
    folder = tmp_path / "out/jsonl_after_tokenizer/dualvitok/fixed_32"
    assert [len(read_lines(folder / f"{name}.jsonl")) for name in "01"] == [1, 1]
    out = capsys.readouterr().out
    summary = json.loads((folder / "run_summary.json").read_text())
    assert (summary["total"]["items"], len(summary["unreadable"])) == (4, 3)
    for message in ("2.json, line 1: expected a JSON list", "3.jsonl: no items", "4.json: cannot read the input"):
        assert message in out
        assert any(message in error for error in summary["unreadable"])


def test_annotation_files_may_join_but_not_leave(job, tmp_path):
    job()
    (tmp_path / "annotations" / "2.jsonl").write_text('{"images": "a.png"}')
    job()
    statistics = tmp_path / "out/jsonl_after_tokenizer/fixed_32_data_statistic.json"
    assert json.loads(statistics.read_text()) == {"ratio_h32_w32": 3}
    (tmp_path / "annotations" / "2.jsonl").unlink()
    with pytest.raises(UserError, match=r"inputs\.2\.jsonl = '[0-9a-f]{64}', now it is None"):
        job()


def test_damaged_work_files(job, tmp_path):
    assert job() == 0
    folder = tmp_path / "out/jsonl_after_tokenizer/dualvitok/fixed_32"
    before = output_bytes(tmp_path / "out")
    (folder / ".work" / "0.chunks.json").write_text("{")
    assert job() == 0 and output_bytes(tmp_path / "out") == before
    (folder / ".work" / "0.done.json").write_text("{")
    with pytest.raises(UserError, match=r"0\.done\.json: damaged .* --no-resume"):
        job()
    assert job("--no-resume") == 0 and output_bytes(tmp_path / "out") == before


def test_overwrite_removes_what_the_job_wrote_and_nothing_else(job, tmp_path):
    (tmp_path / "annotations" / "2.jsonl").write_text('{"images": "a.png"}')
    job()
    (tmp_path / "annotations" / "2.jsonl").unlink()
    folder = tmp_path / "out/jsonl_after_tokenizer/dualvitok/fixed_32"
    (folder / "notes.jsonl").write_text("mine")
    job("--overwrite")
    names = ["0.jsonl", "0.rejected.jsonl", "1.jsonl", "manifest.json", "notes.jsonl", "run_summary.json"]
    assert sorted(path.name for path in folder.iterdir() if path.name != ".work") == names
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    with pytest.raises(UserError, match=r"manifest\.json: cannot remove"):
        job("--overwrite")


def test_annotations_that_change_meanwhile(job, tmp_path, monkeypatch):
    path = tmp_path / "annotations" / "0.jsonl"
    before = path.read_bytes()

    def wait_and_edit(workers, meanwhile):
        path.write_bytes(before + b"\n" + before)

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"0\.jsonl: changed while it was encoded"):
        patch.setattr(OneProcess, "wait_for_all", wait_and_edit)
        job()
    folder = tmp_path / "out/jsonl_after_tokenizer/dualvitok/fixed_32"
    assert not (folder / "0.jsonl").exists() and not (folder / ".work" / "0").exists()
    with pytest.raises(UserError, match=r"inputs\.0\.jsonl"):
        job()
    assert job("--overwrite") == 0
    assert len(read_lines(folder / "0.jsonl")) == 2


def test_files_that_would_be_written_over_each_other(job, tmp_path, tiny_dualvitok):
    images, annotations, out = tmp_path / "images", tmp_path / "annotations", tmp_path / "out"
    (tmp_path / "link").symlink_to(out)
    out.mkdir()
    config = tmp_path / "clash.json"

    def run() -> None:
        run_here(*tiny_dualvitok, config, *TINY)

    write_config(config, a=dataset(out, images, annotations), b=dataset(tmp_path / "link", images, annotations))
    with pytest.raises(UserError, match="data sets a and b have the same root"):
        run()
    own = out / "jsonl_after_tokenizer/dualvitok/fixed_32"
    shutil.copytree(annotations, own)
    write_config(config, a=dataset(out, images, own))
    with pytest.raises(UserError, match="data set a: its codes would be written among its annotations"):
        run()
    write_config(config, a=dataset(out, images, out / "jsonl_after_tokenizer"))
    with pytest.raises(UserError, match="data set a: its codes would be written among its annotations"):
        run()
    assert [file.read_bytes() for file in sorted(own.iterdir())] == [
        file.read_bytes() for file in sorted(annotations.iterdir())
    ]
    shutil.rmtree(out)
    shutil.copy(annotations / "0.jsonl", annotations / "0.rejected.jsonl")
    write_config(config, a=dataset(out, images, annotations))
    assert run_here(*tiny_dualvitok, config, *TINY) == 2
    assert not out.exists()


def test_an_output_folder_that_cannot_be_made(job, tmp_path, capsys):
    (tmp_path / "out").write_text("a file is in the way")
    assert job() == 2
    assert "cannot write (Not a directory)" in capsys.readouterr().out


@pytest.mark.slow
def test_ranks_that_see_different_work_are_refused():
    rank = (
        "import sys; from vistoken.errors import UserError; from vistoken.jobs.workers import launched_workers\n"
        "workers = launched_workers()\n"
        "workers.on_first(lambda: None)\n"
        "try: list(workers.claim(range(int(sys.argv[1]))))\n"
        "except UserError as error: print(error)\n"
        "workers.wait_for_all(lambda: None)"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", rank, str(3 + number)],
            env={**environment, "RANK": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = "".join(process.communicate(timeout=60)[0] for process in ranks)
    assert said.count("every machine must see the same") == 1
