"""pre_tokenize.py in one process: golden parity, formats, people's own data, and what bad input does."""

import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pre_tokenize import concat_record
from pre_tokenize.chameleon import Settings, load_tokenizers
from pre_tokenize.pre_tokenize import load_item_processor, main
from pre_tokenize.sequences import pairs
from pre_tokenize.token_file import TokenFiles
from vision_tokenizer.images.files import read_image
from vision_tokenizer.models.chameleon.vocabulary import ChameleonVocabulary
from vision_tokenizer.models.chameleon.vqgan import ChameleonVQGAN, load_chameleon
from vistoken.errors import UserError
from vistoken.jobs import members

REPO = Path(__file__).parents[1]


@pytest.fixture
def tokenize(tmp_path, chameleon_folder):
    """Run the command on items (or a file) into tmp_path / "out" -> its exit code. Small crops unless told."""

    def run(items, *more, target_size=64, items_per_file=4, out="out"):
        path = items
        if not isinstance(items, Path):
            path = tmp_path / "data.json"
            path.write_text(items if isinstance(items, str) else json.dumps(items))
        command = ["--in_filename", path, "--out_dir", tmp_path / out, "--tokenizer_dir", chameleon_folder]
        command += ["--target_size", target_size, "--items_per_file", items_per_file, "--device", "cpu"]
        return main([str(argument) for argument in (*command, *more)])

    return run


def samples(folder):
    """What was written, by item."""
    concat_record.main(["--sub_record_dir", str(folder), "--save_path", str(folder / "record.json")])
    return {sample.id: sample for sample in TokenFiles(folder / "record.json")}


def rejected(folder, name="0-of-1-record"):
    path = folder / f"{name}.rejected.jsonl"
    return {line["item"]: line for line in map(json.loads, path.read_text().splitlines())} if path.exists() else {}


def ask(question, answer="yes", images=()):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, "image": [str(image) for image in images]}


@pytest.fixture
def picture(tmp_path):
    """Makes small pictures, each of its own colour."""

    def make(number):
        path = tmp_path / f"picture{number}.png"
        Image.new("RGB", (80, 70), (40 * number % 256, 90, 255 - 30 * number % 256)).save(path)
        return path

    return make


@pytest.mark.slow
@pytest.mark.parametrize("crop", ["square", "variable"])
def test_golden_tokens_and_labels(golden, tokenize, tmp_path, crop):
    """All 11 items of the reference; its square crop of item 10 is random, so only the length is known."""
    data = golden / "chameleon_small" / "conversations.json"
    expected = json.loads((golden / "chameleon_small" / "expected_tokens.json").read_text())[crop]
    more = ("--image_dir", golden / "images", "--crop", crop, "--batch_size", 2, "--max_failed", 0.3)
    assert tokenize(data, *more, target_size=512) == 0
    found, left_out = samples(tmp_path / "out"), rejected(tmp_path / "out")
    for item, wanted in expected.items():
        if "error" in wanted:
            assert left_out[int(item)]["kind"] == "failed"
        else:
            np.testing.assert_array_equal(found[int(item)].tokens, wanted["token"])
            np.testing.assert_array_equal(found[int(item)].labels, wanted["label"])
    assert sorted(left_out) == [6, 7, 9] and sorted(found) == [0, 1, 2, 3, 4, 5, 8, 10]
    assert [left_out[item]["reason"] for item in (6, 7, 9)] == ["image count", "image not found", "role out of order"]
    assert len(found[10].tokens) == (1993 if crop == "variable" else 2125)


@pytest.mark.slow
def test_more_golden_items(golden, tokenize, tmp_path):
    """Transparency, an image that is halved first, `assistant`, one image several times, nothing to predict."""
    data = golden / "chameleon_small" / "more_conversations.json"
    expected = json.loads((golden / "chameleon_small" / "more_expected_tokens.json").read_text())
    more = ("--image_dir", golden / "images", "--format", "pkl", "--max_failed", 0.3)
    assert tokenize(data, *more, target_size=512) == 0
    for item in range(3):
        content = pickle.loads((tmp_path / "out" / "files" / f"{item}.pkl").read_bytes())
        assert content["token"] == expected[str(item)]["token"]
        assert content["label"] == expected[str(item)]["label"]
        assert all(Path(image).is_absolute() for image in content["raw_image"])
    assert rejected(tmp_path / "out")[3]["reason"] == "nothing to predict"


def test_both_formats_hold_the_same(tokenize, picture, tmp_path):
    items = [ask("<|image|>what?", images=[picture(i)]) for i in range(3)] + [ask("who?")] * 3
    assert tokenize(items, out="arrow") == 0
    assert tokenize(items, "--format", "pkl", out="pkl") == 0
    arrow, pkl = samples(tmp_path / "arrow"), samples(tmp_path / "pkl")
    assert sorted(arrow) == sorted(pkl) == list(range(6))
    for item in range(6):
        assert np.array_equal(arrow[item].tokens, pkl[item].tokens)
        assert np.array_equal(arrow[item].loss_mask, pkl[item].loss_mask)
        assert arrow[item].images == pkl[item].images


@pytest.mark.parametrize("form", ["arrow", "pkl"])
def test_the_record_has_the_sizes_of_images(tokenize, picture, tmp_path, form):
    """As they were tokenised; where the sub-records lack them, their headers are read."""
    out, gone = tmp_path / "out", picture(2)
    items = [ask("<|image|><|image|>", images=[picture(0), picture(1)]), ask("who?"), ask("<|image|>", images=[gone])]
    assert tokenize(items, "--format", form) == 0
    join = ["--sub_record_dir", str(out), "--save_path", str(out / "record.json")]
    concat_record.main(join)
    complete = (out / "record.json").read_bytes()
    sizes = [entry["image_sizes"] for entry in json.loads(complete)]
    assert sizes == [[[70, 80]] * 2, [], [[70, 80]]]

    sub_record = out / "0-of-1-record.jsonl"
    lines = [json.loads(line) for line in sub_record.read_text().splitlines()]
    sub_record.write_text("".join(json.dumps({**line, "image_sizes": None}) + "\n" for line in lines))
    with pytest.raises(UserError, match="line 1: expected"):  # it is absent where nothing is known
        concat_record.main(join)
    for line in lines:
        del line["image_sizes"]
    sub_record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    concat_record.main(join)
    assert not any("image_sizes" in entry for entry in json.loads((out / "record.json").read_text()))
    concat_record.main([*join, "--image_sizes"])
    assert (out / "record.json").read_bytes() == complete
    gone.unlink()
    concat_record.main([*join, "--image_sizes"])
    assert [entry.get("image_sizes") for entry in json.loads((out / "record.json").read_text())] == [*sizes[:2], None]


def test_json_and_json_lines_give_the_same_token_files(tokenize, tmp_path):
    items = [ask(f"question {i}?") for i in range(6)]
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n\n".join(json.dumps(item) for item in items))
    assert tokenize(items, out="list") == tokenize(lines, out="lines") == 0
    a, b = samples(tmp_path / "list"), samples(tmp_path / "lines")
    assert all(np.array_equal(a[i].tokens, b[i].tokens) for i in range(6))


def test_tokens_do_not_depend_on_neighbours(tokenize, picture, tmp_path):
    """One image at a time in a chunk of its own, or batched with others: the same tokens."""
    items = [ask("<|image|>", images=[picture(i)]) for i in range(7)]
    assert tokenize(items, "--batch_size", 3, items_per_file=7, out="together") == 0
    for item in (0, 6):
        assert tokenize(items[item : item + 1], "--batch_size", 3, items_per_file=1, out=f"alone{item}") == 0
        alone = samples(tmp_path / f"alone{item}")[0]
        assert np.array_equal(alone.tokens, samples(tmp_path / "together")[item].tokens)


def test_an_image_that_occurs_often_is_encoded_once(tokenize, picture, monkeypatch):
    batches, encode = [], ChameleonVQGAN.encode
    monkeypatch.setattr(ChameleonVQGAN, "encode", lambda self, pixels: batches.append(1) or encode(self, pixels))
    same = picture(0)
    assert tokenize([ask("<|image|><|image|>", images=[same, same])] * 8, "--batch_size", 1, items_per_file=8) == 0
    assert len(batches) == 1


@pytest.mark.slow
def test_a_written_block_decodes_to_the_picture(tokenize, tmp_path, chameleon_folder, golden):
    assert tokenize([ask("draw", "<|image|>", [golden / "images" / "sq_chelsea.png"])], target_size=512) == 0
    sample = samples(tmp_path / "out")[0]
    text, _ = load_tokenizers(None, str(chameleon_folder), torch.device("cpu"), Settings(512, "square", "fp32", 1, 1))
    vocabulary = ChameleonVocabulary(text.ids, "")
    [(start, last)] = pairs(sample.tokens, vocabulary.image_start, vocabulary.image_end, "image")
    codes = torch.from_numpy(vocabulary.image_codes(sample.tokens[start : last + 1])).long()[None]
    decoded = load_chameleon(chameleon_folder, device="cpu", decoder=True).decode((codes,))
    expected = np.load(golden / "chameleon_small" / "vqgan_arrays.npz")["decoded_item2"].astype(np.float32)
    difference = np.abs(decoded.numpy().reshape(expected.shape) - expected).max()
    assert difference < 5e-4 * np.abs(expected).max()


def test_long_sequences_are_counted_and_kept(tokenize, tmp_path, capsys):
    assert tokenize([ask("word " * 60), ask("hi")], "--max_seq_len", 50) == 0
    assert "longer than 50 (--max_seq_len): 1, kept whole" in capsys.readouterr().out
    assert len(samples(tmp_path / "out")[0].tokens) > 60


LLAVA = """
from vistoken.errors import Rejected

class LlavaItems:
    def process_item(self, item):
        if item["image"].endswith(".gif"):
            raise Rejected("animation", item["image"])
        turns = [turn for turn in item["conversations"] if turn["from"] != "system"]
        for turn in turns:
            turn["value"] = turn["value"].replace("<image>", "<|image|>")
        return {"conversations": turns, "image": item["image"]}
"""


def test_data_in_somebodys_own_format(tokenize, picture, tmp_path):
    """The worked example of `ItemProcessor`; items that it chokes on fail one by one."""
    (tmp_path / "mine.py").write_text(LLAVA)
    turns = [{"from": "system", "value": "be kind"}, *ask("<image>\nwhat?")["conversations"]]
    items = [{"conversations": turns, "image": str(picture(0))}, {"conversations": turns, "image": "a.gif"}]
    items += [{"conversations": turns}, {"conversations": turns, "image": 3}]
    more = ("--item_processor", f"{tmp_path / 'mine.py'}:LlavaItems", "--max_failed", 0.5)
    assert tokenize(items, *more) == 0
    left_out = rejected(tmp_path / "out")
    assert {item: line["kind"] for item, line in left_out.items()} == {1: "rejected", 2: "failed", 3: "failed"}
    assert left_out[2]["detail"] == "KeyError: 'image'"
    assert samples(tmp_path / "out")[0].images == (str(picture(0)),)


def test_an_item_processor_may_be_a_dataclass(tmp_path):
    """With its annotations as texts, for which `dataclass` looks into the file's module."""
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Shouting:\n"
    code += "    mark: str = '!'\n    def process_item(self, item): return item | {'said': self.mark}\n"
    (tmp_path / "mine.py").write_text(code)
    processor, _ = load_item_processor(f"{tmp_path / 'mine.py'}:Shouting")
    assert processor.process_item({}) == {"said": "!"}


@pytest.mark.parametrize(
    "spec, message",
    [
        ("absent.py:X", "absent.py does not exist"),
        ("mine.py", "mine.py: expected FILE.py:Class, without the class"),
        ("mine.py:Nothing", "it has LlavaItems"),
        ("mine.py:Rejected", "it has LlavaItems"),
        ("broken.py:X", "broken.py does not run: SyntaxError: .*line 1"),
        ("foreign.py:X", "No module named 'nowhere'"),
        ("needy.py:X", "built without arguments"),
        ("lost.py:X", "lost.py does not run: FileNotFoundError: .*labels.json"),
        ("keyless.py:X", "keyless.py does not run: KeyError: 'LABELS'"),
    ],
)
def test_a_wrong_item_processor_is_told(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(LLAVA)
    Path("broken.py").write_text("class X(:")
    Path("foreign.py").write_text("import nowhere")
    Path("lost.py").write_text("open('labels.json')")
    Path("keyless.py").write_text("import os\nos.environ['LABELS']")
    Path("needy.py").write_text("class X:\n    def __init__(self, path): ...\n    def process_item(self, item): ...\n")
    with pytest.raises(UserError, match=message):
        load_item_processor(spec)


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


def files_of(folder):
    """Everything of a finished run that must be the same bytes however it came about."""
    paths = [*(folder / "files").iterdir(), *folder.glob("*-record.jsonl"), folder / "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


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


def test_help_needs_no_torch():
    probe = "import sys\ntry: import pre_tokenize.pre_tokenize as p; p.main(['--help'])\n"
    probe += "except SystemExit: sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


def test_images_in_tar_files_give_the_same_tokens(tokenize, picture, tmp_path, monkeypatch):
    (tmp_path / "tars").mkdir()
    names = [f"{'00.tar' if number < 4 else '01.TAR'}/deep/{number}.png" for number in range(6)]
    for tar_name in ("00.tar", "01.TAR"):
        with tarfile.open(tmp_path / "tars" / tar_name, "w") as tar:
            for number, name in enumerate(names):
                if name.startswith(tar_name):
                    tar.add(picture(number), "./deep/" + Path(name).name)
            tar.add(picture(9), "cut.png")
    whole = (tmp_path / "tars" / "01.TAR").read_bytes()
    (tmp_path / "tars" / "01.TAR").write_bytes(whole[: whole.index(b"cut.png") + 600])
    assert tokenize([ask("<|image|>", images=[picture(number)]) for number in range(6)], out="folder") == 0
    missing = ["00.tar/deep/none.png", "02.tar/deep/0.png", "01.TAR/cut.png"]
    items = [ask("<|image|>", images=[name]) for name in (*names, *missing)]
    surveys, survey = [], members.tar_members
    monkeypatch.setattr(members, "tar_members", lambda file: surveys.append(file.name) or survey(file))
    assert tokenize(items, "--image_dir", tmp_path / "tars") == 1
    expected, found = samples(tmp_path / "folder"), samples(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[item].tokens, found[item].tokens) for item in expected)
    assert {item: line["reason"] for item, line in rejected(tmp_path / "out").items()} == {
        6: "image not found",
        7: "image not found",
        8: "shard damaged",
    }
    assert "00.tar has no member deep/none.png" in rejected(tmp_path / "out")[6]["detail"]
    monkeypatch.setattr("vision_tokenizer.images.files.indexes", members.MemberIndexes())
    monkeypatch.setattr("vision_tokenizer.images.files.indexes.folder", tmp_path / "out" / ".work" / "members")
    read_image(tmp_path / "tars" / names[0])  # another process: the index is there
    assert sorted(Path(name).name for name in surveys) == ["00.tar", "01.TAR"]
