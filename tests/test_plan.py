"""The plan says what the run does: against the golden codes, and on data with every kind of fault."""

import io
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vision_tokenizer.review.plan_report import image_bytes
from vision_tokenizer.tokenizer.plan_codebook_inference import main
from vistoken.errors import UserError

TALK = [{"from": "human", "value": "Generate an image of {resolution_tag}.\n"}, {"from": "gpt", "value": "<image>"}]


def plan(tmp_path: Path, entries: dict, *more: str) -> tuple[int, dict, list[dict]]:
    """Run the command on data sets; returns (exit code, the plan's data sets, problems)."""
    config = tmp_path / "meta.json"
    config.write_text(json.dumps(entries))
    code = main(["--data_config", str(config), "--out_dir", str(tmp_path / "plan"), "--num_workers", "1", *more])
    problems = (tmp_path / "plan" / "problems.jsonl").read_text().splitlines()
    datasets = json.loads((tmp_path / "plan" / "plan.json").read_text())["datasets"]
    return code, datasets, [json.loads(line) for line in problems]


def entry(tmp_path: Path, image_dir: Path, annotation_dir: Path, inference: bool = True) -> dict:
    folders = {"root": str(tmp_path / "out"), "image_dir": str(image_dir), "annotation_dir": str(annotation_dir)}
    return {**folders, "tokenizer_inference": inference}


@pytest.mark.parametrize(
    ("arguments", "tag"),
    [
        (("--resolution_type", "fixed", "--resolution", "256"), "fixed_256"),
        (("--resolution_type", "fixed", "--resolution", "512"), "fixed_512"),
        (("--resolution_type", "fixed_anchors"), "fixed_anchors"),
    ],
)
def test_what_is_planned_is_what_the_reference_wrote(tmp_path, golden, arguments, tag):
    folder = golden / "codebook" / "generation" / "annotations"
    code, datasets, _ = plan(tmp_path, {"generation": entry(tmp_path, golden / "images", folder)}, *arguments)
    written = [
        json.loads(line)
        for file in sorted((golden / "codebook" / "expected" / "generation" / tag).glob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    found = datasets["generation"]
    anchors = [f"{h}x{w}" for item in written for h, w in item["matched_ratios"]]
    assert code == 1 and found["failed"] == found["reasons"]["failed: image unreadable"] == 1  # a truncated file
    assert found["done"] == len(written) and found["items"] == found["done"] + found["rejected"] + found["failed"]
    assert found["images_per_anchor"] == {anchor: anchors.count(anchor) for anchor in set(anchors)}
    codes = sum(len(row) for item in written for image in item["image_embed_inds"] for grid in image for row in grid)
    assert found["tokens"] == codes


def test_bytes_are_those_of_the_output_lines():
    """An image at 512x512: 324 codes below 32768 and 1024 below 98304, their brackets and commas, its sizes."""
    digits = 324 * 4.66 + 1024 * 4.89
    assert image_bytes((512, 512), (32768, 98304)) == pytest.approx(digits + 324 + 1024 + 2 * (18 + 32) + 25, rel=0.01)


def test_cores_that_keep_a_gpu_busy(tmp_path, golden, capsys):
    entries = {"g": entry(tmp_path, golden / "images", golden / "codebook" / "generation" / "annotations")}
    plan(tmp_path, entries, "--resolution_type", "fixed", "--resolution", "512")
    found = json.loads((tmp_path / "plan" / "plan.json").read_text())["decoding"]
    assert 2 <= found["images"] <= 8 and 0.05 < found["megapixels"] < 2, "a few of each file"
    assert found["goal_images_per_second"] == 650 / 4 and found["milliseconds"] > 0
    assert found["cores_per_gpu"] == pytest.approx(650 / 4 * found["milliseconds"] / 1e3)
    assert "162 images/s at these sizes, needs" in capsys.readouterr().out


def test_more_workers_find_the_same(tmp_path, golden):
    entries = {"e": entry(tmp_path, golden / "images", golden / "codebook" / "editing" / "annotations")}
    _, alone, _ = plan(tmp_path, entries)
    _, together, _ = plan(tmp_path, entries, "--num_workers", "3")
    assert alone == together
    assert alone["e"]["images_named_again"] == 1  # h512_w512.png, in two items


def test_thresholds_say_what_another_one_would_reject(tmp_path, golden):
    entries = {"g": entry(tmp_path, golden / "images", golden / "codebook" / "generation" / "annotations")}
    arguments = ("--resolution_type", "fixed", "--resolution", "256", "--crop_percent_thresh")
    _, loose, _ = plan(tmp_path, entries, *arguments, "0")
    assert loose["g"]["rejected"] == 0
    for threshold in ("0.05", "0.2", "0.4"):
        _, strict, _ = plan(tmp_path, entries, *arguments, threshold)
        assert strict["g"]["rejected"] == loose["g"]["items_rejected_at_threshold"][threshold] > 0


def test_every_fault_is_listed_by_kind_with_its_place(tmp_path, golden, capsys):
    images, annotations = tmp_path / "images", tmp_path / "annotations"
    images.mkdir()
    annotations.mkdir()
    shutil.copy(golden / "images" / "photo.jpg", images / "a.jpg")
    shutil.copy(golden / "images" / "photo.jpg", images / "copy.jpg")
    shutil.copy(golden / "images" / "too_wide.png", images / "wide.png")
    (images / "empty.png").touch()
    (images / "text.png").write_text("not an image")
    items = [
        {"images": ["a.jpg"], "conversations": TALK},
        {"images": "copy.jpg", "conversations": TALK, "id": "copy"},
        {"images": ["nowhere.jpg"], "conversations": TALK, "id": 7},
        {"images": ["empty.png"], "conversations": TALK},
        {"images": ["text.png"], "conversations": TALK},
        {"images": ["../a.jpg"], "conversations": TALK},
        {"images": ["wide.png"], "conversations": TALK},
        {"images": [], "conversations": TALK},
        {"images": ["a.jpg", "a.jpg"], "conversations": TALK},
        {"images": ["a.jpg"], "conversations": [{"from": "user", "value": "<image>"}]},
        {"images": ["a.jpg"]},
    ]
    (annotations / "0.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items) + "{broken\n")
    (annotations / "1.json").write_text('{"no": "list"}')
    code, datasets, problems = plan(tmp_path, {"bad": entry(tmp_path, images, annotations)})
    found = datasets["bad"]
    assert code == 1
    assert found["reasons"] == {
        "failed: image not found": 1,
        "failed: image outside image_dir": 1,
        "failed: image unreadable": 2,
        "failed: no images": 1,
        "failed: not JSON": 1,
        "rejected: crop above threshold": 1,
    }
    assert found["items"] == 12 == found["done"] + found["rejected"] + found["failed"]
    assert found["format_errors"] == {"<image> does not match": 2, "no conversations": 1, "unknown speaker": 1}
    assert found["copies_of_other_files"] == 1
    assert len(found["errors"]) == 1 and "1.json, line 1: expected a JSON list" in found["errors"][0]
    missing = next(problem for problem in problems if problem["reason"] == "image not found")
    assert (missing["where"], missing["id"], missing["file"]) == ("line 3", 7, str(annotations / "0.jsonl"))
    shown = capsys.readouterr()
    assert f"{annotations / '0.jsonl'}, line 3: image not found" in shown.err and "not be clean" in shown.out


def test_the_verdict_says_what_the_crop_threshold_rejects(tmp_path, golden, capsys):
    """Of the golden items at 256 x 256, by the thresholds that are listed in the plan, too."""
    entries = {"g": entry(tmp_path, golden / "images", golden / "codebook" / "generation" / "annotations")}
    _, datasets, _ = plan(tmp_path, entries, "--resolution_type", "fixed", "--resolution", "256")
    found = datasets["g"]
    rejected, items = found["items_rejected_at_threshold"], found["items"]
    shares = ", ".join(f"{t} {rejected[t] / items:.0%}" for t in ("0.1", "0.2", "0.3"))
    assert f"By --crop_percent_thresh: {shares}; 0 keeps all." in capsys.readouterr().out
    plan(tmp_path, entries, "--crop_percent_thresh", "0")
    assert "--crop_percent_thresh: " not in capsys.readouterr().out


def test_data_sets_that_need_no_codes_are_checked_too(tmp_path, golden):
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    talk = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]
    (annotations / "0.jsonl").write_text(json.dumps({"conversations": talk}) + "\n")
    entries = {"text": entry(tmp_path, golden / "images", annotations, inference=False)}
    assert plan(tmp_path, entries)[0] == 2  # nothing to encode: the run would refuse
    entries["images"] = entry(tmp_path, golden / "images", tmp_path / "with_images")
    (tmp_path / "with_images").mkdir()
    (tmp_path / "with_images" / "A.JSONL").write_text(json.dumps({"images": ["photo.jpg"], "conversations": TALK}))
    code, datasets, _ = plan(tmp_path, entries)
    assert (
        code == 0
        and datasets["images"]["done"] == 1
        and datasets["text"]["done"] == 1
        and datasets["text"]["bytes"] == 0
    )
    (annotations / "0.jsonl").write_text(json.dumps({"images": ["x.png"], "conversations": talk}) + "\n")
    code, datasets, _ = plan(tmp_path, entries)
    assert code == 1 and datasets["text"]["reasons"] == {"failed: image not found": 1}


def test_a_missing_folder_does_not_keep_the_others(tmp_path, golden, capsys):
    good = entry(tmp_path, golden / "images", golden / "codebook" / "editing" / "annotations")
    code, datasets, _ = plan(tmp_path, {"gone": entry(tmp_path, tmp_path / "x", tmp_path), "good": good})
    assert code == 2 and datasets["good"]["done"] == 3
    assert "data set gone: image_dir" in datasets["gone"]["errors"][0]
    assert "data set gone: image_dir" in capsys.readouterr().err


def test_time_and_picture(tmp_path, golden, capsys):
    pytest.importorskip("matplotlib")
    entries = {"g": entry(tmp_path, golden / "images", golden / "codebook" / "generation" / "annotations")}
    _, datasets, _ = plan(tmp_path, entries, "--images_per_second", "0.5")
    assert datasets["g"]["hours"] == pytest.approx(datasets["g"]["images_to_encode"] / 1800)
    with Image.open(tmp_path / "plan" / "plan.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_a_truncated_file_with_a_thumbnail_is_found(tmp_path, golden):
    """The thumbnail in the EXIF header has an end mark of its own."""
    small, exif, whole = io.BytesIO(), Image.Exif(), tmp_path / "images" / "a.jpg"
    with Image.open(golden / "images" / "photo.jpg") as photo:
        photo.resize((48, 32)).save(small, "JPEG")
        exif[0x927C] = small.getvalue()
        whole.parent.mkdir()
        photo.save(whole, exif=exif)
    content, mark = whole.read_bytes(), b"\xff\xd9"
    assert mark in content[:4096] and content.endswith(mark)
    (tmp_path / "images" / "cut.jpg").write_bytes(content[:8192])
    (tmp_path / "annotations").mkdir()
    lines = [json.dumps({"images": [name], "conversations": TALK}) + "\n" for name in ("a.jpg", "cut.jpg")]
    (tmp_path / "annotations" / "0.jsonl").write_text("".join(lines))
    _, datasets, problems = plan(tmp_path, {"a": entry(tmp_path, tmp_path / "images", tmp_path / "annotations")})
    assert datasets["a"]["reasons"] == {"failed: image unreadable": 1} and "cut.jpg" in problems[0]["detail"]


def test_data_sets_that_the_run_would_refuse_are_told(tmp_path, golden, capsys):
    """Two of one root: neither is wrong by itself."""
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    (annotations / "0.jsonl").write_text(json.dumps({"images": ["photo.jpg"], "conversations": TALK}) + "\n")
    entries = {name: entry(tmp_path, golden / "images", annotations) for name in ("one", "two")}
    code, datasets, problems = plan(tmp_path, entries)
    assert code == 2 and not problems and datasets["one"]["done"] == datasets["two"]["done"] == 1
    shown = capsys.readouterr()
    assert "error: data sets one and two have the same root" in shown.err and "not be clean" in shown.out
    assert plan(tmp_path, entries, "--datasets", "two")[0] == 0
    (annotations / "more.jsonl.gz").touch()
    (tmp_path / "out").touch()  # a file in the way
    assert plan(tmp_path, entries, "--datasets", "two")[0] == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'out'} cannot be written" in said and "files are read: more.jsonl.gz\n" in said


def test_unknown_names_are_refused(tmp_path, golden):
    entries = {"g": entry(tmp_path, golden / "images", golden / "codebook" / "generation" / "annotations")}
    with pytest.raises(UserError, match="--datasets h: not in"):
        plan(tmp_path, entries, "--datasets", "h")
    with pytest.raises(SystemExit, match="2"):
        plan(tmp_path, entries, "--crop_percent_thresh", "20")
    with pytest.raises(SystemExit, match="2"):
        plan(tmp_path, entries, "--images_per_second", "nan")
