"""Lines of codebook inference as text, as the published form has it, and as token files of a language model."""

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest
from lm_small import GOLDEN_SIZES, extended_tokenizer, golden_lines, made_line, write_lines, write_tokenizer

from pre_tokenize import concat_record
from pre_tokenize.dualvitok_text import text_form
from pre_tokenize.pre_tokenize import main
from pre_tokenize.token_file import TokenFiles
from pre_tokenize.verify_tokens import main as verify_tokens
from vision_tokenizer.codebook.annotations import OUTPUT_FIELDS
from vision_tokenizer.codebook.forms import ArrowRows, Row
from vistoken.errors import DataError, Failed, UserError
from vistoken.jobs.counts import Counts
from vistoken.jobs.results import Result

REPO = Path(__file__).parents[1]
EDITING = ("editing/fixed_anchors/0000",)
ALL = ("editing/fixed_anchors/0000", "generation/fixed_anchors/0000", "generation/fixed_256/0001")


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return extended_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def tokenize(tmp_path, tokenizer_dir):
    """Run the command on lines (or a file) into tmp_path / out -> its exit code."""

    def run(lines, *more, out="out", tokenizer=tokenizer_dir):
        path = lines if isinstance(lines, Path) else write_lines(tmp_path / "0000.jsonl", lines)
        command = ["--image_tokenizer", "dualvitok", "--tokenizer_dir", tokenizer, "--in_filename", path]
        command += ["--out_dir", tmp_path / out, "--items_per_file", 2]
        return main([str(argument) for argument in (*command, *more)])

    return run


def samples(folder):
    concat_record.main(["--sub_record_dir", str(folder), "--save_path", str(folder / "record.json")])
    return {sample.id: sample for sample in TokenFiles(folder / "record.json")}


def rejected(folder):
    path = folder / "0-of-1-record.rejected.jsonl"
    return {line["item"]: line for line in map(json.loads, path.read_text().splitlines())}


def spelt(line, number):
    """The text form of one image, written out again by hand."""
    (height, width), grids = line["matched_ratios"][number], line["image_embed_inds"][number]
    text = f"<height_{height}><width_{width}><start_of_image>"
    for level in (0, 1):
        rows = ["".join(f"<|image_level{level}_{code}|>" for code in row) for row in grids[level]]
        text += f"<start_of_level{level}>{'<end_of_line>'.join([*rows, ''])}<end_of_level{level}>"
    return text + "<end_of_image>"


def test_text_form_of_generation_and_editing():
    generation = golden_lines("generation/fixed_anchors/0000")[2]
    human, gpt = text_form(generation, GOLDEN_SIZES)
    height, width = generation["matched_ratios"][0]
    assert human["value"].startswith(f"Generate an image of <height_{height}><width_{width}>, the content of image is")
    assert gpt == {"from": "gpt", "value": spelt(generation, 0)}
    editing = next(line for line in golden_lines(*EDITING) if line["matched_ratios"][0] != line["matched_ratios"][1])
    human, gpt = text_form(editing, GOLDEN_SIZES)
    height, width = editing["matched_ratios"][0]
    assert human["value"].startswith(f"<height_{height}><width_{width}><image>\nPlease edit the image")
    assert gpt["value"] == spelt(editing, 1)


def test_a_tag_is_that_of_the_next_image_to_generate():
    anchors = [(512, 512), (384, 768), (768, 384)]
    line = made_line("<image> {resolution_tag}", "<image>{resolution_tag}", "?", "<image>", anchors=anchors)
    values = [turn["value"] for turn in text_form(line, GOLDEN_SIZES)]
    assert values[0] == "<height_512><width_512><image> <height_384><width_768>"
    assert values[1].endswith("<end_of_image><height_768><width_384>")
    understanding = made_line("{resolution_tag} <image> {resolution_tag}?", "yes", anchors=[(256, 256)])
    assert text_form(understanding, GOLDEN_SIZES)[0]["value"].count("<height_256><width_256>") == 3
    with pytest.raises(Failed, match=r"\{resolution_tag\} in a conversation without images"):
        text_form(made_line("{resolution_tag}", "a"), GOLDEN_SIZES)


def reference_ids(line, folder):
    """Token ids by the tokenizer's own chat template, the images of both sides spelt as text."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.chat_template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    messages = []
    for turn, filled in zip(line["conversations"], text_form(line, GOLDEN_SIZES), strict=True):
        content = filled["value"]
        if turn["from"] == "human":
            content = re.sub(r"<height_\d+><width_\d+><image>", lambda _: spelt(line, 0), content)
        messages.append({"role": {"human": "user"}.get(turn["from"], "assistant"), "content": content})
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer


@pytest.mark.parametrize("form", ["arrow", pytest.param("pkl", marks=pytest.mark.slow)])
def test_tokens_are_those_of_the_tokenizers_own_chat_template(tokenize, tmp_path, tokenizer_dir, form):
    lines = [*golden_lines(*ALL), made_line("hi there", "hello", "again", "yes", "and then")]
    assert tokenize(lines, "--format", form) == 0
    found = samples(tmp_path / "out")
    assert sorted(found) == list(range(len(lines)))
    for number, line in enumerate(lines):
        expected, tokenizer = reference_ids(line, tokenizer_dir)
        assert found[number].tokens.tolist() == expected
    learned = tokenizer.decode(found[len(lines) - 1].tokens[found[len(lines) - 1].loss_mask])
    assert learned.replace(" ", "") == "hello<|im_end|>yes<|im_end|>"


def test_only_what_is_generated_is_learned(tokenize, tmp_path, tokenizer_dir):
    """The input image is there in codes; the output image, and the end of its turn, are all that is learned."""
    lines = golden_lines(*EDITING)
    assert tokenize(lines) == 0
    found = samples(tmp_path / "out")
    for number, line in enumerate(lines):
        _, tokenizer = reference_ids(line, tokenizer_dir)
        tokens, mask = found[number].tokens, found[number].loss_mask
        text = spelt(line, 1) + "<|im_end|>"
        assert tokens[mask].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer.convert_ids_to_tokens(tokens[~mask].tolist())
        assert whole.count("<start_of_image>") == 1 and "".join(whole).count(spelt(line, 0)) == 1
        assert found[number].images == tuple(line["images"])


def test_words_spelt_by_somebody_are_text(tokenize, tmp_path, tokenizer_dir):
    nasty = "<|im_end|><|image_level0_5|><start_of_image><height_512>"
    assert tokenize([made_line(nasty, "no")]) == 0
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokens = samples(tmp_path / "out")[0].tokens
    assert (tokens == tokenizer.token_to_id("<|im_end|>")).sum() == 2
    assert (tokens < tokenizer.token_to_id("<start_of_image>")).all()
    assert nasty in tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def changed(**fields):
    line = made_line("draw {resolution_tag}", "<image>", anchors=[(256, 256)])
    return {**line, **fields}


def with_code(level, value):
    line = copy.deepcopy(changed())
    line["image_embed_inds"][0][level][3][4] = value
    return line


BAD = {
    "code out of range": with_code(0, 2048),
    "wrong type": with_code(1, "7"),
    "wrong shape": changed(image_embed_inds=[[[[1, 2]], [[3]]]]),
    "codes missing": changed(image_embed_inds=None),
    "image count": changed(images=["a.png", "b.png"]),
    "no tag for this size": changed(matched_ratios=[[250, 250]]),
    "no conversation": changed(conversations=[]),
    "role out of order": changed(conversations=[{"from": "gpt", "value": "<image>"}]),
    "nothing to predict": changed(conversations=[{"from": "human", "value": "<image>"}]),
    "bad `images`": changed(images=[3]),
    "not an object": ["a"],
}


def test_bad_lines_fail_one_by_one_with_line_and_reason(tokenize, tmp_path):
    negative = with_code(1, -1)
    foreign = {"conversations": [{"from": "human", "value": "<|image|>"}, {"from": "gpt", "value": "A cat."}]}
    foreign["image"] = ["cat.png"]  # the other document's format
    uncounted = changed(conversations=[*changed()["conversations"][:1], {"from": "gpt", "value": "<image><image>"}])
    lines = [*BAD.values(), negative, uncounted, foreign, changed()]
    assert tokenize(lines, "--max_failed", 1) == 0
    left_out = rejected(tmp_path / "out")
    reasons = [*BAD, "code out of range", "image count", "codes missing"]
    assert [left_out[item]["reason"] for item in range(len(lines) - 1)] == reasons
    assert left_out[0]["where"] == "line 1" and left_out[0]["file"].endswith("0000.jsonl")
    assert left_out[0]["detail"].startswith("image 0, level 0: codes lie in [0, 2048), found")
    assert sorted(samples(tmp_path / "out")) == [len(lines) - 1]
    assert tokenize(lines, "--max_failed", 0.5) == 1


def final_files(folder):
    names = ("files/*", "record.json", "manifest.json")
    return {path.name: path.read_bytes() for name in names for path in sorted(folder.glob(name))}


@pytest.mark.slow
def test_splits_and_torchrun_give_what_one_process_gives(tokenize, tmp_path, tokenizer_dir):
    lines = golden_lines(*ALL)
    assert tokenize(lines, out="one") == 0
    for rank in (1, 0):
        assert tokenize(lines, "--splits", 2, "--rank", rank, out="two") == 0
    crew = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = ["pre_tokenize/pre_tokenize.py", "--image_tokenizer", "dualvitok", "--tokenizer_dir", tokenizer_dir]
    arguments += ["--in_filename", tmp_path / "0000.jsonl", "--out_dir", tmp_path / "crew", "--items_per_file", "2"]
    done = subprocess.run(
        [*crew, *map(str, arguments)], cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    for name in ("one", "two", "crew"):
        assert len(samples(tmp_path / name)) == len(lines)
    assert final_files(tmp_path / "one") == final_files(tmp_path / "two") == final_files(tmp_path / "crew")


def test_a_rerun_goes_on_and_keeps_what_is_done(tokenize, tmp_path):
    """Chunks without failures are not written again; the failed line is tried again, in vain."""
    lines = [changed(), with_code(0, 5000), changed()]
    assert tokenize(lines) == 1
    untouched = tmp_path / "out" / "files" / "2-3.arrow"
    before = untouched.stat().st_mtime_ns
    assert tokenize(lines) == 1
    assert sorted(samples(tmp_path / "out")) == [0, 2] and untouched.stat().st_mtime_ns == before


def test_the_manifest_names_the_codes_tokenizer_and_checks_its_sizes(tokenize, tmp_path):
    codebook = {"tokenizer": {"name": "dualvitok", "fingerprint": "abc", "codebook_sizes": list(GOLDEN_SIZES)}}
    (tmp_path / "manifest.json").write_text(json.dumps(codebook))
    assert tokenize([changed()]) == 0
    assert TokenFiles(single_record(tmp_path / "out")).manifest()["image_tokenizer"]["fingerprint"] == "abc"
    codebook["tokenizer"]["codebook_sizes"] = [32768, 98304]
    (tmp_path / "manifest.json").write_text(json.dumps(codebook))
    with pytest.raises(UserError, match=r"codebooks of \[32768, 98304\].*has words for \[2048, 6144\]"):
        tokenize([changed()], out="other")


def test_codes_that_were_changed_since_are_refused(tokenize, tmp_path):
    assert tokenize([changed()]) == 0
    written = hashlib.sha256((tmp_path / "0000.jsonl").read_bytes()).hexdigest()
    (tmp_path / "run_summary.json").write_text(json.dumps({"files": {"0000.json": {"sha256": written}}}))
    assert tokenize([changed()], out="again") == 0
    with pytest.raises(DataError, match=r"0000\.jsonl: not the bytes that codebook inference wrote"):
        tokenize([with_code(0, 3)], out="other")


def single_record(folder):
    samples(folder)
    return folder / "record.json"


def test_wrong_tokenizers_are_refused(tokenize, tmp_path):
    with pytest.raises(UserError, match=r"no token <start_of_image>.*extend_tokenizer\.py"):
        tokenize([changed()], tokenizer=write_tokenizer(tmp_path / "plain"))
    from pre_tokenize.extend_tokenizer import extend

    extend(str(write_tokenizer(tmp_path / "other", ["<s>"])), tmp_path / "no_turns", GOLDEN_SIZES)
    with pytest.raises(UserError, match=r"no token <\|im_start\|> and no <\|im_end\|>"):
        tokenize([changed()], tokenizer=tmp_path / "no_turns")


@pytest.mark.parametrize(
    "more, message",
    [
        ((), "needs --tokenizer_dir"),
        (("--tokenizer_dir", "x", "--text_tokenizer", "y"), "--text_tokenizer is Chameleon's"),
        (("--tokenizer_dir", "x", "--in_filename", "0000.rejected.jsonl"), "name the .jsonl beside it"),
    ],
)
def test_a_mistake_in_the_call_is_told(more, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(["--image_tokenizer", "dualvitok", "--in_filename", "x.jsonl", "--out_dir", "y", *more])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_text_only_lines_need_no_codes(tokenize, tmp_path):
    line = made_line("hello", "you")
    assert tokenize([{"conversations": line["conversations"]}, line]) == 0
    first, second = samples(tmp_path / "out").values()
    assert np.array_equal(first.tokens, second.tokens) and first.images == ()


def arrow_of(path, lines):
    """The same codes in the other form."""
    form = ArrowRows(("semantic", "pixel"), (32768, 98304))
    rows = []
    for line in map(dict, lines):
        sizes, images, anchors = (line.pop(field) for field in OUTPUT_FIELDS)
        codes = [tuple(np.array(grid, np.int32) for grid in grids) for grids in images]
        rows.append(Row(orjson.dumps(line), sizes, codes, anchors))
    path.write_bytes(b"".join(content for _, content in form.joined([(Result(Counts()), form.pack(rows))])))
    return path


def test_codes_in_arrow_give_the_same_sequences(tokenize, tokenizer_dir, tmp_path):
    lines = golden_lines(*ALL)
    assert tokenize(lines, out="lines") == 0
    assert tokenize(arrow_of(tmp_path / "0000.arrow", lines), out="arrow") == 0
    expected, found = samples(tmp_path / "lines"), samples(tmp_path / "arrow")
    assert expected.keys() == found.keys()
    for item, sample in expected.items():
        assert np.array_equal(sample.tokens, found[item].tokens) and sample.images == found[item].images
    given = ["--tokenizer_dir", tokenizer_dir, "--record", tmp_path / "arrow" / "record.json"]
    assert verify_tokens([str(part) for part in (*given, "--in_filename", tmp_path / "0000.arrow")]) == 0
