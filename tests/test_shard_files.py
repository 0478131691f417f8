"""Shards before a job: every form of tar file, cut or whole, names in braces, and their entries in a data config."""

import tarfile

import pytest
from codebook_job import write_config
from sharding import shard_dataset, write_tar

from vision_tokenizer.codebook.annotations import read_data_config
from vision_tokenizer.codebook.inputs import input_files
from vistoken.errors import Failed, UserError
from vistoken.jobs.shards import expand, tar_samples


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_form_of_tar(form, tmp_path):
    folder = "f" * 90 + "/" + "g" * (40 if form == tarfile.USTAR_FORMAT else 140)
    names = [f"{folder}/00.txt", f"{folder}/00.png", "plain.txt"]
    if form != tarfile.USTAR_FORMAT:
        names.append("日本語/" + "ä" * 120 + ".txt")
    path = write_tar(tmp_path / "s.tar", [(name, name.encode()) for name in names], form)
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("folder")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        info = tarfile.TarInfo("link.txt")
        info.type, info.linkname = tarfile.SYMTYPE, "plain.txt"
        tar.addfile(info)
    for whole in (True, False):
        found = [(part.name, part.read()) for sample in tar_samples(path, whole) for _, part in sample.parts]
        assert found == [(name, name.encode()) for name in names]


def test_any_cut_of_a_tar_file_is_told(tmp_path):
    content = write_tar(tmp_path / "s.tar", [(f"{n}.txt", b"x" * (300 * n)) for n in range(4)]).read_bytes()
    end = content.rindex(b"x") // 512 * 512 + 512
    for length in range(0, end, 37):
        (tmp_path / "s.tar").write_bytes(content[:length])
        last = list(tar_samples(tmp_path / "s.tar", whole=True))[-1]
        assert isinstance(last.error, Failed), length


def test_names_in_braces():
    assert expand("a/{008..011}.tar") == ["a/008.tar", "a/009.tar", "a/010.tar", "a/011.tar"]
    assert expand("{a,b}/{1..2}.tar") == ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]
    assert expand("plain.tar") == ["plain.tar"]
    with pytest.raises(UserError, match="backwards"):
        expand("{3..1}.tar")


def test_two_shards_of_one_name_are_refused(tmp_path):
    config = write_config(tmp_path / "meta.json", set=shard_dataset(tmp_path, f"{tmp_path}/{{a,b}}/0.tar"))
    with pytest.raises(UserError, match=r"would both be written to 0\.jsonl"):
        input_files(read_data_config(config)[0])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image_dir": "x"}, "unknown key 'image_dir'"),
        ({"task": "drawing"}, "task must be generation or understanding"),
        ({"shards": 3}, "shards must be a string"),
    ],
)
def test_a_wrong_entry_is_named(entry, message, tmp_path):
    config = write_config(tmp_path / "meta.json", set=shard_dataset(tmp_path, "s.tar") | entry)
    with pytest.raises(UserError, match=message):
        read_data_config(config)
