"""extend_tokenizer.py: which ids the words get, that a second time changes nothing, and what is refused."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lm_small import write_tokenizer
from tokenizers import AddedToken, Tokenizer

from pre_tokenize.extend_tokenizer import extend, main
from vision_tokenizer.models.dualvitok.vocabulary import CODEBOOK_SIZES, DualViTokVocabulary, added_names
from vistoken.errors import UserError

SMALL = (5, 7)


def vocabulary(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)


@pytest.mark.slow
def test_the_published_words_in_the_published_order(tmp_path, capsys):
    """All 131,111 of them, in seconds."""
    source = write_tokenizer(tmp_path / "original")
    before, began = vocabulary(source), time.monotonic()
    assert main(["--tokenizer_dir", str(source), "--output_dir", str(tmp_path / "extended")]) is None
    assert time.monotonic() - began < 60
    ids, first = vocabulary(tmp_path / "extended"), len(before)
    assert len(ids) == first + 7 + 16 + 16 + 32768 + 98304
    assert {name: ids[name] for name in before} == before
    marks = ["<start_of_image>", "<end_of_image>", "<end_of_line>", "<start_of_level0>", "<end_of_level0>"]
    marks += ["<start_of_level1>", "<end_of_level1>"]
    assert [ids[name] - first for name in marks] == list(range(7))
    places = {"<height_64>": 7, "<height_1024>": 22, "<width_64>": 23, "<width_1024>": 38}
    places |= {"<|image_level0_0|>": 39, "<|image_level0_32767|>": 32806}
    places |= {"<|image_level1_0|>": 32807, "<|image_level1_98303|>": 131110}
    assert {name: ids[name] - first for name in places} == places
    printed = capsys.readouterr().out
    assert f"semantic codes {first + 39:>10} to {first + 32806}" in printed and f"{first + 131110}" in printed
    assert DualViTokVocabulary(ids, "").codebook_sizes == CODEBOOK_SIZES


def test_a_second_time_changes_nothing(tmp_path, capsys):
    extend(str(write_tokenizer(tmp_path / "original")), tmp_path / "once", SMALL)
    written = (tmp_path / "once" / "tokenizer.json").stat()
    first = capsys.readouterr().out
    assert extend(str(tmp_path / "once"), tmp_path / "once", SMALL) == extend(
        str(tmp_path / "once"), tmp_path / "twice", SMALL
    )
    assert (tmp_path / "once" / "tokenizer.json").stat().st_mtime_ns == written.st_mtime_ns
    assert (tmp_path / "twice" / "tokenizer.json").read_bytes() == (tmp_path / "once" / "tokenizer.json").read_bytes()
    again = capsys.readouterr().out
    assert "all words were there already" in again and first.splitlines()[1] in again
    assert json.loads((tmp_path / "twice" / "tokenizer_config.json").read_text())["chat_template"]


def test_transformers_reads_the_result(tmp_path):
    from transformers import AutoTokenizer

    ids = extend(str(write_tokenizer(tmp_path / "original")), tmp_path / "extended", SMALL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "extended")
    assert tokenizer.convert_tokens_to_ids(added_names(SMALL)) == list(ids)
    text = "an image<start_of_image><|image_level0_3|><end_of_line>"
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found[-3:] == [ids[0], ids[39 + 3], ids[2]] and len(tokenizer) == ids[-1] + 1
    assert tokenizer.decode(found, skip_special_tokens=True).replace(" ", "") == "animage"


def tokenizer_with(folder, names):
    tokenizer = Tokenizer.from_file(str(write_tokenizer(folder) / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    "names, message",
    [
        (["<end_of_image>", "<start_of_image>"], "<end_of_image> must have id .*, but it has id"),
        (["<start_of_image>"], "<end_of_image> must have id .*, but it is not there"),
        (["<|image_level1_2|>"], r"has a token <\|image_level1_2\|> but no <start_of_image>"),
        (added_names((5, 6)), r"<\|image_level1_6\|> must have id .* is not there"),
        (added_names((6, 7)), "extended for more than 5 codes of level 0"),
        (added_names((5, 8)), "extended for more than 7 codes of level 1"),
    ],
)
def test_some_of_the_words_or_another_order_are_refused(tmp_path, names, message):
    source = tokenizer_with(tmp_path / "original", names)
    with pytest.raises(UserError, match=rf"tokenizer\.json: .*{message}"):
        extend(str(source), tmp_path / "extended", SMALL)
    assert not (tmp_path / "extended").exists()


def test_another_tokenizer_is_not_overwritten(tmp_path):
    source, other = write_tokenizer(tmp_path / "original"), write_tokenizer(tmp_path / "other")
    before = (other / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match="another tokenizer is there"):
        extend(str(source), other, SMALL)
    assert (other / "tokenizer.json").read_bytes() == before
    shutil.copy(source / "tokenizer.json", tmp_path / "alone.json")
    assert len(extend(str(tmp_path / "alone.json"), tmp_path / "new", SMALL)) == 39 + 12


def test_what_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a Hugging Face tokenizers file"):
        extend(str(tmp_path), tmp_path / "out", SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither text_tokenizer\.json nor tokenizer\.json"):
        extend(str(tmp_path / "empty"), tmp_path / "out", SMALL)
    with pytest.raises(SystemExit):
        main(["--tokenizer_dir", "x", "--output_dir", "y", "--pixel_size", "0"])


def test_help_starts_without_torch_and_as_a_file():
    script = Path(__file__).parents[1] / "pre_tokenize" / "extend_tokenizer.py"
    assert subprocess.run([sys.executable, script, "--help"], capture_output=True).returncode == 0
    probe = "import sys\ntry: import pre_tokenize.extend_tokenizer as p; p.main(['--help'])\n"
    probe += "except SystemExit: sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0
