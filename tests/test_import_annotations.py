"""Each format from small real files of it; every record accounted for."""

import errno
import json
import os
import shutil
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
from importing import TALK, parquet_of, reasons, run, tar_of

from vision_tokenizer.codebook.annotations import image_path
from vision_tokenizer.importers import formats
from vision_tokenizer.tokenizer.import_annotations import main
from vistoken.errors import UserError


def test_llava(tmp_path, pictures):
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "一只猫"}]
    source = tmp_path / "llava_instruct.json"
    source.write_text(
        json.dumps(
            [
                {"id": "a", "image": "photo.jpg", "conversations": talk, "source": {"kept": True}},
                {"id": "b", "image": "nowhere.jpg", "conversations": talk},
                {"id": "c", "image": "../photo.jpg", "conversations": talk},
                {"id": "d", "image": ["photo.jpg", "gray.png"], "conversations": talk},
                {"id": "e", "image": 7, "conversations": talk},
                {"id": "f", "image": "photo.jpg", "conversations": [{"from": "user", "value": "<image>"}]},
                "no object",
            ]
        )
    )
    code, items, problems, dataset = run(tmp_path, "llava", source, "--image_source", pictures, task="understanding")
    assert code == 1  # more than one in a hundred failed
    assert items == [{"images": ["photo.jpg"], "id": "a", "conversations": talk, "source": {"kept": True}}]
    assert reasons(problems) == [
        "image not found",
        "image outside image_dir",
        "<image> does not match",
        "images of wrong type",
        "unknown speaker",
        "not an object",
    ]
    assert problems[0]["where"] == "item 1" and problems[0]["id"] == "b"
    assert dataset.image_dir == pictures and not dataset.tokenizer_inference


def test_llava_keeps_integers_of_any_size(tmp_path, pictures):
    (tmp_path / "chat.jsonl").write_text(TALK.replace("{", '{"id": 123456789012345678901234567890, "猫": -1.5, ', 1))
    _, items, problems, _ = run(tmp_path, "llava", tmp_path / "chat.jsonl", "--image_source", pictures)
    assert not problems and (items[0]["id"], items[0]["猫"]) == (123456789012345678901234567890, -1.5)


def test_llava_text_only(tmp_path, pictures):
    item = {"id": 0, "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]}
    source = tmp_path / "chat.jsonl"
    source.write_text(json.dumps(item) + "\n")
    root = tmp_path / "imported"
    arguments = ["--format", "llava", "--source", str(source), "--root", str(root), "--task", "understanding"]
    assert main([*arguments, "--image_source", str(pictures)]) == 0
    assert json.loads((root / "annotations" / "chat.jsonl").read_text()) == item


def test_coco_captions_of_an_image_stand_together(tmp_path, pictures):
    source = tmp_path / "captions_val.json"
    images = [{"id": 9, "file_name": "photo.jpg"}, {"id": 5, "file_name": "gray.png"}, {"id": 6, "file_name": "x.png"}]
    images.append({"id": 7, "file_name": "palette.png"})  # nobody described it
    captions = [(100, 5, "A camera man. "), (101, 9, "A cup."), (102, 5, "A\ncoast"), (103, 77, "?"), (104, 6, "No")]
    annotations = [{"id": i, "image_id": image, "caption": caption} for i, image, caption in captions]
    source.write_text(json.dumps({"images": images, "annotations": [*annotations, {"id": 105, "image_id": 9}]}))
    code, items, problems, dataset = run(tmp_path, "coco", source, "--image_source", pictures)
    assert code == 1
    assert [(item["images"], item["id"]) for item in items] == [
        (["photo.jpg"], 101),
        (["gray.png"], 100),
        (["gray.png"], 102),
    ]
    assert items[1]["conversations"] == [
        {
            "from": "human",
            "value": "Generate an image of {resolution_tag}, the content of image is A camera man.\n",
        },
        {"from": "gpt", "value": "<image>"},
    ]
    assert [(p["where"], p["kind"], p["reason"]) for p in problems] == [
        ("annotations[5]", "failed", "no caption"),
        ("annotations[4]", "failed", "image not found"),
        ("images[3]", "rejected", "no caption"),
        ("annotations[3]", "failed", "unknown image_id"),
    ]
    assert dataset.tokenizer_inference


def test_pairs(tmp_path, pictures):
    (pictures / "deep").mkdir()
    shutil.copy(pictures / "photo.jpg", pictures / "deep" / "one.JPG")
    (pictures / "deep" / "one.txt").write_text("\ufeffEin Becher Kaffee", encoding="utf-8")
    (pictures / "photo.txt").write_text("A cup")
    (pictures / "gray.txt").write_text("  \n")
    (pictures / "lonely.txt").write_text("No picture")
    code, items, problems, dataset = run(tmp_path, "pairs", pictures, task="understanding")
    assert code == 1
    assert [(item["images"], item["conversations"][1]["value"]) for item in items] == [
        (["deep/one.JPG"], "Ein Becher Kaffee"),
        (["photo.jpg"], "A cup"),
    ]
    assert [(p["where"], p["reason"]) for p in problems] == [
        ("gray.png", "no text"),
        ("lonely.txt", "no image"),
        ("palette.png", "no text"),
    ]
    assert dataset.image_dir == pictures


def test_pairs_behind_links_and_with_suffixes_in_capitals(tmp_path, pictures):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(pictures / "photo.jpg", source / "UP.JPG")
    (source / "UP.TXT").write_text("A cup")
    shutil.copy(pictures / "photo.jpg", pictures / "UP.jpg")
    (pictures / "UP.txt").write_text("Another cup")
    for name in ("gray.png", "palette.png", "photo.jpg"):
        (pictures / name).unlink()
    (source / "linked").symlink_to(pictures)
    (pictures / "back").symlink_to(source)
    (source / "gone.txt").symlink_to("nowhere")
    _, items, problems, _ = run(tmp_path, "pairs", source, task="understanding")
    assert [(item["images"], item["conversations"][1]["value"]) for item in items] == [
        (["UP.JPG"], "A cup"),
        (["linked/UP.jpg"], "Another cup"),
    ]
    assert [(p["where"], p["reason"]) for p in problems] == [("gone.txt", "no image")]


def test_a_folder_of_pairs_that_cannot_be_read_is_named(tmp_path, pictures, monkeypatch):
    scandir, locked = os.scandir, pictures / "locked"
    locked.mkdir()

    def refuse(folder):  # to root, which no permission stops, too
        if Path(folder) == locked:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"locked: cannot read it \(Permission denied\)"):
        run(tmp_path, "pairs", pictures)


def test_webdataset(tmp_path, pictures):
    photo, gray = (pictures / "photo.jpg").read_bytes(), (pictures / "gray.png").read_bytes()
    shards = tmp_path / "shards"
    shards.mkdir()
    tar_of(
        shards / "00000.tar",
        [
            ("./a/001.jpg", photo),
            ("./a/001.txt", b"A cup"),
            ("002.json", json.dumps({"caption": "Grey", "width": 512}).encode()),
            ("002.png", gray),
            ("003.txt", b"no image"),
            ("004.jpg", b"not an image"),
            ("004.txt", b"text"),
            ("../005.png", gray),
            ("../005.txt", b"escapes"),
            ("006.jpg", photo),
            ("006.json", b"{"),
            ("007.jpg", photo),
            ("007.json", b"[1]"),
        ],
    )
    tar_of(shards / "00001.tar.gz", [("x.jpg", photo), ("x.txt", b"Again")])
    code, items, problems, dataset = run(tmp_path, "webdataset", shards)
    assert code == 1
    assert [(item["images"], item["id"]) for item in items] == [
        (["00000/a/001.jpg"], "a/001"),
        (["00000/002.png"], "002"),
        (["00001/x.jpg"], "x"),
    ]
    assert (dataset.image_dir / "00000" / "a" / "001.jpg").read_bytes() == photo
    assert reasons(problems) == ["no image", "image unreadable", "image outside image_dir", "not JSON", "no text"]
    assert problems[0]["where"] == "003.txt"


def test_a_key_that_occurs_again_does_not_change_the_first_ones_image(tmp_path, pictures):
    gray, palette = (pictures / "gray.png").read_bytes(), (pictures / "palette.png").read_bytes()
    samples = [("a.png", gray), ("a.txt", b"Grey"), ("b.png", gray), ("b.txt", b"Grey"), ("a.png", palette)]
    shard = tar_of(tmp_path / "s.tar", [*samples, ("a.txt", b"Again")])
    code, items, problems, dataset = run(tmp_path, "webdataset", shard)
    assert code == 1 and [item["images"] for item in items] == [["s/a.png"], ["s/b.png"]]
    assert (dataset.image_dir / "s" / "a.png").read_bytes() == gray
    assert [(p["where"], p["reason"]) for p in problems] == [("a.png", "key occurs twice")]


def test_a_truncated_tar_keeps_what_can_be_read_and_says_so(tmp_path, pictures):
    photo = (pictures / "photo.jpg").read_bytes()
    shard = tar_of(
        tmp_path / "s.tar", [(f"{i}.{kind}", c) for i in range(3) for kind, c in (("jpg", photo), ("txt", b"t"))]
    )
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(photo) + 4096])
    code, items, problems, _ = run(tmp_path, "webdataset", shard)
    assert code == 1 and len(items) == 1
    assert reasons(problems) == ["shard damaged"] and str(shard) in problems[0]["detail"]


def test_parquet_with_hugging_face_images(tmp_path, pictures):
    photo, gray = (pictures / "photo.jpg").read_bytes(), (pictures / "gray.png").read_bytes()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [
        {"bytes": photo, "path": "p.jpg"},
        {"bytes": gray, "path": None},
        None,
        {"bytes": None, "path": "far.jpg"},
    ]
    columns = {"image": pa.array([*images, images[0]], kind), "text": ["A cup", "Grey", "none", "far", None]}
    folder = tmp_path / "data"
    folder.mkdir()
    parquet_of(folder / "train-00000-of-00001.parquet", columns, rows=2)
    code, items, problems, dataset = run(tmp_path, "parquet", folder)
    assert code == 1
    assert [item["images"] for item in items] == [
        ["train-00000-of-00001/00000000.jpg"],
        ["train-00000-of-00001/00000001.png"],
    ]
    assert image_path(dataset.image_dir, items[1]["images"][0]).read_bytes() == gray
    assert [(p["where"], p["reason"]) for p in problems] == [
        ("row 2", "no image"),
        ("row 3", "no image"),
        ("row 4", "no text"),
    ]
    assert "far.jpg" in problems[1]["detail"]


def test_parquet_with_the_names_of_images_says_so(tmp_path):
    file = parquet_of(tmp_path / "p.parquet", {"image": ["cat.jpg", None], "text": ["a", "b"]}, rows=2)
    _, _, problems, _ = run(tmp_path, "parquet", file)
    assert [p["detail"] for p in problems] == ["the bytes are not in the file, only 'cat.jpg'", "the image is null"]


@pytest.mark.parametrize("item_id", [b"\0", Decimal("1.5")])
def test_parquet_with_an_id_that_json_has_none_for(tmp_path, pictures, item_id):
    columns = {"image": [(pictures / "photo.jpg").read_bytes()], "text": ["a"], "id": [item_id]}
    code, items, problems, _ = run(tmp_path, "parquet", parquet_of(tmp_path / "p.parquet", columns, rows=1))
    assert (code, items, reasons(problems)) == (1, [], ["not for JSON"])
    assert problems[0]["id"] == repr(item_id)


def test_parquet_with_conversations_and_several_images(tmp_path, pictures):
    photo, gray = (pictures / "photo.jpg").read_bytes(), (pictures / "gray.png").read_bytes()
    talk = [{"from": "human", "value": "<image><image>\nCompare."}, {"from": "gpt", "value": "One is grey."}]
    columns = {"pics": [[photo, gray]], "conversations": [talk], "id": [17]}
    file = parquet_of(tmp_path / "p.parquet", columns, rows=1)
    code, items, problems, _ = run(tmp_path, "parquet", file, "--image_field", "pics", task="understanding")
    assert code == 0 and not problems
    assert items == [{"images": ["p/00000000_0.jpg", "p/00000000_1.png"], "conversations": talk, "id": 17}]


def test_a_source_without_records_is_refused(tmp_path, pictures):
    coco = tmp_path / "coco.json"
    coco.write_text('{"images": [], "annotations": []}')
    columns = {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}
    parquet = parquet_of(tmp_path / "p.parquet", columns, rows=1)
    tar = tar_of(tmp_path / "s.tar", [])
    assert reasons(run(tmp_path, "webdataset", tar)[2]) == ["empty shard"]
    for given in (("coco", coco, "--image_source", pictures), ("parquet", parquet)):
        with pytest.raises(UserError, match=f"{given[1]}: no records in it"):
            run(tmp_path, *given)


def test_a_llava_import_reads_its_chunk_table_once(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(formats, "CHUNK_ITEMS", 1)
    calls, original = [], formats.chunk_table
    monkeypatch.setattr(formats, "chunk_table", lambda *given: calls.append(given) or original(*given))
    (tmp_path / "chat.jsonl").write_text("\n".join([TALK] * 3))
    _, items, _, _ = run(tmp_path, "llava", tmp_path / "chat.jsonl", "--image_source", pictures)
    assert len(items) == 3 and len(calls) == 1


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("llava", "{}", r"line 1: expected a JSON list"),
        ("coco", "[]", "not a COCO captions file"),
        ("coco", '{"images": [{"id": 1}], "annotations": []}', r"images\[0\]: expected id and file_name"),
        ("coco", "{", "not valid JSON"),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path, pictures, kind, content, message):
    source = tmp_path / "a.json"
    source.write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        run(tmp_path, kind, source, "--image_source", pictures)
    assert str(source) in str(raised.value)


def test_what_was_left_out_is_named_where_there_is_some(tmp_path, pictures, capsys):
    (pictures / "gray.txt").write_text("Grey")
    run(tmp_path, "pairs", pictures)
    assert "imported/import/*.rejected.jsonl" in capsys.readouterr().out
    for name in ("photo", "palette"):
        (pictures / f"{name}.txt").write_text(name)
    run(tmp_path, "pairs", pictures, "--overwrite")
    assert "rejected.jsonl" not in capsys.readouterr().out


def test_arguments_that_do_not_fit(tmp_path, pictures, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "pairs", pictures, "--max_failed", "-3")
    assert "--max_failed: is a share from 0 to 1, not -3" in capsys.readouterr().err
    with pytest.raises(UserError, match="needs --image_source"):
        run(tmp_path, "coco", pictures)
    with pytest.raises(UserError, match="does not exist"):
        run(tmp_path, "pairs", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no file in it ends in \.parquet"):
        run(tmp_path, "parquet", pictures)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"bad\.parquet: not a parquet file"):
        run(tmp_path, "parquet", tmp_path / "bad.parquet")


def test_names_that_are_not_utf8_fail_and_no_other(tmp_path, pictures):
    for name in ("photo", "gray", "palette"):
        (pictures / f"{name}.txt").write_text("something")
    for suffix in (".png", ".txt"):
        (pictures / f"gray{suffix}").rename(os.fsdecode(bytes(pictures) + b"/gr\xe9y" + suffix.encode()))
    code, items, problems, _ = run(tmp_path, "pairs", pictures)
    assert (code, len(items), reasons(problems)) == (1, 2, ["name not UTF-8"])
    assert r"gr\udce9y.png: rename the file" in problems[0]["detail"]
