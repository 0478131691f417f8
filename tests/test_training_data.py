"""Records, their indexes, and what becomes of samples that are wrong."""

import json
import os
import pickle
import resource
import signal
import tarfile
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from train_small import golden_samples, text_samples, write_data_config, write_record
from unitoken_small import IMAGES

from pre_tokenize.token_file import TokenFiles, TokenSample
from training.assemble import Data
from training.data.index import fingerprint, open_indexed
from training.data.loading import (
    Batches,
    ImageReader,
    SampleRules,
    build_sample,
    check_manifest,
    loader_deaths_named,
    make_loader,
    read_data_config,
)
from training.data.packing import IMAGE_END, IMAGE_START, Sample
from training.data.sampler import OpenSource, RankBatches, Sampler, Source
from training.preflight import data_lines, token_kinds
from vistoken.errors import DataError, Failed, UserError

RULES = SampleRules(10343, 4096, None, ImageReader(384, 27, False))


def index(record):
    return open_indexed(record, fingerprint(record), record.parent)


@pytest.mark.parametrize("pickles", [False, True])
def test_an_index_gives_what_the_record_gives(tmp_path, pickles):
    record = write_record(tmp_path / "tokens", text_samples(20), pickles=pickles)
    direct, mapped = TokenFiles(record), TokenFiles(pickle.loads(pickle.dumps(index(record))))
    assert len(mapped) == 20 and (mapped.lengths == direct.lengths).all()
    for one, other in zip(direct, mapped, strict=True):
        assert one.id == other.id and (one.tokens == other.tokens).all() and (one.loss_mask == other.loss_mask).all()


def test_a_published_list_is_indexed_too(tmp_path):
    record = write_record(tmp_path / "tokens", text_samples(5), pickles=True)
    published = record.with_name("published.json")
    published.write_text(json.dumps([json.loads(line) for line in record.read_text().splitlines()]))
    assert list(index(published).lengths) == list(index(record).lengths)


def test_an_index_follows_the_content_of_its_record(tmp_path):
    record = write_record(tmp_path / "tokens", text_samples(5))
    first = index(record)
    made = (first.folder / "ids.npy").stat().st_mtime_ns
    assert index(record).folder == first.folder and (first.folder / "ids.npy").stat().st_mtime_ns == made
    times = record.stat()
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(lines[::-1]))
    os.utime(record, ns=(times.st_atime_ns, times.st_mtime_ns))  # same path, size and time
    assert list(index(record).ids) == [4, 3, 2, 1, 0]
    assert not first.folder.exists(), "the stale index is removed"


def test_an_empty_or_damaged_record_is_refused_and_leaves_no_index(tmp_path):
    record = tmp_path / "record.jsonl"
    for content, message in (("", "empty"), ('{"file": 3}\n', "line 1"), ('{"file": "a"', "line 1")):
        record.write_text(content)
        with pytest.raises(UserError, match=message):
            index(record)
    assert [path.name for path in tmp_path.iterdir()] == ["record.jsonl"]


def test_a_full_disk_is_told_and_leaves_no_index(tmp_path):
    record = write_record(tmp_path / "tokens", text_samples(5))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write the index of .*record\.jsonl \(File too large"):
            index(record)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in record.parent.iterdir()) == ["files", "record.jsonl"]


def test_starting_with_a_large_index_is_quick(tmp_path):
    """A million entries: made once, then opened without being read."""
    record = tmp_path / "record.jsonl"
    with record.open("w") as file:
        for shard in range(0, 200_000, 1000):
            file.writelines(
                f'{{"file":"files/{shard}.arrow","row":{i},"len":9,"id":{shard + i}}}\n' for i in range(1000)
            )
    index(record)
    began = time.monotonic()
    assert index(record).ids[123_456] == 123_456
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("META: []", "no records"),
        ("- path: a", "META"),
        ("META: [{path: r.jsonl}]\nOTHER: 1", "OTHER"),
        ("META: [{path: r.jsonl, weight: 2}]", "entry 0: unknown key 'weight'"),
        ("META: [{path: r.jsonl, ratio: 0}]", "ratio"),
        ("META: [{path: r.jsonl}, {ratio: 1}]", "entry 1"),
        ("META: [{path: missing.jsonl}]", "no such record: .*missing.jsonl"),
        ("META: [", "not valid YAML"),
        ("META: [{path: r.jsonl, ratio: .inf}]", "ratio must be"),
        ("META: [{path: r.jsonl, ratio: 1.0e+30}]", "ratio must be"),
        ("META: [{path: r.jsonl, image_dir: missing}]", "image_dir is no folder: .*missing"),
        (b"META: \xff", "is not text"),
    ],
)
def test_a_wrong_data_config_is_refused(tmp_path, content, message):
    (tmp_path / "r.jsonl").write_text("")
    (tmp_path / "data.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_data_config(tmp_path / "data.yaml")


def test_paths_are_taken_from_the_data_configs_folder(tmp_path):
    (tmp_path / "r.jsonl").write_text("")
    (tmp_path / "pictures").mkdir()
    fields = {"ratio": 2, "type": "t2i", "image_dir": "pictures"}
    entry, *_ = read_data_config(write_data_config(tmp_path / "data.yaml", "r.jsonl", **fields))
    assert entry == Source(tmp_path / "r.jsonl", 2.0, "t2i", tmp_path / "pictures")


def test_the_preflight_tells_what_each_type_gets_and_what_is_cut_off(tmp_path):
    files = TokenFiles(write_record(tmp_path / "tokens", text_samples(20)))
    sources = [OpenSource("", 1.0, "a", lengths=files.lengths), OpenSource("", 2.0, "b", lengths=files.lengths)]
    lines = {}
    for limit in (20, 4096):
        dataset = Batches([files, files], SampleRules(10343, limit))
        lines[limit] = data_lines(Data(dataset, Sampler(sources, 4, 0), []))
        assert lines[limit].endswith("15 steps of 4 samples an epoch: 'a' 5, 'b' 10")
    assert lines[20].count(f"{(files.lengths > 20).sum()} are longer than --max_seq_len 20 and are cut off") == 2
    assert "longer" not in lines[4096]


def test_the_preflight_shows_a_block_that_is_cut_off_as_an_image():
    tokens = np.array([0, IMAGE_START, 10, 11, IMAGE_END, 0, IMAGE_START, 12, 13])
    none = np.full(len(tokens), -1)
    assert token_kinds(Sample("", tokens, none, none, [], 0)).tolist() == [0, 1, 1, 1, 0, 0, 1, 1, 1]


def test_tokens_of_another_vocabulary_are_refused():
    record = "record.json"
    check_manifest({"vocab_size": 100, "vocabulary": "a"}, record, "a", 100)
    check_manifest({"vocab_size": 100, "vocabulary": "a"}, record, None, 100)
    check_manifest(None, record, "a", 100)
    with pytest.raises(UserError, match="vocabulary of 101"):
        check_manifest({"vocab_size": 101}, record, "a", 100)
    with pytest.raises(UserError, match="another vocabulary"):
        check_manifest({"vocab_size": 100, "vocabulary": "b"}, record, "a", 100)
    with pytest.raises(UserError, match=r"0\.\.99"):
        build_sample(TokenSample(0, np.array([100]), np.array([True]), ()), "x", SampleRules(100, 10))


def test_images_to_learn_are_refused_while_masked():
    t2i = golden_samples(["t2i"])[0]
    with pytest.raises(UserError, match="--unmask_image_logits"):
        build_sample(t2i, "x", SampleRules(10343, 4096, continuous=RULES.continuous))


def test_cutting_a_block_takes_its_continuous_tokens_too():
    caption = golden_samples(["caption"])[0]
    end = int(np.flatnonzero(caption.tokens == 8196)[0])
    whole, cut = (
        build_sample(caption, "x", SampleRules(10343, size, None, RULES.continuous)) for size in (end + 1, end)
    )
    assert len(whole) == end + 1 + 730 and len(whole.tiles) == 1
    assert len(cut) == end and cut.tiles == []


def test_an_unreadable_image_is_replaced_and_told(tmp_path):
    good, bad = golden_samples(["caption", "caption"])
    samples = [bad._replace(id=0, images=(str(IMAGES / "broken.jpg"),)), good._replace(id=1)]
    dataset = Batches([TokenFiles(write_record(tmp_path / "tokens", samples))], RULES)
    batch = dataset[[0, 1]]
    assert [name[-4:] for name in batch.names] == ["id 1", "id 1"]
    (skipped,) = batch.skipped
    assert "row 0" in skipped.name and "broken.jpg" in skipped.reason and skipped.instead.endswith("id 1")


def test_what_stands_in_for_a_sample_is_no_longer_than_it(tmp_path):
    """A batch by a budget of tokens, images included, has room for no more."""
    text, caption, shorter, bad = golden_samples(["text", "caption", "t2i", "wide"])
    bad = bad._replace(images=(str(IMAGES / "broken.jpg"),))
    long = text._replace(tokens=text.tokens.repeat(60), loss_mask=text.loss_mask.repeat(60))
    samples = [sample._replace(id=number) for number, sample in enumerate([bad, *[caption, long] * 20, shorter])]
    rules = replace(RULES, continuous=replace(RULES.continuous, anyres=True))
    dataset = Batches([TokenFiles(write_record(tmp_path / "tokens", samples))], rules)
    assert dataset[[0]].names[0].endswith("id 41"), "the others are longer by their image, or by their text"


def test_a_record_of_any_size_has_others_to_stand_in(tmp_path, monkeypatch):
    """Steps of the record's own size would come back to the same sample."""
    monkeypatch.setattr("training.data.loading.STRIDE", 5)
    good, bad = golden_samples(["caption", "caption"])
    samples = [bad._replace(id=0, images=(str(IMAGES / "broken.jpg"),)), *(good._replace(id=n) for n in range(1, 10))]
    dataset = Batches([TokenFiles(write_record(tmp_path / "tokens", samples))], RULES)
    assert dataset[[0]].names[0].endswith("id 6")


def test_images_that_lie_in_a_tar_file_are_those_of_the_folder(tmp_path):
    """As pre_tokenize.py names them."""
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        tar.add(golden_samples(["caption"])[0].images[0], "deep/0.png")
    rules = replace(RULES, continuous=replace(RULES.continuous, members=tmp_path / "members"))
    packed = {}
    for folder, name in ((None, golden_samples(["caption"])[0].images[0]), (tmp_path, "shard-0.tar/deep/0.png")):
        samples = [golden_samples(["caption"])[0]._replace(images=(name,))]
        record = write_record(tmp_path / f"tokens{len(packed)}", samples, manifest={"image_dir": str(folder or "")})
        batch = Batches([TokenFiles(record)], rules)[[0]]
        packed[folder] = batch.tiles
    assert len(packed[None]) == 1 and (packed[None] == packed[tmp_path]).all()
    assert len(list((tmp_path / "members").glob("index-shard-0.tar-*.json"))) == 1


def test_a_record_without_any_usable_sample_is_an_error_not_a_loop(tmp_path):
    bad = golden_samples(["caption"])[0]._replace(images=("/nowhere.png",))
    dataset = Batches([TokenFiles(write_record(tmp_path / "tokens", [bad]))], RULES)
    error = dataset[[0]]
    assert isinstance(error, UserError) and "nowhere.png" in str(error)


def test_images_must_match_their_blocks():
    caption = golden_samples(["caption"])[0]
    with pytest.raises(Failed, match="images do not match"):
        build_sample(caption._replace(images=()), "x", RULES)


def test_a_missing_image_is_named_with_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Failed, match=str(tmp_path / "gone.png")):
        build_sample(golden_samples(["caption"])[0]._replace(images=("gone.png",)), "x", RULES)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_order_does_not_depend_on_data_loader_processes(tmp_path, workers):
    files = TokenFiles(index(write_record(tmp_path / "tokens", text_samples(40))))
    dataset = Batches([files], SampleRules(10343, 4096))
    order = RankBatches(Sampler([OpenSource("", lengths=files.lengths)], 8, 0), 1, 2, 0, 1, (0, 0))
    expected, found = ([batch.names for batch in make_loader(dataset, order, n, pin=False)] for n in (0, workers))
    assert expected == found and len(found) == 10


class _Dies(Batches):
    def sample(self, number):
        sample = super().sample(number)
        if number == 7:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory is short
        return sample


def test_a_dying_loader_process_names_what_it_was_reading(tmp_path):
    files = TokenFiles(index(write_record(tmp_path / "tokens", text_samples(12))))
    dataset = _Dies([files], RULES)
    order = RankBatches(Sampler([OpenSource("", lengths=files.lengths)], 2, 0), 1, 1, 0, 1, (0, 0))
    died = r"(killed by signal: Killed|exited unexpectedly).* It was reading .*0\.arrow, row 7, item 7"
    with pytest.raises(DataError, match=died), loader_deaths_named(dataset):
        list(make_loader(dataset, order, 1, pin=False))
    dataset.reading = torch.tensor([[1, 7], [2, -1 - 7]])  # the second reads it without its condition
    assert dataset.read_by(1) == dataset.read_by(2)
