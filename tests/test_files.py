"""Whatever is read, a named pipe or a device in its place is told, and nobody waits for it."""

import os

import pytest

from pre_tokenize.record import Record
from pre_tokenize.text import TextTokenizer
from pre_tokenize.token_file import read_pickle, read_shard
from training.data.loading import read_data_config as read_training_config
from vision_tokenizer.codebook.annotations import read_data_config
from vision_tokenizer.codebook.read import read_lines
from vision_tokenizer.tokenizer.import_annotations import main as import_annotations
from vistoken.errors import UserError
from vistoken.jobs.chunks import chunk_table
from vistoken.weights import read_state_dict

pytestmark = pytest.mark.timeout(20)
READERS = {
    "annotations.jsonl": lambda path: chunk_table(path, 8, path.parent / "cache.json"),
    "annotations.json": lambda path: chunk_table(path, 8, path.parent / "cache.json"),
    "meta.json": read_data_config,
    "codes.jsonl": lambda path: list(read_lines(path)),
    "record.json": Record.load,
    "0.pkl": read_pickle,
    "0.arrow": read_shard,
    "tokenizer.json": TextTokenizer,
    "data.yaml": read_training_config,
    "model.safetensors": lambda path: read_state_dict(path.parent),
    "model.bin": lambda path: read_state_dict(path.parent),
}


@pytest.mark.parametrize("kind", ["fifo", "device"])
@pytest.mark.parametrize("name", READERS)
def test_no_reader_opens_what_is_no_regular_file(name, kind, tmp_path):
    path = tmp_path / name
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=path.name):
        READERS[name](path)


@pytest.mark.parametrize("name", ["captions.json", "shard.tar", "part.parquet"])
@pytest.mark.parametrize("inside", [True, False], ids=["in a folder", "named"])
def test_no_import_reads_what_is_no_regular_file(name, inside, tmp_path):
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / name
    os.mkfifo(path)
    kind = {"captions.json": "coco", "shard.tar": "webdataset", "part.parquet": "parquet"}[name]
    source = path.parent if inside and kind != "coco" else path
    given = ["--format", kind, "--source", str(source), "--root", str(tmp_path / "out"), "--task", "generation"]
    with pytest.raises(UserError, match=r"neither a file nor a folder|not a regular file"):
        import_annotations([*given, *(["--image_source", str(tmp_path)] if kind == "coco" else [])])


def test_a_pipe_beside_pictures_is_a_failed_item(tmp_path, golden, capsys):
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "good.png").write_bytes((golden / "images" / "gray.png").read_bytes())
    (folder / "good.txt").write_text("Grey")
    for name in ("pipe.png", "words.txt"):
        os.mkfifo(folder / name)
    (folder / "pipe.txt").write_text("A pipe")
    (folder / "words.png").write_bytes((golden / "images" / "gray.png").read_bytes())
    given = ["--format", "pairs", "--source", str(folder), "--root", str(tmp_path / "out"), "--task", "generation"]
    assert import_annotations(given) == 1
    lines = (tmp_path / "out" / "annotations" / "pairs.jsonl").read_text().splitlines()
    problems = (tmp_path / "out" / "import" / "pairs.rejected.jsonl").read_text()
    assert len(lines) == 1 and "good.png" in lines[0]
    assert problems.count("not a regular file") == 2
