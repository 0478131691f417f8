"""Bad input: the message names file, line and field, and everything else of the data set still completes."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from codebook_job import OUTPUT_FIELDS, dataset, launch, read_lines, run_here, write_config
from PIL import Image

from vision_tokenizer.codebook import job
from vistoken.errors import UserError

SMALL = ("--resolution_type", "fixed", "--resolution", "64", "--batch_size", "4")


@pytest.fixture(scope="module")
def photo(golden) -> Image.Image:
    return Image.open(golden / "images" / "photo.jpg").convert("RGB").resize((96, 80))


@pytest.fixture
def run(tmp_path, dualvitok_config, dualvitok_checkpoint):
    """Run the job over the data sets of a config; -> exit code."""

    def run(data_config: Path, *more: str) -> int:
        return run_here(dualvitok_config, dualvitok_checkpoint, data_config, *SMALL, *more)

    return run


def output(root: Path, name: str = "a.jsonl") -> Path:
    return root / "jsonl_after_tokenizer" / "dualvitok" / "fixed_64" / name


def make_dataset(tmp_path: Path, images: dict[str, Image.Image], lines: bytes, name: str = "a.jsonl") -> Path:
    for folder in ("images", "annotations"):
        (tmp_path / folder).mkdir(exist_ok=True)
    for file, image in images.items():
        image.save(tmp_path / "images" / file)
    (tmp_path / "annotations" / name).write_bytes(lines)
    entry = dataset(tmp_path / "out", tmp_path / "images", tmp_path / "annotations")
    return write_config(tmp_path / "meta.json", birds=entry)


BROKEN_LINES = [  # (line, kind, reason, part of the detail)
    (b'{"images": ["good.png"], "id": "cut', "failed", "not JSON", "(column "),
    (b"[1, 2]", "failed", "not an object", "found list"),
    (b'{"id": 1}', "failed", "no images", "images is missing"),
    (b'{"images": []}', "failed", "no images", "empty list"),
    (b'{"images": [3]}', "failed", "images of wrong type", "[3]"),
    (b'{"images": null}', "failed", "images of wrong type", "None"),
    (b'{"images": ' + b"[" * 1000 + b"]" * 1000 + b"}", "failed", "images of wrong type", "[[["),
    (b'{"images": [], "id": ' + b"[" * 1000 + b"]" * 1000 + b"}", "failed", "no images", "empty list"),
    (b'{"images": ["../../x.png"]}', "failed", "image outside image_dir", "../../x.png"),
    (b'{"images": ["/etc/hostname"]}', "failed", "image outside image_dir", "/etc/hostname"),
    (b'{"images": [""]}', "failed", "image outside image_dir", "''"),
    (b'{"images": ["gone.png"]}', "failed", "image not found", "gone.png"),
    (b'{"images": ["good.png", "gone.png"]}', "failed", "image not found", "gone.png"),
    (b'{"images": ["good.png"], "matched_ratios": 1}', "failed", "codes already there", "matched_ratios"),
    (b'{"images": ["wide.png"]}', "rejected", "crop above threshold", "200 x 20"),
]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_every_bad_line_is_accounted_for_and_the_good_ones_are_done(tmp_path, photo, run, newline):
    good = '{"images": "good.png", "note": {"z": 1.50, "a": "减少"}, "id": 12345678901234567890123}'.encode()
    lines = [b"\xef\xbb\xbf" + good, b"", *(line for line, *_ in BROKEN_LINES), b"   ", good]
    images = {"good.png": photo, "wide.png": photo.resize((200, 20))}
    config = make_dataset(tmp_path, images, newline.join(lines))
    assert run(config) == 1  # far more than 1 % failed

    done = output(tmp_path / "out").read_bytes().splitlines()
    assert len(done) == 2
    assert done[0] == done[1]
    assert done[0].startswith(good[:-1] + b', "image_sizes":[[80,96]],"image_embed_inds":[[[[')  # the text itself
    rejected = read_lines(output(tmp_path / "out", "a.rejected.jsonl"))
    expected = [(number, *rest) for number, (_, *rest) in enumerate(BROKEN_LINES, start=3)]
    assert len(rejected) == len(expected)
    for problem, (number, kind, reason, detail) in zip(rejected, expected, strict=True):
        assert (problem["where"], problem["kind"], problem["reason"]) == (f"line {number}", kind, reason)
        assert problem["file"].endswith("a.jsonl")
        assert detail in problem["detail"]
    summary = json.loads(output(tmp_path / "out", "run_summary.json").read_text())["total"]
    assert (summary["items"], summary["done"], summary["rejected"], summary["failed"]) == (17, 2, 1, 14)


def test_the_exit_code_follows_max_failed(tmp_path, photo, run):
    config = make_dataset(tmp_path, {"good.png": photo}, b'{"images": "good.png"}\n' * 3 + b'{"images": "gone.png"}')
    assert run(config, "--max_failed", "0.25") == 0
    assert run(config, "--max_failed", "0.24") == 1


def test_a_rerun_retries_what_failed(tmp_path, photo, run):
    lines = b"".join(b'{"images": "%s", "id": %d}\n' % (name, n) for n, name in enumerate([b"a.png", b"b.png"] * 40))
    config = make_dataset(tmp_path, {"a.png": photo}, lines)
    assert run(config) == 1
    photo.save(tmp_path / "images" / "b.png")
    assert run(config) == 0
    assert [line["id"] for line in read_lines(output(tmp_path / "out"))] == list(range(80))
    assert not output(tmp_path / "out", "a.rejected.jsonl").exists()
    statistics = tmp_path / "out" / "jsonl_after_tokenizer" / "fixed_64_data_statistic.json"
    assert json.loads(statistics.read_text()) == {"ratio_h64_w64": 80}
    assert list((output(tmp_path / "out").parent / ".work").glob("a/*")) == []  # nothing left to retry


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_every_kind_of_image_file(tmp_path, photo, golden, run):
    folder = tmp_path / "images"
    folder.mkdir()
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.convert("1").save(folder / "bits.png")
    photo.convert("P").save(folder / "palette.png")
    photo.convert("RGBA").save(folder / "rgba.png")
    photo.convert("LA").save(folder / "la.png")
    photo.resize((1, 1)).save(folder / "one.png")
    for file in ("anim.gif", "anim.webp"):
        frames = [photo.convert("RGB"), photo.convert("L").convert("RGB")]
        frames[0].save(folder / file, save_all=True, append_images=frames[1:], lossless=True)
    photo.save(folder / "first.webp", lossless=True)
    whole = (golden / "images" / "photo.jpg").read_bytes()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(folder / "deep.png")
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    (folder / "bomb.png").write_bytes(png(60_000, 60_000))
    (folder / "nopixels.png").write_bytes(png(64, 64))
    photo.save(folder / "odd.dds")
    content = bytearray((folder / "odd.dds").read_bytes())
    content[80:84] = b"\x80\0\0\0"  # its pixel format; Pillow raises NotImplementedError
    (folder / "odd.dds").write_bytes(content)
    names = sorted(path.name for path in folder.iterdir())
    config = make_dataset(tmp_path, {}, b"\n".join(b'{"images": "%s"}' % name.encode() for name in names))
    assert run(config) == 1

    done = {line["images"]: line["image_embed_inds"] for line in read_lines(output(tmp_path / "out"))}
    problems = read_lines(output(tmp_path / "out", "a.rejected.jsonl"))
    reasons = {Path(problem["detail"].split(": ")[0]).name: problem["reason"] for problem in problems}
    assert set(done) == {
        *("cmyk.jpg", "bits.png", "palette.png", "rgba.png", "la.png"),
        *("one.png", "anim.gif", "anim.webp", "first.webp", "deep.png"),
    }
    assert reasons == {
        "cut.jpg": "image unreadable",
        "empty.png": "image unreadable",
        "text.png": "image unreadable",
        "nopixels.png": "image unreadable",
        "odd.dds": "image format not taken",
        "bomb.png": "image too large",
    }
    assert done["anim.webp"] == done["first.webp"]


@pytest.mark.slow
def test_absolute_names_and_pillows_remarks(tmp_path, photo, dualvitok_config, dualvitok_checkpoint):
    """As the document has it: image_dir is given from vision_tokenizer/, with a `..`."""
    clear = photo.convert("P")
    config = make_dataset(tmp_path, {"good.png": photo}, b'{"images": ["%s/images/clear.png"]}' % bytes(tmp_path))
    clear.save(tmp_path / "images" / "clear.png", transparency=bytes(range(256)))  # Pillow warns when it converts it
    (tmp_path / "elsewhere").mkdir()
    config.write_text(config.read_text().replace(f"{tmp_path}/images", "../images"))
    process = launch(dualvitok_config, dualvitok_checkpoint, config, *SMALL, cwd=tmp_path / "elsewhere")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "Warning" not in stderr


def test_an_unreadable_data_set_does_not_keep_the_others(tmp_path, photo, run, capsys):
    make_dataset(tmp_path, {"good.png": photo}, b'{"images": "good.png"}')
    for name in ("empty", "blank"):
        (tmp_path / name).mkdir()
    (tmp_path / "blank" / "b.jsonl").write_text("\n \n")
    (tmp_path / "object").mkdir()
    (tmp_path / "object" / "c.json").write_text('{"images": []}')
    images = tmp_path / "images"
    config = write_config(
        tmp_path / "meta.json",
        nowhere=dataset(tmp_path / "o1", images, tmp_path / "nowhere"),
        empty=dataset(tmp_path / "o2", images, tmp_path / "empty"),
        blank=dataset(tmp_path / "o3", images, tmp_path / "blank"),
        object=dataset(tmp_path / "o4", images, tmp_path / "object"),
        birds=dataset(tmp_path / "out", images, tmp_path / "annotations"),
        words=dataset(tmp_path / "o5", images, tmp_path / "nowhere", inference=False),
    )
    assert run(config) == 1
    assert len(read_lines(output(tmp_path / "out"))) == 1
    captured = capsys.readouterr()
    assert "skipped, tokenizer_inference is false: words" in captured.err
    for message in (
        f"annotation_dir {tmp_path / 'nowhere'} is not a folder",
        f"no .jsonl or .json file in annotation_dir {tmp_path / 'empty'}",
        f"{tmp_path / 'blank' / 'b.jsonl'}: no items in it",
        f"{tmp_path / 'object' / 'c.json'}, line 1: expected a JSON list, found '{{'",
    ):
        assert message in captured.out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: not valid JSON"),
        ('{"birds": {\n"root": "x",}}', "line 2: not valid JSON"),
        ("[]", "expected an object of data sets"),
        ("{}", "no data set in it"),
        ("[" * 100_000, "nested too deeply"),
        ('{"birds": 3}', "data set birds: expected an object"),
        ('{"birds": {"root": "x", "image_dir": "x", "tokenizer_inference": true}}', "'annotation_dir' is missing"),
        ('{"birds": {"root": "x", "image_dirs": "x"}}', "unknown key 'image_dirs': did you mean 'image_dir'"),
        (
            '{"birds": {"root": "x", "image_dir": "x", "annotation_dir": "x", "tokenizer_inference": "yes"}}',
            'birds: tokenizer_inference must be true or false, found "yes"',
        ),
        (
            '{"birds": {"root": null, "image_dir": "x", "annotation_dir": "x", "tokenizer_inference": true}}',
            "birds: root must be a string, found null",
        ),
        (
            '{"birds": {"root": "x", "image_dir": "a\\u0000b", "annotation_dir": "x", "tokenizer_inference": true}}',
            "birds: image_dir cannot be a path",
        ),
        ('{"birds": {}, "birds": {}}', "'birds' occurs twice"),
    ],
)
def test_a_wrong_data_config_says_what_and_where(tmp_path, run, text, message):
    path = tmp_path / "meta.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        run(path)


def test_other_mistakes_in_the_call(tmp_path, photo, run):
    config = make_dataset(tmp_path, {"good.png": photo}, b'{"images": "good.png"}')
    with pytest.raises(UserError, match=r"--datasets fish: not in .* which has birds"):
        run(config, "--datasets", "fish")
    with pytest.raises(UserError, match=r"gone\.json: cannot read the data config"):
        run(tmp_path / "gone.json")
    with pytest.raises(SystemExit):
        run(config, "--max_failed", "2")


@pytest.mark.slow
def test_other_settings_are_refused_until_told_to_begin_anew(tmp_path, photo, run):
    config = make_dataset(tmp_path, {"good.png": photo}, b'{"images": "good.png"}')
    assert run(config) == 0
    before = output(tmp_path / "out").read_bytes()
    with pytest.raises(UserError, match=r"settings\.crop_percent_thresh = 0\.2, now it is 0\.1"):
        run(config, "--crop_percent_thresh", "0.1")
    with pytest.raises(UserError, match=r"settings\.crop_percent_thresh = 0\.2, now it is 0\.1"):
        run(config, "--crop_percent_thresh", "0.1", "--no-resume")
    assert output(tmp_path / "out").read_bytes() == before
    output(tmp_path / "out").write_bytes(b"")
    with pytest.raises(UserError, match="not what was written then"):
        run(config)
    assert run(config, "--no-resume") == 0
    assert output(tmp_path / "out").read_bytes() == before
    assert run(config, "--overwrite", "--crop_percent_thresh", "0.1") == 0
    (tmp_path / "annotations" / "a.jsonl").write_bytes(b'{"images": "good.png", "id": 2}')
    with pytest.raises(UserError, match=r"inputs\.a\.jsonl = '[0-9a-f]{64}', now it is"):
        run(config, "--crop_percent_thresh", "0.1")


def test_a_mistake_ends_the_process_with_2_and_no_traceback(tmp_path, dualvitok_config, dualvitok_checkpoint):
    process = launch(dualvitok_config, dualvitok_checkpoint, tmp_path / "gone.json")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr.startswith(f"error: {tmp_path / 'gone.json'}: cannot read the data config")
    assert "Traceback" not in stderr


def test_fields_and_formats_of_the_annotations_are_kept(tmp_path, photo, run):
    item = {"images": ["good.png", "good.png"], "b": [1, {"c": None}], "a": "—"}
    text = json.dumps([item, {**item, "images": "good.png"}], indent=2, ensure_ascii=False)
    config = make_dataset(tmp_path, {"good.png": photo}, text.encode(), name="a.json")
    assert run(config) == 0
    first, second = read_lines(output(tmp_path / "out"))
    assert list(first) == ["images", "b", "a", *OUTPUT_FIELDS]
    assert {key: first[key] for key in item} == item
    assert first["image_sizes"] == [[80, 96]] * 2
    assert first["image_embed_inds"] == second["image_embed_inds"] * 2
    assert [[len(grid), len(grid[0])] for grid in first["image_embed_inds"][0]] == [[2, 2], [4, 4]]


def test_a_link_may_lead_out_of_image_dir_where_a_name_may_not(tmp_path, photo, run):
    """The folder's owner has put the link there; a line of a data set may come from anybody."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    photo.save(elsewhere / "a.png")
    lines = b'{"images": "link.png"}\n{"images": "folder/a.png"}\n{"images": "../elsewhere/a.png"}\n'
    config = make_dataset(tmp_path, {}, lines)
    (tmp_path / "images" / "link.png").symlink_to(elsewhere / "a.png")
    (tmp_path / "images" / "folder").symlink_to(elsewhere)
    assert run(config) == 1
    assert [line["images"] for line in read_lines(output(tmp_path / "out"))] == ["link.png", "folder/a.png"]
    (problem,) = read_lines(output(tmp_path / "out", "a.rejected.jsonl"))
    assert problem["reason"] == "image outside image_dir"


@pytest.mark.parametrize("flag", ["--tokenizer_version", "--output_dirname"])
def test_output_folders_are_names_and_stay_in_the_root(tmp_path, photo, run, flag, capsys):
    config = make_dataset(tmp_path, {"a.png": photo}, b'{"images": "a.png"}')
    for path in (str(tmp_path / "abs"), "..", "x/y"):
        with pytest.raises(SystemExit) as ended:
            run(config, flag, path)
        assert ended.value.code == 2 and f"{flag}: is the name of a folder, not a path" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "abs").exists()


@pytest.mark.parametrize(
    "flags, code, told",
    [
        (("--resolution", "72"), 0, "--resolution 72: a language model has words for multiples of 64 only"),
        (("--resolution", "1000000000"), 2, "must be at most 1024, what the model takes"),
        (("--resolution", "15"), 2, "must be at least 16"),
        (("--resolution_type", "fixed_anchors", "--resolution", "300"), 0, "--resolution 300 is ignored"),
    ],
)
def test_a_resolution_that_will_not_do_is_told_at_the_start(tmp_path, photo, run, capsys, flags, code, told):
    config = make_dataset(tmp_path, {}, b'{"id": 1}')
    ended = 0
    try:
        run(config, "--max_failed", "1", *flags)
    except SystemExit as end:
        ended = end.code
    assert ended == code and told in capsys.readouterr().err


@pytest.mark.parametrize("field", ["root", "image_dir", "annotation_dir", None])
def test_half_a_surrogate_pair_in_the_config_is_told(tmp_path, photo, run, field):
    config = make_dataset(tmp_path, {"a.png": photo}, b'{"images": "a.png"}')
    content = json.loads(config.read_text())
    if field:
        content["birds"][field] += "\ud800"
    config.write_text(json.dumps(content if field else {"bi\ud800rds": content["birds"]}))
    told = rf"birds: {field} cannot be a path, with a NUL or half a surrogate pair" if field else "cannot be the name"
    with pytest.raises(UserError, match=told):
        run(config)


def test_an_annotation_file_that_goes_in_mid_run_fails_alone(tmp_path, photo, run, monkeypatch, capsys):
    line = b'{"images": "good.png"}\n'
    config = make_dataset(tmp_path, {"good.png": photo}, line * 3)
    for name in ("b", "c"):
        (tmp_path / "annotations" / f"{name}.jsonl").write_bytes(line * 2)
    gone, begin = tmp_path / "annotations" / "b.jsonl", job.CodebookChunk.__init__

    def went(self, *given):
        gone.unlink(missing_ok=True)
        begin(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(job.CodebookChunk, "__init__", went)
        assert run(config) == 1
    assert f"not done: {gone}: cannot read the input (No such file or directory)" in capsys.readouterr().out
    assert [len(read_lines(output(tmp_path / "out", f"{name}.jsonl"))) for name in "ac"] == [3, 2]
    assert not output(tmp_path / "out", "b.jsonl").exists()
    summary = json.loads(output(tmp_path / "out", "run_summary.json").read_text())
    assert summary["total"]["done"] == 5 and len(summary["unreadable"]) == 1
    gone.write_bytes(line * 2)
    assert run(config) == 0
    assert len(read_lines(output(tmp_path / "out", "b.jsonl"))) == 2


def test_the_summary_says_what_other_crop_thresholds_reject(tmp_path, photo, run, capsys):
    sizes = {"square": (64, 64), "tall": (64, 74), "photo": (80, 60), "wide": (90, 60), "narrow": (200, 20)}
    images = {f"{name}.png": photo.resize(size) for name, size in sizes.items()}
    lines = "".join(json.dumps({"images": f"{name}.png"}) + "\n" for name in [*sizes, "photo", "photo", "gone"])
    config = make_dataset(tmp_path, images, lines.encode())
    run(config, "--max_failed", "1")
    told = "5 of 8 items (62%) lose more than 20% of an image to the crop and are rejected; --crop_percent_thresh "
    assert told + "0.1 rejects 75%, 0.2 rejects 62%, 0.3 rejects 25%, 0 none" in capsys.readouterr().out


def test_a_config_whose_only_folder_is_wrong_is_a_mistake_in_the_call(tmp_path, run, capsys):
    entry = dataset(tmp_path / "out", tmp_path, tmp_path / "nowhere")
    assert run(write_config(tmp_path / "meta.json", birds=entry)) == 2
    assert f"annotation_dir {tmp_path / 'nowhere'} is not a folder" in capsys.readouterr().out
