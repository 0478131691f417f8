"""A sound output passes; a tampered code, a dropped line, a swapped file and their like are each told."""

import json
import shutil
from pathlib import Path

import pytest
from codebook_job import dataset, read_lines, run_here, write_config

from vision_tokenizer.tokenizer.verify_codebook import main
from vistoken.errors import UserError

FIXED = ("--resolution_type", "fixed", "--resolution", "128")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, golden, dualvitok_config, dualvitok_checkpoint) -> Path:
    """Folder with the data config and the codes of the golden data sets at 128."""
    base = tmp_path_factory.mktemp("encoded")
    for name in ("generation", "editing"):
        shutil.copytree(golden / "codebook" / name / "annotations", base / name / "annotations")
    sets = {
        name: dataset(base / name, golden / "images", base / name / "annotations") for name in ("generation", "editing")
    }
    config = write_config(base / "meta.json", **sets)
    run_here(
        dualvitok_config, dualvitok_checkpoint, config, *FIXED, "--crop_percent_thresh", "0.4", "--max_failed", "1"
    )
    return base


@pytest.fixture
def output(encoded, tmp_path) -> Path:
    """A copy to damage: annotations and codes of `generation` alone."""
    shutil.copytree(encoded / "generation", tmp_path / "generation")
    return tmp_path / "generation"


def verify(output: Path, *more) -> int:
    sets = json.loads((output.parent / "meta.json").read_text()) if (output.parent / "meta.json").exists() else None
    if sets is None:
        images = Path(__file__).parent / "golden" / "images"
        write_config(output.parent / "meta.json", generation=dataset(output, images, output / "annotations"))
    return main(["--data_config", str(output.parent / "meta.json"), *FIXED, "--device", "cpu", *map(str, more)])


def codes(output: Path, name: str = "0000.jsonl") -> Path:
    return output / "jsonl_after_tokenizer" / "dualvitok" / "fixed_128" / name


def rewrite(path: Path, change) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines)))


def test_a_sound_output_passes_and_every_code_is_equal(encoded, dualvitok_config, dualvitok_checkpoint, capsys):
    model = ("--model_config", dualvitok_config, "--tokenizer_checkpoint", dualvitok_checkpoint)
    arguments = ["--data_config", encoded / "meta.json", *FIXED, "--device", "cpu", *model]
    assert main([str(argument) for argument in arguments]) == 0
    said = capsys.readouterr().out
    items = [item for path in encoded.rglob("fixed_128/000?.jsonl") for item in read_lines(path)]
    images = [image for item in items for image in item["image_embed_inds"]]
    assert f"{len(images)} images with codes" in said and f"{len(images)} images encoded again" in said
    for number, branch in enumerate(("semantic", "pixel")):
        count = sum(len(row) for image in images for row in image[number])
        assert f"{branch}: 100.0000% of {count:,} codes equal\n" in said
    assert "no issues" in said


def test_a_tampered_code_is_found(output, dualvitok_config, dualvitok_checkpoint, capsys):
    def change(lines):
        item = json.loads(lines[1])
        grid = item["image_embed_inds"][0][1]
        grid[3][5] = (grid[3][5] + 77) % 100
        added = {key: item[key] for key in ("image_sizes", "image_embed_inds", "matched_ratios")}
        kept = lines[1][: lines[1].index(b', "image_sizes"')]
        lines[1] = kept + b", " + json.dumps(added, separators=(",", ":")).encode()[1:] + b"\n"
        return lines

    rewrite(codes(output), change)
    assert verify(output) == 1
    assert "file changed: 1" in capsys.readouterr().out
    model = ("--model_config", dualvitok_config, "--tokenizer_checkpoint", dualvitok_checkpoint)
    assert verify(output, *model) == 1
    said = capsys.readouterr().out
    assert "code is not the nearest: 1" in said and "0000.jsonl, line 2, image 0, pixel row 3 column 5" in said
    assert "1 differ, largest gap" in said


def test_a_dropped_line_is_found(output, capsys):
    rewrite(codes(output), lambda lines: lines[:1] + lines[2:])
    assert verify(output) == 1
    said = capsys.readouterr().out
    lost = read_lines(codes(output))
    assert f"item lost: 1\n    {output / 'annotations' / '0000.jsonl'}, line " in said
    assert "statistics differ" in said and "summary differs: 1" in said and len(lost) > 1


def test_swapped_files_are_found(output, capsys):
    first, second = codes(output), codes(output, "0001.jsonl")
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert verify(output) == 1
    said = capsys.readouterr().out
    assert "line of no item" in said and "item lost" in said


def first_line(change):
    """A change to a file's first line, which must really change it."""

    def changed(lines: list[bytes]) -> list[bytes]:
        line = change(lines[0])
        assert line != lines[0]
        return [line, *lines[1:]]

    return changed


def replaced(old: bytes, new: bytes):
    return first_line(lambda line: line.replace(old, new, 1))


def first_code(value: bytes):
    """The first code of the first image is now `value`."""

    def changed(line: bytes) -> bytes:
        start = line.index(b"[[[[") + 4
        return line[:start] + value + line[line.index(b",", start) :]

    return first_line(changed)


DAMAGES = {  # what is done to a file of codes -> how, and the issue that it is
    "a line twice": (lambda lines: [*lines, lines[-1]], "line of no item: 1"),
    "two lines swapped": (lambda lines: [lines[1], lines[0], *lines[2:]], "item lost: 1"),
    "another annotation": (replaced(b"picture", b"pictures"), "item lost: 1"),
    "a line cut off": (first_line(lambda line: line[:-200] + b"\n"), "not JSON: 1"),
    "another anchor": (replaced(b'"matched_ratios":[[128,', b'"matched_ratios":[[512,'), "wrong anchor: 1"),
    "rows too many": (replaced(b"]],[[", b"],[1],[2]],[["), "wrong shape: 1"),
    "the first row too long": (replaced(b"[[[[", b"[[[[1,"), "wrong shape: 1"),
    "the last row too long": (replaced(b"]]]],", b",1]]]],"), "wrong shape: 1"),
    "a field under another name": (replaced(b'"image_embed_inds"', b'"embed_inds"'), "fields missing: 1"),
    "a code too large": (first_code(b"2048"), "code out of range: 1"),
    "a code below zero": (first_code(b"-1"), "code out of range: 1"),
    "a code that is no integer": (first_code(b"1.5"), "wrong type: 1"),
}


@pytest.mark.parametrize(("change", "said"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_to_a_file_of_codes_is_told(output, capsys, change, said):
    rewrite(codes(output), change)
    assert verify(output) == 1
    found = capsys.readouterr().out
    assert said in found and "0000.jsonl" in found


def test_other_files_are_told(output, capsys):
    folder = codes(output).parent
    shutil.copy(codes(output), folder / "0007.jsonl")
    codes(output, "0001.jsonl").unlink()
    statistics = output / "jsonl_after_tokenizer" / "fixed_128_data_statistic.json"
    statistics.write_text("{}")
    (output / "annotations" / "0000.jsonl").open("a").write("\n")
    assert verify(output) == 1
    said = capsys.readouterr().out
    for kind in ("foreign file: 1", "output file missing: 1", "statistics differ: 1", "annotations changed: 1"):
        assert kind in said


def test_a_run_that_has_not_ended_is_told_in_one_line(output, dualvitok_config, dualvitok_checkpoint, capsys):
    codes(output, "run_summary.json").unlink()
    assert verify(output) == 1
    assert "1 issue" in (said := capsys.readouterr().out) and "run not finished: 1" in said


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"files": [1], "total": 3}', "file damaged: 2"),
        ('{"files": {"0000.jsonl": 1}}', "0000.jsonl must be an object, is 1"),
        ("[]", "must be an object, is []"),
        ("{", "file damaged: 1"),
        (None, "Is a directory"),
    ],
)
def test_a_damaged_summary_is_told(output, capsys, content, said):
    summary = codes(output, "run_summary.json")
    summary.unlink()
    summary.mkdir() if content is None else summary.write_text(content)
    assert verify(output) == 1
    assert said in capsys.readouterr().out


def test_a_rejected_entry_too_few_is_told(output, capsys):
    rewrite(codes(output, "0000.rejected.jsonl"), lambda lines: lines[1:])
    assert verify(output) == 1
    assert "item lost: 1" in capsys.readouterr().out


def test_a_changed_manifest_is_told(output):
    manifest = codes(output, "manifest.json")
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "settings": {**content["settings"], "resolution": 512}}))
    with pytest.raises(UserError, match="not the manifest of this folder"):
        verify(output)
    manifest.unlink()
    with pytest.raises(UserError, match="Run codebook inference first"):
        verify(output)


def test_another_tokenizer_is_told(encoded, output, dualvitok_config, dualvitok_checkpoint, capsys):
    manifest = codes(output, "manifest.json")
    content = json.loads(manifest.read_text())
    content["tokenizer"]["fingerprint"] = "something else"
    manifest.write_text(json.dumps(content))
    model = ("--model_config", dualvitok_config, "--tokenizer_checkpoint", dualvitok_checkpoint)
    assert verify(output, *model) == 1
    said = capsys.readouterr().out
    assert "another tokenizer: 1" in said and said.count("no code compared") == 2
