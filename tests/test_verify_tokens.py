"""Sound token files pass; tampered, dropped and swapped ones are each told."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from lm_small import extended_tokenizer, golden_lines, write_lines

from pre_tokenize import concat_record, pre_tokenize
from pre_tokenize.token_file import TokenFiles, contents_of, hash_of, pickle_bytes, read_shard, shard_bytes
from pre_tokenize.verify_tokens import main
from vistoken.errors import UserError


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory, golden, chameleon_folder) -> Path:
    """The golden conversations as small token files of two items each."""
    base = tmp_path_factory.mktemp("tokenized")
    data = shutil.copy(golden / "chameleon_small" / "conversations.json", base / "data.json")
    pre_tokenize_small(data, base, chameleon_folder, "--image_dir", golden / "images")
    return base


def pre_tokenize_small(data: Path, base: Path, tokenizer: Path, *more) -> None:
    command = ["--in_filename", data, "--out_dir", base / "out", "--tokenizer_dir", tokenizer, "--target_size", 64]
    command += ["--items_per_file", 2, "--device", "cpu", "--max_failed", 1, *more]
    assert pre_tokenize.main([str(part) for part in command]) == 0
    concat_record.main(["--sub_record_dir", str(base / "out"), "--save_path", str(base / "out" / "record.json")])


@pytest.fixture
def tokens(tokenized, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tokenized, tmp_path / "copy"))


def verify(folder: Path, tokenizer: Path, *more) -> int:
    command = ["--record", folder / "out" / "record.json", "--tokenizer_dir", tokenizer, "--device", "cpu", *more]
    return main([str(part) for part in command])


def change(folder: Path, item: int, edit) -> None:
    """Rewrite one sample, in its place; `edit` gets a copy."""
    files = TokenFiles(folder / "out" / "record.json")
    index = int((files.record.ids == item).argmax())
    path, row = files.record.file(index), int(files.record.rows[index])
    samples, manifest = read_shard(path), contents_of(path).manifest
    changed = samples[row]._replace(tokens=samples[row].tokens.copy(), loss_mask=samples[row].loss_mask.copy())
    samples[row] = edit(changed) or changed
    before, content = path.read_bytes(), shard_bytes(samples, manifest)
    path.write_bytes(content)
    record = folder / "out" / "record.json"
    record.write_text(record.read_text().replace(hash_of(before), hash_of(content)))


def test_sound_files_pass_and_tokenise_to_the_same(tokenized, chameleon_folder, capsys):
    assert verify(tokenized, chameleon_folder, "--in_filename", tokenized / "data.json") == 0
    said = capsys.readouterr().out
    record = json.loads((tokenized / "out" / "record.json").read_text())
    assert f"{len(record):,} sequences" in said and f"{len(record):,} items tokenised again; 100.0000% of" in said
    assert "no issues" in said


@pytest.mark.slow
def test_images_are_found_from_another_folder(golden, chameleon_folder, tmp_path, monkeypatch):
    """The tokens were made beside the images, which are named by relative paths."""
    source = golden / "chameleon_small" / "conversations.json"
    monkeypatch.chdir(golden / "images")
    pre_tokenize_small(source, tmp_path, chameleon_folder)
    monkeypatch.chdir(tmp_path)
    assert verify(tmp_path, chameleon_folder, "--in_filename", source) == 1
    assert verify(tmp_path, chameleon_folder, "--in_filename", source, "--image_dir", golden / "images") == 0


def test_a_tampered_code_is_found(tokens, chameleon_folder, capsys):
    def edit(sample):
        codes = np.flatnonzero((sample.tokens >= 4) & (sample.tokens <= 8195))  # of image tokens
        sample.tokens[codes[3]] = sample.tokens[codes[3]] % 8000 + 100

    change(tokens, 1, edit)
    assert verify(tokens, chameleon_folder) == 0  # nothing but the image can tell
    assert verify(tokens, chameleon_folder, "--in_filename", tokens / "data.json") == 1
    said = capsys.readouterr().out
    assert "code is not the nearest: 1" in said and "item 1, image 0, row 0 column 3" in said


def test_a_changed_word_is_found(tokens, chameleon_folder, capsys):
    def edit(sample):
        words = np.flatnonzero(sample.tokens > 8900)
        sample.tokens[words[0]] += 1

    change(tokens, 1, edit)
    assert verify(tokens, chameleon_folder, "--in_filename", tokens / "data.json") == 1
    assert "another text: 1" in capsys.readouterr().out


def learn_everything(sample):
    sample.loss_mask[:] = True


def learn_nothing(sample):
    sample.loss_mask[:] = False


def open_block(sample):
    sample.tokens[np.flatnonzero(sample.tokens == 8197)[0]] = 9000


def stray_code(sample):
    sample.tokens[np.flatnonzero(sample.tokens > 8900)[0]] = 5


def break_row(sample):
    sample.tokens[np.flatnonzero(sample.tokens == 8803)[0]] = 9000


def foreign_id(sample):
    sample.tokens[1] = 70000


def no_end(sample):
    sample.tokens[-1] = 9000


def lose_image(sample):
    return sample._replace(images=())


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (learn_everything, "loss mask: 1"),
        (learn_nothing, "loss mask: 2"),
        (open_block, "image block: 1"),
        (stray_code, "image block: 1"),
        (break_row, "image block: 1"),
        (foreign_id, "token out of range: 1"),
        (no_end, "turns: 1"),
        (lose_image, "image count: 1"),
    ],
)
def test_a_sequence_against_the_rules_is_told(tokens, chameleon_folder, capsys, edit, said):
    change(tokens, 1, edit)
    assert verify(tokens, chameleon_folder) == 1
    found = capsys.readouterr().out
    assert said in found and "item 1: " in found


def test_a_dropped_entry_is_found(tokens, chameleon_folder, capsys):
    record = tokens / "out" / "record.json"
    entries = json.loads(record.read_text())
    record.write_text(json.dumps([entries[0], *entries[2:], entries[-1]]))
    assert verify(tokens, chameleon_folder) == 1
    said = capsys.readouterr().out
    assert f"item {entries[1]['id']} of data.json" in said and "item lost: 1" in said and "item twice: 1" in said


def test_swapped_files_are_found(tokens, chameleon_folder, capsys):
    first, second = sorted((tokens / "out" / "files").glob("*.arrow"))[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert verify(tokens, chameleon_folder) == 1
    assert "token file: " in capsys.readouterr().out


def test_a_missing_file_and_another_input_are_told(tokens, chameleon_folder, capsys):
    sorted((tokens / "out" / "files").glob("*.arrow"))[-1].unlink()
    data = json.loads((tokens / "data.json").read_text())
    (tokens / "data.json").write_text(json.dumps(data[::-1]))
    assert verify(tokens, chameleon_folder, "--in_filename", tokens / "data.json") == 1
    said = capsys.readouterr().out
    assert "input changed: 1" in said and "does not exist" in said


@pytest.fixture(scope="module")
def dualvitok_tokens(tmp_path_factory) -> tuple[Path, Path]:
    """(folder, tokenizer) of sequences of DualViTok codes."""
    base = tmp_path_factory.mktemp("dualvitok_tokens")
    tokenizer = extended_tokenizer(base)
    lines = golden_lines("editing/fixed_256/0000", "generation/fixed_anchors/0000")
    source = write_lines(base / "data.jsonl", lines)
    command = ["--image_tokenizer", "dualvitok", "--in_filename", source, "--out_dir", base / "out"]
    assert pre_tokenize.main([str(part) for part in (*command, "--tokenizer_dir", tokenizer)]) == 0
    concat_record.main(["--sub_record_dir", str(base / "out"), "--save_path", str(base / "out" / "record.json")])
    return base, tokenizer


def test_sequences_of_dualvitok_codes_pass(dualvitok_tokens, capsys):
    folder, tokenizer = dualvitok_tokens
    assert verify(folder, tokenizer, "--in_filename", folder / "data.jsonl") == 0
    said = capsys.readouterr().out
    assert "items tokenised again\n" in said and "no issues" in said


def add_one(place):
    def edit(sample):
        sample.tokens[place(sample.tokens)] += 1

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (add_one(lambda tokens: len(tokens) // 2), "another text: 1"),  # a code: in range, but not the line's
        (add_one(lambda tokens: 0), "turns: 1"),
        (foreign_id, "token out of range: 1"),
        (learn_everything, "loss mask: 1"),
        (lose_image, "image count: 1"),
    ],
)
def test_tampered_sequences_of_dualvitok_codes_are_told(dualvitok_tokens, tmp_path, capsys, edit, said):
    folder, tokenizer = Path(shutil.copytree(dualvitok_tokens[0], tmp_path / "copy")), dualvitok_tokens[1]
    change(folder, 1, edit)
    assert verify(folder, tokenizer, "--in_filename", folder / "data.jsonl") == 1
    assert said in capsys.readouterr().out


def test_published_pickles_are_read(tokenized, tmp_path, chameleon_folder, capsys):
    files = TokenFiles(tokenized / "out" / "record.json")
    (tmp_path / "out" / "files").mkdir(parents=True)
    entries = []
    for sample in files:
        (tmp_path / "out" / "files" / f"{sample.id}.pkl").write_bytes(pickle_bytes(sample))
        entries.append({"file": f"files/{sample.id}.pkl", "len": len(sample.tokens), "id": sample.id})
    (tmp_path / "out" / "record.json").write_text(json.dumps(entries))
    assert verify(tmp_path, chameleon_folder) == 0
    assert "there is no manifest" in capsys.readouterr().out


def test_a_record_without_items_is_refused(tmp_path, chameleon_folder):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "record.json").write_text("[]")
    with pytest.raises(UserError, match="no items in it"):
        verify(tmp_path, chameleon_folder)
