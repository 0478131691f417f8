import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest

from pre_tokenize import concat_record
from pre_tokenize.record import Record, companions, entry_line, manifest_id, sub_record
from pre_tokenize.token_file import TokenFiles, TokenSample, hash_of, pickle_bytes, shard_bytes
from vistoken.errors import DataError, UserError

REPO = Path(__file__).parents[1]
MANIFEST = {"tokenizer": "x", "input": {"items": 30}}
PER_SHARD = 5


def run(folder, *more, save="record.json"):
    concat_record.main(["--sub_record_dir", str(folder), "--save_path", str(folder / save), *more])
    return folder / save


def entries_of(path):
    return json.loads(path.read_text())


@pytest.fixture
def finished(tmp_path):
    """What three ranks leave behind: 30 items in shards of 5, items 7 and 20 rejected."""
    (tmp_path / "manifest.json").write_bytes(orjson.dumps(MANIFEST))
    (tmp_path / "files").mkdir()
    for rank in range(3):
        lines, rejected = [], []
        for first in range(rank * 10, rank * 10 + 10, PER_SHARD):
            items = [item for item in range(first, first + PER_SHARD) if item not in (7, 20)]
            name = f"files/{first}-{first + PER_SHARD}.arrow"
            samples = [TokenSample(i, np.arange(i + 1, dtype=np.int32), np.ones(i + 1, bool), ()) for i in items]
            (tmp_path / name).write_bytes(shard_bytes(samples, MANIFEST))
            lines += [entry_line(name, row, item + 1, item) + b"\n" for row, item in enumerate(items)]
            rejected += [f'{{"item":{i},"reason":"x"}}\n' for i in range(first, first + PER_SHARD) if i not in items]
        path = sub_record(tmp_path, rank, 3)
        path.write_bytes(b"".join(lines))
        companions(path)[0].write_text("".join(rejected))
        companions(path)[1].write_bytes(orjson.dumps({"manifest": manifest_id(MANIFEST)}))
    return tmp_path


@pytest.mark.parametrize("save", ["record.json", "record.jsonl"])
def test_every_item_once_in_order(finished, save):
    path = run(finished, save=save)
    record = Record.load(path)
    assert record.ids.tolist() == [item for item in range(30) if item not in (7, 20)]
    assert [sample.id for sample in TokenFiles(path)] == record.ids.tolist()
    rejected, summary = companions(path)
    assert [json.loads(line)["item"] for line in rejected.read_text().splitlines()] == [7, 20]
    assert json.loads(summary.read_text())["items"] == 28
    if save == "record.json":
        assert entries_of(path)[7] == {"file": "files/5-10.arrow", "row": 2, "len": 9, "id": 8}
        content = (finished / "files/5-10.arrow").read_bytes()
        assert entries_of(path)[5]["sha256"] == hash_of(content) == hashlib.sha256(content).hexdigest()[:16]


def test_a_record_elsewhere_finds_its_token_files(finished, tmp_path_factory):
    path = tmp_path_factory.mktemp("elsewhere") / "all.json"
    concat_record.main(["--sub_record_dir", str(finished), "--save_path", str(path)])
    assert [sample.id for sample in TokenFiles(path)][:8] == [0, 1, 2, 3, 4, 5, 6, 8]


def test_a_missing_rank_is_named(finished):
    sub_record(finished, 1, 3).unlink()
    with pytest.raises(UserError, match="no sub-record of rank 1 of 3"):
        run(finished)
    assert not (finished / "record.json").exists()


def test_partial_data_can_be_asked_for(finished, capsys):
    sub_record(finished, 1, 3).unlink()
    assert len(entries_of(run(finished, "--allow_partial"))) == 18
    shown = capsys.readouterr().out
    assert "no sub-record of rank 1" in shown and "items missing: 10-19" in shown


def test_missing_items_are_named_also_at_the_end(finished):
    for rank in (0, 2):
        path = sub_record(finished, rank, 3)
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="items missing: 9, 29"):
        run(finished)


def test_a_lost_list_of_rejected_items_is_noticed(finished):
    companions(sub_record(finished, 2, 3))[0].unlink()
    with pytest.raises(UserError, match=r"items missing: 20\."):
        run(finished)


@pytest.mark.parametrize("line", ['{"item":20,"rea', "[20]", '{"id":20}', '{"item":null}', '{"item":"x"}'])
def test_a_damaged_list_of_rejected_items_is_named(finished, line):
    with companions(sub_record(finished, 2, 3))[0].open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=r"2-of-3-record\.rejected\.jsonl, line 2: not a rejected item"):
        run(finished)


def test_doubled_items_are_named(finished):
    lines = sub_record(finished, 0, 3).read_bytes().splitlines(keepends=True)
    with sub_record(finished, 1, 3).open("ab") as file:
        file.write(lines[4])
    with pytest.raises(UserError, match="more than once: 4"):
        run(finished)
    assert [entry["id"] for entry in entries_of(run(finished, "--allow_partial"))][:6] == [0, 1, 2, 3, 4, 5]


def test_an_entry_without_its_row_is_refused(finished):
    path = sub_record(finished, 0, 3)
    path.write_bytes(path.read_bytes().replace(b'"row":0,', b"", 1))
    with pytest.raises(DataError, match=r"0-5\.arrow: the sub-record names no row for item 0"):
        run(finished)


@pytest.mark.parametrize("field, value", [("len", 5), ("id", 4), ("row", 2)])
def test_an_entry_that_its_token_file_does_not_hold_is_refused(finished, field, value):
    path = sub_record(finished, 0, 3)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    entries[3][field] = value  # it was row 3, item 3, 4 tokens
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with pytest.raises(DataError, match=r"0-5\.arrow, row \d: holds item \d of \d tokens, but the sub-record says"):
        run(finished)
    assert not (finished / "record.json").exists()


def test_a_changed_token_file_is_refused(finished):
    path, shard = sub_record(finished, 0, 3), finished / "files/5-10.arrow"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    entries[5]["sha256"] = hash_of(shard.read_bytes())
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    samples = [TokenSample(i, np.arange(i + 1, dtype=np.int32), np.zeros(i + 1, bool), ()) for i in (5, 6, 8, 9)]
    shard.write_bytes(shard_bytes(samples, MANIFEST))
    with pytest.raises(DataError, match=r"5-10\.arrow: not the bytes that were written"):
        run(finished)


def test_items_beyond_the_input_are_refused(finished):
    path = sub_record(finished, 2, 3)
    samples = [TokenSample(i, np.arange(i + 1, dtype=np.int32), np.ones(i + 1, bool), ()) for i in (99,)]
    (finished / "files/99.arrow").write_bytes(shard_bytes(samples, MANIFEST))
    path.write_bytes(path.read_bytes() + entry_line("files/99.arrow", 0, 100, 99) + b"\n")
    with pytest.raises(UserError, match="items up to 99, but the input has only 30"):
        run(finished)


def test_unsorted_sub_records_are_sorted(finished, monkeypatch):
    monkeypatch.setattr(concat_record, "PIECE", 3)
    expected = run(finished).read_bytes()
    for rank in range(3):
        path = sub_record(finished, rank, 3)
        lines = path.read_bytes().splitlines(keepends=True)
        random.Random(rank).shuffle(lines)
        path.write_bytes(b"".join(lines))
    assert run(finished).read_bytes() == expected


def test_a_sub_record_of_another_run_is_refused(finished):
    companions(sub_record(finished, 1, 3))[1].write_bytes(orjson.dumps({"manifest": "another"}))
    with pytest.raises(UserError, match=r"1-of-3-record.jsonl: made by another run \(manifest another"):
        run(finished)


def test_a_sub_record_without_its_summary_is_refused(finished):
    companions(sub_record(finished, 1, 3))[1].unlink()
    with pytest.raises(UserError, match="no readable summary"):
        run(finished)


def test_a_token_file_of_another_run_is_refused(finished):
    samples = [TokenSample(i, np.arange(i + 1, dtype=np.int32), np.ones(i + 1, bool), ()) for i in range(10, 15)]
    (finished / "files/10-15.arrow").write_bytes(shard_bytes(samples, {**MANIFEST, "tokenizer": "y"}))
    with pytest.raises(UserError, match=r"10-15\.arrow: a token file of another run"):
        run(finished)


def test_a_missing_or_shortened_token_file_is_named(finished):
    (finished / "files/10-15.arrow").write_bytes(shard_bytes([], MANIFEST))
    with pytest.raises(UserError, match=r"10-15\.arrow: the sub-record names row 0, the file has 0"):
        run(finished)
    (finished / "files/10-15.arrow").unlink()
    with pytest.raises(UserError, match=r"10-15\.arrow: a sub-record names .* does not exist. Run pre_tokenize"):
        run(finished)


def test_sub_records_of_two_runs_are_not_mixed(finished):
    sub_record(finished, 0, 1).touch()
    with pytest.raises(UserError, match=r"several runs, \*-of-1 and \*-of-3"):
        run(finished)


def test_a_failure_keeps_the_record_of_before(finished):
    path = run(finished)
    before = path.read_bytes()
    sub_record(finished, 1, 3).unlink()
    with pytest.raises(UserError):
        run(finished)
    assert path.read_bytes() == before
    assert not list(finished.glob("*.tmp"))


def test_an_empty_folder_and_a_wrong_suffix_are_told(tmp_path):
    with pytest.raises(UserError, match="no sub-record here"):
        run(tmp_path)
    with pytest.raises(UserError, match="name it"):
        run(tmp_path, save="record.txt")


@pytest.mark.parametrize("save", ["0-of-3-record.json", "2-of-3-record.jsonl"])
def test_a_ranks_name_is_refused_before_anything_of_it_is_written_over(finished, save):
    before = {path: path.read_bytes() for path in finished.glob("*-of-*")}
    with pytest.raises(UserError, match="a rank's name"):
        run(finished, save=save)
    assert {path: path.read_bytes() for path in finished.glob("*-of-*")} == before


def published(folder, rank, splits, items, prefix):
    """Sub-records as the published tool writes them."""
    (folder / "files").mkdir(exist_ok=True)
    with (folder / f"{rank}-of-{splits}-record.jsonl").open("w") as file:
        for item in items:
            sample = TokenSample(item, np.arange(3, dtype=np.int32), np.ones(3, bool), ())
            (folder / "files" / f"{item}.pkl").write_bytes(pickle_bytes(sample))
            file.write(json.dumps({"file": f"{prefix}/files/{item}.pkl", "len": 3, "id": item}) + "\n")


@pytest.mark.parametrize("relative", [False, True])
def test_published_sub_records_are_read(tmp_path, monkeypatch, relative):
    """They name pickles by absolute paths, or from where the tool was started."""
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    for rank in range(2):
        published(folder, rank, 2, range(rank * 3, rank * 3 + 3), "out" if relative else str(folder))
    entries = entries_of(run(folder))
    assert [entry["id"] for entry in entries] == list(range(6))
    assert all((folder / entry["file"]).exists() and "row" not in entry for entry in entries)


def test_the_documents_command(finished):
    """As the document spells it; and joining records needs no torch."""
    command = [sys.executable, "-u", "pre_tokenize/concat_record.py", "--sub_record_dir", str(finished)]
    command += ["--save_path", str(finished / "record.json")]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "items 28, tokens" in result.stdout
    probe = "import sys, pre_tokenize.concat_record; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0
