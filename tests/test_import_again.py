"""An import where one was before: interrupted, repeated, corrected, overwritten, and what it leaves alone."""

import json
import shutil

import pytest
from importing import TALK, TURNS, parquet_of, reasons, run, tar_of

from vision_tokenizer.codebook.annotations import read_data_config
from vision_tokenizer.tokenizer.import_annotations import main
from vistoken.errors import UserError
from vistoken.jobs.results import Results


def test_an_interrupted_import_goes_on_and_gives_the_same_files(tmp_path, pictures, monkeypatch):
    photo = (pictures / "photo.jpg").read_bytes()
    file = parquet_of(tmp_path / "p.parquet", {"image": [photo] * 9, "text": [f"text {i}" for i in range(9)]}, rows=2)
    _, whole, _, dataset = run(tmp_path, "parquet", file)
    expected = (dataset.annotation_dir / "p.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "imported")

    write, written = Results.write, []

    def write_three(results, index, result):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(index)
        write(results, index, result)

    with monkeypatch.context() as patched:
        patched.setattr(Results, "write", write_three)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "parquet", file)
    assert not (dataset.annotation_dir / "p.jsonl").exists()
    with monkeypatch.context() as patched:
        written.clear()
        patched.setattr(Results, "write", lambda results, *given: written.append(given[0]) or write(results, *given))
        code, items, _, _ = run(tmp_path, "parquet", file)
    assert written == [3, 4] and code == 0
    assert (dataset.annotation_dir / "p.jsonl").read_bytes() == expected and items == whole


def test_a_rerun_does_again_what_failed(tmp_path, pictures):
    (tmp_path / "chat.jsonl").write_text("\n".join([TALK, TALK.replace("photo", "late")]))
    given = ("llava", tmp_path / "chat.jsonl", "--image_source", pictures)
    code, items, problems, _ = run(tmp_path, *given)
    assert (code, len(items), reasons(problems)) == (1, 1, ["image not found"])
    shutil.copy(pictures / "photo.jpg", pictures / "late.jpg")
    code, items, problems, _ = run(tmp_path, *given)
    assert (code, len(items), problems) == (0, 2, [])


def test_captions_that_were_edited_are_not_taken_for_those_of_before(tmp_path, pictures):
    for name in ("photo", "gray", "palette"):
        (pictures / f"{name}.txt").write_text(name)
    run(tmp_path, "pairs", pictures)
    (pictures / "gray.txt").write_text("a grey picture")
    _, items, _, _ = run(tmp_path, "pairs", pictures)
    assert "a grey picture" in items[0]["conversations"][0]["value"]


def test_a_caption_or_an_image_may_be_added_to_a_folder_of_pairs(tmp_path, pictures):
    for name in ("photo", "gray"):
        (pictures / f"{name}.txt").write_text(name)
    code, items, problems, _ = run(tmp_path, "pairs", pictures)
    assert (code, len(items), reasons(problems)) == (1, 2, ["no text"])
    (pictures / "palette.txt").write_text("palette")
    shutil.copy(pictures / "gray.png", pictures / "a.png")
    (pictures / "a.txt").write_text("the first of all")
    code, items, problems, _ = run(tmp_path, "pairs", pictures)
    assert (code, [item["id"] for item in items], problems) == (0, ["a", "gray", "palette", "photo"], [])
    written = (tmp_path / "imported/annotations/pictures.jsonl").stat().st_mtime_ns
    assert run(tmp_path, "pairs", pictures)[0] == 0
    assert (tmp_path / "imported/annotations/pictures.jsonl").stat().st_mtime_ns == written


def test_another_import_in_the_same_folder_is_refused(tmp_path, pictures):
    for name in ("photo", "gray", "palette"):
        (pictures / f"{name}.txt").write_text(name)
    run(tmp_path, "pairs", pictures)
    with pytest.raises(UserError, match=r"settings\.task = 'generation', now it is 'understanding'"):
        run(tmp_path, "pairs", pictures, task="understanding")
    _, items, _, dataset = run(tmp_path, "pairs", pictures, "--overwrite", task="understanding")
    assert items[0]["conversations"][1]["value"] == "gray" and not dataset.tokenizer_inference


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_source_among_what_is_to_be_written_is_kept(tmp_path, pictures, overwrite):
    annotations = tmp_path / "imported" / "annotations"
    annotations.mkdir(parents=True)
    (annotations / "chat.jsonl").write_text(TALK)
    with pytest.raises(UserError, match=r"chat\.jsonl: the import would write over its source"):
        run(tmp_path, "llava", annotations / "chat.jsonl", "--image_source", pictures, *overwrite)
    assert (annotations / "chat.jsonl").read_text() == TALK


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize("folder", ["annotations", "images"])
def test_what_no_import_made_is_kept(tmp_path, pictures, folder, overwrite):
    shard = tar_of(tmp_path / "s.tar", [("x.jpg", (pictures / "photo.jpg").read_bytes()), ("x.txt", b"A cup")])
    own = tmp_path / "imported" / folder / "own.jsonl"
    own.parent.mkdir(parents=True)
    own.write_text(TALK)
    with pytest.raises(UserError, match=f"{folder}: no manifest in .* says that an import made"):
        run(tmp_path, "webdataset", shard, *overwrite)
    assert own.read_text() == TALK


def test_images_that_an_earlier_import_only_read_are_kept(tmp_path, pictures):
    shard = tar_of(tmp_path / "s.tar", [("x.jpg", (pictures / "photo.jpg").read_bytes()), ("x.txt", b"A cup")])
    images = tmp_path / "imported" / "images"
    shutil.copytree(pictures, images)
    (tmp_path / "chat.jsonl").write_text(TALK)
    run(tmp_path, "llava", tmp_path / "chat.jsonl", "--image_source", images)
    with pytest.raises(UserError, match="images: no manifest in"):
        run(tmp_path, "webdataset", shard, "--overwrite")
    assert len(list(images.iterdir())) == 3


def test_overwriting_removes_what_the_earlier_import_made_and_nothing_else(tmp_path, pictures):
    gray, root = (pictures / "gray.png").read_bytes(), tmp_path / "imported"
    first, second = (
        tar_of(tmp_path / f"{name}.tar", [("x.png", gray), ("x.txt", b"Grey"), ("y.png", gray)]) for name in "st"
    )
    run(tmp_path, "webdataset", first)
    shutil.copy(pictures / "photo.jpg", root / "images" / "own.jpg")
    (root / "annotations" / "own.jsonl").write_text(json.dumps({"images": ["own.jpg"], "conversations": TURNS}))
    _, items, problems, _ = run(tmp_path, "webdataset", second, "--overwrite")
    assert [item["images"] for item in items] == [["own.jpg"], ["t/x.png"]] and len(problems) == 1
    assert sorted(path.name for path in (root / "images").iterdir()) == ["own.jpg", "t"]


def test_a_mistyped_import_does_not_stand_in_the_way_of_the_right_one(tmp_path, pictures, monkeypatch):
    chat = tmp_path / "chat.json"
    chat.write_text(f"[{TALK}]")
    with pytest.raises(UserError, match="not a COCO captions file"):
        run(tmp_path, "coco", chat, "--image_source", pictures)
    assert run(tmp_path, "llava", chat, "--image_source", pictures)[0] == 0
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path, "llava", "chat.json", "--image_source", "./pictures")[0] == 0


def test_a_mistyped_column_does_not_stand_in_the_way_of_the_right_one(tmp_path, pictures):
    columns = {"img": [(pictures / "gray.png").read_bytes()], "text": ["Grey"]}
    file = parquet_of(tmp_path / "p.parquet", columns, rows=1)
    with pytest.raises(UserError, match=r"found \['img', 'text'\]. Name yours as image_field"):
        run(tmp_path, "parquet", file)
    assert run(tmp_path, "parquet", file, "--image_field", "img")[0] == 0


def test_the_entry_joins_a_config_that_is_there(tmp_path, pictures):
    (pictures / "photo.txt").write_text("A cup")
    config = tmp_path / "meta.json"
    other = {"root": "r", "image_dir": "i", "annotation_dir": "a", "tokenizer_inference": False}
    config.write_text(json.dumps({"other": other}))
    arguments = ["--format", "pairs", "--source", str(pictures), "--task", "generation", "--max_failed", "1"]
    more = ["--root", str(tmp_path / "new"), "--data_config", str(config)]
    assert main([*arguments, *more]) == 0
    assert [dataset.name for dataset in read_data_config(config)] == ["other", "new"]
    assert json.loads(config.read_text())["other"] == other
    with pytest.raises(UserError, match="another data set 'other'"):
        main([*arguments, *more, "--name", "other"])
