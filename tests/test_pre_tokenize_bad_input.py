"""pre_tokenize.py where items, inputs, calls or earlier outputs are wrong: what is told, and what the next run does."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from token_job import ask, files_of, make_picture, rejected, run_here, samples

from pre_tokenize.pre_tokenize import main
from vistoken.errors import UserError

REPO = Path(__file__).parents[1]


@pytest.fixture
def tokenize(tmp_path, chameleon_folder):
    return partial(run_here, tmp_path, chameleon_folder)


@pytest.fixture
def picture(tmp_path):
    return partial(make_picture, tmp_path)


def test_bad_items_fail_and_the_rest_go_on(tokenize, picture, tmp_path, golden):
    """One line of the rejected list for each, with its index, line and reason."""
    (tmp_path / "huge.png").write_bytes(huge_png())
    (tmp_path / "empty.png").touch()
    bad = {
        "not an object": "text",
        "image not found": ask("<|image|>", images=[tmp_path / "nowhere.png"]),
        "image unreadable": ask("<|image|>", images=[golden / "images" / "broken.jpg"]),
        "image too large": ask("<|image|>", images=[tmp_path / "huge.png"]),
        "image count": ask("<|image|><|image|>", images=[picture(0)]),
        "no conversation": {"conversations": []},
        "nothing to predict": {"conversations": [{"from": "human", "value": "hm"}]},
        "not JSON": ask("half \ud83d of a pair"),
    }
    worse = [ask("<|image|>", images=[name]) for name in (tmp_path / "empty.png", "nosuch://host/x.png")]
    items = [*bad.values(), ask("fine"), *worse]
    assert tokenize(items, "--max_failed", 1) == 0
    left_out = rejected(tmp_path / "out")
    assert [left_out[item]["reason"] for item in range(len(bad))] == list(bad)
    assert left_out[1]["where"] == "item 1" and left_out[1]["file"].endswith("data.json")
    empty, foreign = (left_out[item] for item in range(len(items) - 2, len(items)))
    assert empty["reason"] == "image unreadable" and empty["detail"].endswith("empty.png: the file is empty")
    assert foreign["reason"] == "image unreadable" and "nosuch://host/x.png" in foreign["detail"]
    assert sorted(samples(tmp_path / "out")) == [len(bad)]


def huge_png():
    """The header of a picture of 100,000 x 100,000 pixels, and nothing behind it."""
    import struct
    import zlib

    def block(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", b"") + block(b"IEND", b"")


def test_processes_without_work_are_told_which_flag_gives_them_some(tokenize, capsys):
    tokenize([ask("a"), ask("b")], "--splits", 3, "--rank", 0)
    assert "only 1 of 3 processes have work; a smaller --items_per_file than 4" in capsys.readouterr().err


def test_where_relative_images_are_looked_for_is_told(tokenize, tmp_path, capsys):
    asked = [ask("<|image|>", images=["nowhere.png"])]
    tokenize(asked)
    assert f"begin at the current folder, {Path.cwd()}; --image_dir" in capsys.readouterr().out
    tokenize(asked, "--image_dir", tmp_path, "--overwrite")
    assert "--image_dir" not in capsys.readouterr().out


def test_a_broken_line_fails_alone(tokenize, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(ask('a'))}\n\n{{broken\n{json.dumps(ask('b'))}\n")
    assert tokenize(path, "--max_failed", 0.5) == 0
    [line] = rejected(tmp_path / "out").values()
    assert (line["item"], line["where"], line["reason"]) == (1, "line 3", "not JSON")
    assert sorted(samples(tmp_path / "out")) == [0, 2]


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"conversations": []}, {"conv', "the file ends before the list does"),
        ('[{"conversations": []}', "found the end of the file"),
        ('{"conversations": []}', "expected a JSON list"),
        ('"text"', "expected a JSON list"),
        ("[]", "no items in it"),
        ("", "expected a JSON list, found nothing"),
    ],
)
def test_a_file_that_is_no_list_is_refused(tokenize, content, message):
    with pytest.raises(UserError, match=r"data\.json") as error:
        tokenize(content)
    assert message in str(error.value)


def test_a_missing_input_is_named(tokenize, tmp_path):
    with pytest.raises(UserError, match=r"absent\.json: cannot read the input"):
        tokenize(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "more, message",
    [
        (("--rank", "8", "--splits", "8"), "--rank 8 is outside of 0 to 7"),
        (("--rank", "-1"), "--rank: must be at least 0"),
        (("--splits", "0"), "--splits: must be at least 1"),
        (("--target_size", "500"), "multiple of 32"),
        (("--max_failed", "7"), "a share from 0 to 1"),
        (("--splits", "2", "--overwrite"), "--overwrite would delete what other ranks are writing"),
        (("--crop", "round"), "invalid choice"),
    ],
)
def test_a_mistake_in_the_call_is_told(more, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(["--in_filename", "x.json", "--out_dir", "y", *more])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_too_many_failures_are_no_success(tokenize, capsys):
    items = [ask("fine"), ask("<|image|>", images=["nowhere.png"])]
    assert tokenize(items) == 1
    assert "more than --max_failed 0.01 of the items failed" in capsys.readouterr().err


def test_a_rerun_tries_what_failed_and_only_that(tokenize, picture, tmp_path, monkeypatch):
    items = [ask("<|image|>", images=[picture(i)]) for i in range(6)]
    assert tokenize(items, out="complete") == 0
    missing = picture(4)
    missing.rename(tmp_path / "away.png")
    assert tokenize(items) == 1
    assert sorted(samples(tmp_path / "out")) == [0, 1, 2, 3, 5]
    (tmp_path / "away.png").rename(missing)
    opened, open_image = [], Image.open

    def noted(file, **options):
        opened.append(Path(file.name).name)
        return open_image(file, **options)

    monkeypatch.setattr(Image, "open", noted)
    assert tokenize(items) == 0
    assert opened == [missing.name]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "complete")


@pytest.mark.parametrize("form", ["arrow", "pkl"])
def test_a_token_file_that_is_gone_is_made_anew_and_only_that(tokenize, tmp_path, form):
    items = [ask(f"Is {number} even?") for number in range(10)] + [{}]
    more = ("--format", form, "--max_failed", 1)
    tokenize(items, *more)
    before = {path: path.read_bytes() for path in (tmp_path / "out/files").iterdir()}
    times = {path: path.stat().st_mtime_ns for path in before}
    gone = tmp_path / "out/files" / {"arrow": "4-8.arrow", "pkl": "5.pkl"}[form]
    gone.unlink()
    assert tokenize(items, *more) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "out/files").iterdir()} == before
    made_anew = {path.stem for path in before if path.stat().st_mtime_ns != times[path]}
    assert made_anew == {"arrow": {"4-8", "8-11"}, "pkl": {"4", "5", "6", "7", "8", "9"}}[form]  # and what failed
    assert len(samples(tmp_path / "out")) == 10


def test_an_output_of_another_run_is_refused_or_overwritten(tokenize, tmp_path):
    items = [ask(f"question {i}?") for i in range(6)]
    assert tokenize(items) == 0
    with pytest.raises(UserError, match=r"settings\.target_size = 64, now it is 96"):
        tokenize(items, target_size=96)
    with pytest.raises(UserError, match=r"input\.(items|sha256)"):
        tokenize(items[:5])
    assert tokenize(items[:3], "--overwrite") == 0
    assert sorted(samples(tmp_path / "out")) == [0, 1, 2]
    assert [path.name for path in (tmp_path / "out" / "files").iterdir()] == ["0-3.arrow"]


def test_token_files_that_nobody_vouches_for_are_refused(tokenize, tmp_path):
    (tmp_path / "out" / "files").mkdir(parents=True)
    (tmp_path / "out" / "files" / "0.pkl").touch()
    with pytest.raises(UserError, match=r"holds files/0\.pkl but no manifest\.json"):
        tokenize([ask("a")])
    assert tokenize([ask("a")], "--overwrite") == 0


@pytest.mark.parametrize(
    "content, message",
    [
        (b"garbage", "damaged or not a PyTorch checkpoint"),
        (None, "does not fit ChameleonVQGAN"),
    ],
)
def test_a_corrupt_or_foreign_checkpoint_is_refused(tokenize, tmp_path, chameleon_folder, content, message):
    folder = shutil.copytree(chameleon_folder, tmp_path / "tokenizer")
    if content:
        (folder / "vqgan.ckpt").write_bytes(content)
    else:
        torch.save({"state_dict": {"encoder.other": torch.zeros(3)}}, folder / "vqgan.ckpt")
    with pytest.raises(UserError, match=message):
        tokenize([ask("a")], "--tokenizer_dir", folder)


def test_a_tokenizer_without_image_tokens_is_refused(tokenize, tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}')
    with pytest.raises(UserError, match=r"tokenizer\.json: no token '<s>'"):
        tokenize([ask("a")], "--text_tokenizer", tmp_path)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_loses_nothing(tokenize, tmp_path, chameleon_folder):
    """A file-size limit stands in for the full disk: the write fails in the same place. Then there is room again."""
    items = [ask(f"question {i} " * 50) for i in range(8)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(items))
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    limited += "from pre_tokenize.pre_tokenize import main; from vistoken.cli import run_command; run_command(main)"
    command = [sys.executable, "-c", limited, "--in_filename", data, "--out_dir", tmp_path / "out", "--device", "cpu"]
    command += ["--tokenizer_dir", chameleon_folder, "--target_size", "64", "--items_per_file", "4"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=REPO)
    assert result.returncode == 2
    assert "cannot write" in result.stderr and "make room" in result.stderr and "Traceback" not in result.stderr
    assert not list((tmp_path / "out").rglob("*.tmp")) and not list((tmp_path / "out").glob("*record*"))
    assert tokenize(items) == 0
    assert sorted(samples(tmp_path / "out")) == list(range(8))
