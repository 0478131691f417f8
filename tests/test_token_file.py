import errno
import json
import os
import pickle
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from torch.utils.data import DataLoader

from pre_tokenize import token_file
from pre_tokenize.record import Lengths, Record, entry_line
from pre_tokenize.token_file import (
    CheckedFiles,
    TokenFiles,
    TokenSample,
    hash_of,
    pickle_bytes,
    read_pickle,
    read_shard,
    shard_bytes,
)
from vistoken.errors import DataError, UserError

MANIFEST = {"tokenizer": "x", "image_dir": "/pictures"}


def some_samples(count=25):
    rng = np.random.default_rng(0)
    for i in range(count):
        tokens = rng.integers(0, 65536, rng.integers(0 if i == 3 else 1, 70)).astype(np.int32)
        yield TokenSample(i, tokens, rng.random(len(tokens)) < 0.5, ("a.png", "/b/c.png")[: i % 3])


def same(a, b):
    return a.id == b.id and np.array_equal(a.tokens, b.tokens) and np.array_equal(a.loss_mask, b.loss_mask)


@pytest.fixture
def arrow_record(tmp_path):
    """Three shards of up to 10 samples, listed in a record."""
    samples, lines = list(some_samples()), []
    (tmp_path / "files").mkdir()
    for first in range(0, 25, 10):
        shard = samples[first : first + 10]
        name = f"files/{first}-{first + len(shard)}.arrow"
        (tmp_path / name).write_bytes(shard_bytes(shard, MANIFEST))
        lines += [entry_line(name, row, len(sample.tokens), sample.id) for row, sample in enumerate(shard)]
    path = tmp_path / "record.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path, samples


@pytest.fixture
def pickle_record(tmp_path):
    """The published form: one pickle an item, listed on one line of JSON."""
    samples = list(some_samples())
    (tmp_path / "files").mkdir()
    for sample in samples:
        (tmp_path / "files" / f"{sample.id}.pkl").write_bytes(pickle_bytes(sample))
    lines = [entry_line(str(tmp_path / f"files/{s.id}.pkl"), None, len(s.tokens), s.id) for s in samples]
    path = tmp_path / "record.json"
    path.write_bytes(b"[" + b", ".join(lines) + b"]")
    return path, samples


@pytest.mark.parametrize("form", ["arrow_record", "pickle_record"])
def test_samples_come_back_in_any_order(form, request):
    path, samples = request.getfixturevalue(form)
    files = TokenFiles(path)
    assert len(files) == 25
    assert files.lengths.tolist() == [len(sample.tokens) for sample in samples]
    for i in np.random.default_rng(1).permutation(25):
        assert same(files[i], samples[i])
        np.testing.assert_array_equal(files[i].labels, np.where(samples[i].loss_mask, samples[i].tokens, -100))
    assert same(files[-1], samples[-1]) and len(files[3:5]) == 2
    with pytest.raises(IndexError):
        files[25]


def test_relative_images_begin_at_the_manifests_folder_or_where_told(arrow_record):
    path, _ = arrow_record
    assert TokenFiles(path)[2].images == ("/pictures/a.png", "/b/c.png")
    assert TokenFiles(path, image_dir="/moved")[2].images == ("/moved/a.png", "/b/c.png")
    assert TokenFiles(path).manifest() == MANIFEST


def test_a_moved_data_set_still_reads(arrow_record, tmp_path_factory):
    path, samples = arrow_record
    moved = tmp_path_factory.mktemp("elsewhere") / "data"
    path.parent.rename(moved)
    assert same(TokenFiles(moved / "record.jsonl")[17], samples[17])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers_read_what_the_parent_had_open(arrow_record, method):
    path, samples = arrow_record
    files = TokenFiles(path)
    assert same(files[24], samples[24])  # the parent holds a shard open
    loader = DataLoader(files, batch_size=5, collate_fn=list, num_workers=2, multiprocessing_context=method)
    read = [sample for batch in loader for sample in batch]
    assert all(map(same, read, samples)) and len(read) == 25


def test_what_is_pickled_holds_no_open_files(arrow_record):
    files = TokenFiles(arrow_record[0])
    unread = pickle.dumps(files)
    files[0]
    assert pickle.dumps(files) == unread


def open_descriptors():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def mapped_files(folder: Path) -> int:
    """How many of a folder's files are mapped into this process's memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[-1] for line in lines if str(folder) in line})


def test_only_so_many_shards_stay_open(arrow_record, monkeypatch):
    monkeypatch.setattr(token_file, "OPEN_SHARDS", 2)
    files, before = TokenFiles(arrow_record[0]), open_descriptors()
    for i in (0, 10, 20, 0, 10, 20):
        assert files[i].id == i
        assert mapped_files(arrow_record[0].parent) in (1, 2)
    assert open_descriptors() <= before + 2


def test_other_tools_can_read_a_shard(arrow_record):
    path, samples = arrow_record
    table = pa.ipc.open_file(pa.memory_map(str(path.parent / "files/0-10.arrow"))).read_all()
    assert table.column_names == ["id", "tokens", "loss_mask", "images"]
    assert table["tokens"][7].as_py() == samples[7].tokens.tolist()
    assert table["loss_mask"][7].as_py() == samples[7].loss_mask.tolist()


def test_the_same_samples_give_the_same_bytes():
    samples = list(some_samples())
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(shard_bytes, samples, MANIFEST).result() == shard_bytes(samples, MANIFEST)


def test_the_published_pickle_has_the_published_fields(pickle_record):
    path, samples = pickle_record
    content = pickle.loads((path.parent / "files/2.pkl").read_bytes())
    assert list(content) == ["token", "label", "id", "raw_image"]
    assert content["token"] == samples[2].tokens.tolist() and content["raw_image"] == ["a.png", "/b/c.png"]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    bad, trace = tmp_path / "1.pkl", tmp_path / "executed"
    bad.write_bytes(pickle.dumps({"token": [1], "label": [1], "id": Malicious(trace), "raw_image": []}))
    with pytest.raises(UserError, match=r"1\.pkl: .*asks for posix.mkdir"):
        read_pickle(bad)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        pickle.dumps([1, 2]),
        pickle.dumps({"token": [1]}),
        pickle.dumps({"token": ["x"], "label": [1], "id": 0}),
        pickle.dumps({"token": [1, 2], "label": [1], "id": 0}),
        pickle.dumps({"token": [1, 2], "label": [-100, 3], "id": 0}),
        pickle.dumps({"token": [2**40], "label": [-100], "id": 0}),
        pickle.dumps({"token": [1, 2], "label": [-100, 2], "id": 0})[:-9],
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",  # a string of 9 exabytes
    ],
)
def test_a_damaged_pickle_is_named(tmp_path, content):
    path = tmp_path / "7.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"7\.pkl"):
        read_pickle(path)


@pytest.mark.parametrize("damage", ["cut", "garbage", "other columns", "absent"])
def test_a_damaged_shard_is_named(arrow_record, damage):
    path, _ = arrow_record
    shard = path.parent / "files/10-20.arrow"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "garbage":
        shard.write_bytes(b"garbage")
    elif damage == "other columns":
        batch = pa.record_batch({"id": [1]})
        with pa.ipc.new_file(str(shard), batch.schema) as writer:
            writer.write_batch(batch)
    else:
        shard.unlink()
    with pytest.raises(UserError, match=r"10-20\.arrow"):
        TokenFiles(path)[12]


def test_a_record_older_than_its_token_files_is_told(arrow_record):
    path, samples = arrow_record
    (path.parent / "files/0-10.arrow").write_bytes(shard_bytes(samples[1:10], MANIFEST))
    with pytest.raises(UserError, match=r"row 4: holds item 5 .* says item 4 .*Run concat_record.py again"):
        TokenFiles(path)[4]
    with pytest.raises(UserError, match="names row 9, the file has 9"):
        TokenFiles(path)[9]


def with_hashes(record: Path) -> Path:
    """The record as the tools write it today: the first entry of a file has its hash."""
    entries, seen = [json.loads(line) for line in record.read_text().splitlines()], set()
    for entry in entries:
        if entry["file"] not in seen:
            entry["sha256"] = hash_of((record.parent / entry["file"]).read_bytes())
            seen.add(entry["file"])
    record.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return record


def test_a_flipped_bit_anywhere_in_a_file_with_a_hash_is_named(arrow_record):
    record = with_hashes(arrow_record[0])
    shard = record.parent / "files/0-10.arrow"
    good = shard.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(good)), 300):
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(content)
        with pytest.raises(DataError, match=r"0-10\.arrow: not the bytes that were written"):
            TokenFiles(record)[4]


def test_no_flipped_bit_ends_the_process_without_a_hash(arrow_record):
    """Old records have none. Much of the damage is then found by its form, and none of it may abort pyarrow."""
    shard = arrow_record[0].parent / "files/0-10.arrow"
    good, found = shard.read_bytes(), 0
    child = os.fork()
    if not child:
        for bit in random.Random(0).sample(range(8 * len(good)), 500):
            content = bytearray(good)
            content[bit // 8] ^= 1 << bit % 8
            shard.write_bytes(content)
            try:
                read_shard(shard)
            except DataError:
                found += 1
        os._exit(0 if found > 50 else 7)  # neither is a signal's
    assert os.waitpid(child, 0)[1] == 0


def test_a_file_is_hashed_once_for_all_processes_of_a_run(arrow_record, tmp_path, monkeypatch):
    record = Record.load(with_hashes(arrow_record[0]))
    checked, hashed = CheckedFiles(tmp_path / "run" / "checked"), []
    checked.begin(record.files)
    monkeypatch.setattr(token_file, "hash_of", lambda content: hashed.append(1) or hash_of(content))
    for _ in range(3):  # as data-loader processes do
        files = pickle.loads(pickle.dumps(TokenFiles(record, checked=checked)))
        assert [sample.id for sample in files] == list(range(25))
    assert len(hashed) == 3  # files
    checked.begin(record.files)
    TokenFiles(record, checked=checked)[0]
    assert len(hashed) == 4


def test_a_pickle_with_a_hash_is_held_against_it(tmp_path):
    sample = TokenSample(3, np.arange(5, dtype=np.int32), np.ones(5, bool), ())
    path, content = tmp_path / "3.pkl", pickle_bytes(sample)
    other = pickle_bytes(sample._replace(tokens=np.array([0, 1, 2, 3, 9], np.int32)))
    for stored, hash_in_record in ((content, hash_of(content)), (content, None), (other, None)):
        path.write_bytes(stored)
        (tmp_path / "record.jsonl").write_bytes(entry_line("3.pkl", None, 5, 3, hash_in_record))
        assert TokenFiles(tmp_path / "record.jsonl")[0].id == 3
    (tmp_path / "record.jsonl").write_bytes(entry_line("3.pkl", None, 5, 3, hash_of(content)))
    with pytest.raises(DataError, match=r"3\.pkl: not the bytes that were written"):
        TokenFiles(tmp_path / "record.jsonl")[0]


def test_a_file_that_may_not_be_read_is_not_called_damaged(arrow_record, monkeypatch):
    def refuse(*path, **more):
        raise PermissionError(errno.EACCES, "Failed to open local file")

    monkeypatch.setattr(pa, "memory_map", refuse)
    with pytest.raises(DataError, match=r"cannot read this token file \(Permission denied\)$"):
        TokenFiles(arrow_record[0])[0]


@pytest.mark.parametrize("name", ["0-10.arrow", "x.pkl", "record.jsonl"])
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    if name != "record.jsonl":
        (tmp_path / "record.jsonl").write_bytes(entry_line(name, 0 if "arrow" in name else None, 5, 3))
    with pytest.raises(UserError, match=f"{name}.*named pipe"):
        TokenFiles(tmp_path / "record.jsonl")[0]


def test_an_empty_shard_can_be_written_and_read(tmp_path):
    (tmp_path / "0-0.arrow").write_bytes(shard_bytes([], MANIFEST))
    assert read_shard(tmp_path / "0-0.arrow") == []


@pytest.mark.parametrize(
    "content, where",
    [
        ('{"file": "a", "len": 1, "id": 0}\n{"file": "a", "le', "line 2"),
        ('[\n{"file": "a", "len": 1, "id": 0},\n', "list is not closed"),
        ('[{"file": "a", "len": 1, "id": 0}', "line 1"),
        ('[{"file": "a", "len": -1, "id": 0}]', "entry 0"),
        ('{"file": "a", "len": 2147483648, "id": 0}\n', "line 1"),
        ('{"file": "a", "row": 2147483648, "len": 1, "id": 0}\n', "line 1"),
        ('{"file": "a", "len": 1, "id": 9223372036854775808}\n', "line 1"),
        ('{"file": "a", "id": 0}\n', "line 1"),
        ("5\n", "line 1"),
        ('{"file": 3, "len": 1, "id": 0}\n', "line 1"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, content, where):
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(UserError, match=where):
        Record.load(path)


def test_an_absent_record_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json: cannot read the record"):
        Record.load(tmp_path / "absent.json")


def test_the_length_distribution_is_exact():
    lengths = Lengths()
    for length in np.random.default_rng(0).permutation(np.arange(1, 1001)).tolist():
        lengths.add(length)
    assert lengths.as_dict() == {
        **{"items": 1000, "tokens": 500500, "mean": 500.5},
        **{"min": 1, "p10": 100, "median": 500, "p90": 900, "p99": 990, "max": 1000},
    }
    assert lengths.longer_than(900) == 100
    assert Lengths().as_dict() == {"items": 0, "tokens": 0}
