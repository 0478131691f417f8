"""pre_tokenize.py in one process: golden parity, formats, and people's own data."""

import json
import pickle
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from token_job import ask, make_picture, rejected, run_here, samples

from pre_tokenize import concat_record
from pre_tokenize.chameleon import Settings, load_tokenizers
from pre_tokenize.pre_tokenize import load_item_processor
from pre_tokenize.sequences import pairs
from vision_tokenizer.images.files import read_image
from vision_tokenizer.models.chameleon.vocabulary import ChameleonVocabulary
from vision_tokenizer.models.chameleon.vqgan import ChameleonVQGAN, load_chameleon
from vistoken.errors import UserError
from vistoken.jobs import members


@pytest.fixture
def tokenize(tmp_path, chameleon_folder):
    return partial(run_here, tmp_path, chameleon_folder)


@pytest.fixture
def picture(tmp_path):
    return partial(make_picture, tmp_path)


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
