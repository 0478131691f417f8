"""Which image files are taken, what is read of them, and what is said of those that are not."""

import io
import json
import os
import shutil
import stat
import tarfile
from pathlib import Path

import numpy as np
import pytest
from codebook_job import dataset, read_lines, run_here, write_config
from PIL import Image

from pre_tokenize.concat_record import ImageSizes
from pre_tokenize.concat_record import main as concat_record
from pre_tokenize.pre_tokenize import main as pre_tokenize
from pre_tokenize.token_file import TokenFiles, contents_of
from training.data.loading import Batches, ImageReader, SampleRules
from vision_tokenizer.images.files import (
    FORMATS,
    SUFFIXES,
    embedded_format,
    exif_orientation,
    is_whole,
    open_image,
    read_image,
    upright_size,
)
from vision_tokenizer.tokenizer.plan_codebook_inference import main as plan
from vision_tokenizer.tokenizer.verify_codebook import main as verify
from vistoken.errors import Failed, UserError
from vistoken.files import read_file
from vistoken.jobs.members import indexes
from vistoken.jobs.shards import NamedBytes


@pytest.fixture
def photo(golden):
    with Image.open(golden / "images" / "photo.jpg") as image:
        return image.convert("RGB").resize((48, 32))


def failure(path: Path, read=read_image) -> Failed:
    with pytest.raises(Failed) as caught:
        read(path)
    return caught.value


@pytest.mark.parametrize("kind", FORMATS)
def test_the_formats_that_are_taken(kind, photo, tmp_path):
    path = tmp_path / f"x{SUFFIXES[kind]}"
    photo.save(path, kind)
    assert read_image(path).size == photo.size
    assert embedded_format(NamedBytes("x", path.read_bytes())) == kind


@pytest.mark.parametrize("kind", ["EPS", "JPEG2000", "PCX", "ICO", "SGI"])
def test_other_formats_are_told_by_name_whatever_the_file_is_called(kind, photo, tmp_path):
    path = tmp_path / "x.jpg"
    photo.save(path, kind)
    for error in (
        failure(path),
        failure(path, open_image),
        failure(path, lambda p: embedded_format(NamedBytes(str(p), read_file(p)))),
    ):
        assert error.reason == "image format not taken" and f"{path}: {kind}; convert it" in error.detail


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "the file is empty"),
        (b"\xff\xd8", "not an image file"),  # of which Pillow says that it cannot unpack 4 bytes
        (b"xx", "text that begins 'xx'"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIF; convert it to one of JPEG"),
        (b"<!DOCTYPE html>\n<title>Not found</title>", "text that begins '<!DOCTYPE html> <title>Not found"),
        (b"version https://git-lfs.github.com/spec/v1", "text that begins 'version https://git-lfs"),
        (b"\xff\xd8 cut off at once", "not an image file"),
    ],
)
def test_a_picture_that_is_none_says_what_it_is(content, told, tmp_path):
    (tmp_path / "x.jpg").write_bytes(content)
    assert told in failure(tmp_path / "x.jpg").detail
    assert told in failure(NamedBytes("x.jpg", content), embedded_format).detail


def test_an_index_that_cannot_be_written_is_no_fault_of_the_image(photo, tmp_path, monkeypatch):
    photo.save(tmp_path / "x.png")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(tmp_path / "x.png", "x.png")
    monkeypatch.setattr(indexes, "folder", tmp_path / "x.png")
    with pytest.raises(UserError, match="cannot write"):
        open_image(tmp_path / "s.tar" / "x.png")


def test_no_other_program_is_started(photo, tmp_path, monkeypatch):
    """An EPS file is a program for Ghostscript, whatever it is called."""
    called = tmp_path / "called"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {called}\n")
    (tmp_path / "gs").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert shutil.which("gs") == str(tmp_path / "gs")
    photo.save(tmp_path / "x.jpg", "EPS")
    assert failure(tmp_path / "x.jpg").reason == "image format not taken"
    assert not called.exists()


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "link to a device"])
@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_refused_before_it_is_opened(kind, tmp_path):
    path = tmp_path / "x.png"
    if kind == "fifo":
        os.mkfifo(path)  # opening it would wait for a writer
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.symlink_to("/dev/zero")
    error = failure(path)
    told = "Is a directory" if kind == "folder" else "not a regular file"
    assert error.reason == "image unreadable" and told in error.detail and str(path) in error.detail
    with pytest.raises(OSError, match=told):
        read_file(path)


def test_sixteen_bits_are_scaled_by_their_range(tmp_path):
    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(deep).save(tmp_path / "grey.png")
    Image.fromarray(deep).save(tmp_path / "grey.tif")
    (tmp_path / "grey.ppm").write_bytes(b"P5 32 32 65535\n" + deep.astype(">u2").tobytes())
    for name in ("grey.png", "grey.tif", "grey.ppm"):
        image = read_image(tmp_path / name)
        assert image.mode == "L" and np.array_equal(np.asarray(image), deep >> 8), name
        assert image.convert("RGB").getpixel((16, 0)) == (4, 4, 4)  # Pillow's own conversion clips at 255


@pytest.mark.parametrize("values", [np.float32, np.int32], ids=["float", "32 bits"])
def test_more_bits_have_a_range_that_nobody_knows(values, tmp_path):
    Image.fromarray(np.ones((8, 8), values)).save(tmp_path / "x.tif")
    error = failure(tmp_path / "x.tif", open_image)
    assert error.reason == "more than 16 bits" and str(tmp_path / "x.tif") in error.detail


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_exif_orientation_is_ignored_or_applied(orientation, suffix, photo, tmp_path):
    exif, path = Image.Exif(), tmp_path / f"x{suffix}"
    exif[0x0112] = orientation
    photo.save(path, exif=exif, quality=95)
    ignored, upright = read_image(path), read_image(path, "apply")
    assert ignored.size == photo.size
    assert upright.size == (photo.size if orientation < 5 else photo.size[::-1])
    with open_image(path) as header:
        assert exif_orientation(header) == orientation
        assert upright_size(header, "apply") == (upright.height, upright.width)
        assert upright_size(header, "ignore") == (ignored.height, ignored.width)
    # the upper left corner is where a viewer shows it
    corner = {1: (0, 0), 2: (-1, 0), 3: (-1, -1), 4: (0, -1), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    x, y = (place % side for place, side in zip(corner[orientation], photo.size, strict=True))
    assert upright.convert("RGB").getpixel((0, 0)) == ignored.convert("RGB").getpixel((x, y))


def test_a_deep_image_is_turned_upright_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.full((4, 8), 40_000, np.uint16)).save(tmp_path / "x.png", exif=exif)
    upright = read_image(tmp_path / "x.png", "apply")
    assert (upright.size, upright.mode, upright.getpixel((0, 0))) == ((4, 8), "L", 40_000 >> 8)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_cut_off_is_found(kind, photo, tmp_path):
    """By its end, or by decoding it, as `plan` does where the end does not show it."""
    content = io.BytesIO()
    photo.save(content, kind)
    for keep in (0.5, 0.9):
        path = tmp_path / f"{keep}{SUFFIXES[kind]}"
        path.write_bytes(content.getvalue()[: int(len(content.getvalue()) * keep)])

        def look(path):
            with open_image(path) as image:
                if not is_whole(path, image):
                    read_image(path)

        assert failure(path, look).reason == "image unreadable"


def test_what_libtiff_says_comes_with_the_files_name(photo, tmp_path, capfd):
    content = io.BytesIO()
    photo.save(content, "TIFF", compression="tiff_lzw")
    damaged = bytearray(content.getvalue())
    damaged[len(damaged) // 3 : len(damaged) // 3 + 50] = b"\xff" * 50
    (tmp_path / "x.tif").write_bytes(damaged)
    error = failure(tmp_path / "x.tif")
    assert error.detail == f"{tmp_path / 'x.tif'}: decoder error -2; Using code not yet in table"
    assert capfd.readouterr().err == ""  # libtiff itself prints it as "tempfile.tif: ..."


@pytest.fixture
def portrait(tmp_path):
    """A folder with `phone.jpg`, which lies on its side and says so, and `upright.png`, as a viewer shows it."""
    folder = tmp_path / "images"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 24, 3), np.uint8)).resize((96, 48))
    lying.save(folder / "phone.jpg", exif=exif)
    read_image(folder / "phone.jpg", "apply").save(folder / "upright.png")
    return folder


@pytest.mark.slow
def test_codebook_inference_turns_pictures_upright(
    portrait, tmp_path, dualvitok_config, dualvitok_checkpoint, monkeypatch, capsys
):
    for name in ("phone.jpg", "upright.png"):
        (tmp_path / name).mkdir()
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A wall."}]
        (tmp_path / name / "a.jsonl").write_text(json.dumps({"images": [name], "conversations": turns}))
    sets = {name: dataset(tmp_path / f"of {name}", portrait, tmp_path / name) for name in ("phone.jpg", "upright.png")}
    config = write_config(tmp_path / "meta.json", **sets)
    size, apply = ("--resolution_type", "fixed", "--resolution", "64"), ("--exif_orientation", "apply")
    crop = ("--crop_percent_thresh", "0")
    assert run_here(dualvitok_config, dualvitok_checkpoint, config, *size, *crop, *apply) == 0
    folders = [tmp_path / f"of {name}" / "jsonl_after_tokenizer" / "dualvitok" / "fixed_64" for name in sets]
    phone, upright = (read_lines(folder / "a.jsonl")[0] for folder in folders)
    assert phone["image_sizes"] == upright["image_sizes"] == [[96, 48]]
    assert phone["image_embed_inds"] == upright["image_embed_inds"]
    assert json.loads((folders[0] / "manifest.json").read_text())["settings"]["exif_orientation"] == "apply"
    again = ("--model_config", str(dualvitok_config), "--tokenizer_checkpoint", str(dualvitok_checkpoint))
    assert verify(["--data_config", str(config), *size, *again, "--device", "cpu"]) == 0
    with pytest.raises(UserError, match="exif_orientation = 'apply', now it is 'ignore'"):
        run_here(dualvitok_config, dualvitok_checkpoint, config, *size, *crop)
    capsys.readouterr()
    planned = ["--data_config", str(config), *size, *apply, "--out_dir", str(tmp_path / "plan"), "--num_workers", "1"]
    assert plan(planned) == 0
    assert "1 images have an EXIF orientation" in capsys.readouterr().out


def test_pre_tokenization_turns_pictures_upright(portrait, chameleon_folder, tmp_path):
    tokens = {}
    for name, more in {"phone.jpg": ["--exif_orientation", "apply"], "upright.png": []}.items():
        turns = [{"from": "human", "value": "<|image|>"}, {"from": "gpt", "value": "A wall."}]
        (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns, "image": [str(portrait / name)]}]))
        given = {"in_filename": tmp_path / "data.json", "out_dir": tmp_path / name, "tokenizer_dir": chameleon_folder}
        flags = [str(word) for key, value in given.items() for word in (f"--{key}", value)]
        assert pre_tokenize([*flags, "--target_size", "64", "--device", "cpu", *more]) == 0
        concat_record(["--sub_record_dir", str(tmp_path / name), "--save_path", str(tmp_path / name / "record.json")])
        tokens[name] = TokenFiles(tmp_path / name / "record.json")
    phone, upright = tokens.values()
    assert np.array_equal(phone[0].tokens, upright[0].tokens)
    # the trainer's continuous tokens, too, are of the picture that was encoded
    trained = Batches([phone, upright], SampleRules(10343, 4096, None, ImageReader(56, 4, anyres=True)))
    seen = [trained.sample(number).tiles[0].astype(int) for number in range(2)]
    assert seen[0].shape == seen[1].shape and np.abs(seen[0] - seen[1]).max() <= 1
    # and so are sizes that are read afterwards
    for files in (phone, upright):
        assert ImageSizes().of_row(contents_of(files.record.file(0)), 0) == [(96, 48)]
