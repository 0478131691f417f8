"""A sound output passes; a tampered code, a dropped line, a swapped file and their like are each told."""

import json
import shutil
from pathlib import Path

import pytest
from codebook_job import dataset, read_lines, run_here, write_config

from vision_tokenizer.tokenizer.verify_codebook import main
from vistoken.errors import UserError

FIXED = ("--resolution_type", "fixed", "--resolution", "256")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, golden, dualvitok_config, dualvitok_checkpoint) -> Path:
    """Folder with the data config and the codes of the golden data sets at 256."""
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
    return output / "jsonl_after_tokenizer" / "dualvitok" / "fixed_256" / name


def rewrite(path: Path, change) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines)))


def test_a_sound_output_passes_and_every_code_is_equal(encoded, dualvitok_config, dualvitok_checkpoint, capsys):
    model = ("--model_config", dualvitok_config, "--tokenizer_checkpoint", dualvitok_checkpoint)
    arguments = ["--data_config", encoded / "meta.json", *FIXED, "--device", "cpu", *model]
    assert main([str(argument) for argument in arguments]) == 0
    said = capsys.readouterr().out
    written = sum(
        len(item["image_sizes"]) for path in encoded.rglob("fixed_256/000?.jsonl") for item in read_lines(path)
    )
    assert f"{written} images with codes" in said and f"{written} images encoded again" in said
    assert f"semantic: 100.0000% of {written * 81:,} codes equal\n" in said
    assert f"pixel: 100.0000% of {written * 256:,} codes equal\n" in said
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [*lines, lines[-1]], "line of no item: 1"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "item lost: 1"),
        (lambda lines: [lines[0].replace(b"picture", b"pictures"), *lines[1:]], "item lost: 1"),
        (lambda lines: [lines[0][:-200] + b"\n", *lines[1:]], "not JSON: 1"),
        (
            lambda lines: [lines[0].replace(b'"matched_ratios":[[256,', b'"matched_ratios":[[512,'), *lines[1:]],
            "wrong anchor: 1",
        ),
        (lambda lines: [lines[0].replace(b"]],[[", b"],[1],[2]],[[", 1), *lines[1:]], "wrong shape: 1"),
        (lambda lines: [lines[0].replace(b"]]]],", b",1]]]],", 1), *lines[1:]], "wrong shape: 1"),
        (lambda lines: [lines[0].replace(b"[[[[", b"[[[[1.5,", 1).replace(b",", b"", 0), *lines[1:]], "wrong shape: 1"),
        (lambda lines: [lines[0].replace(b'"image_embed_inds"', b'"embed_inds"'), *lines[1:]], "fields missing: 1"),
        (lambda lines: [_first_code(lines[0], b"2048"), *lines[1:]], "code out of range: 1"),
        (lambda lines: [_first_code(lines[0], b"-1"), *lines[1:]], "code out of range: 1"),
        (lambda lines: [_first_code(lines[0], b"1.5"), *lines[1:]], "wrong type: 1"),
    ],
)
def test_damage_to_a_line_is_told(output, capsys, change, said):
    rewrite(codes(output), change)
    assert verify(output) == 1
    found = capsys.readouterr().out
    assert said in found and "0000.jsonl" in found


def _first_code(line: bytes, value: bytes) -> bytes:
    start = line.index(b"[[[[") + 4
    return line[:start] + value + line[line.index(b",", start) :]


def test_other_files_are_told(output, capsys):
    folder = codes(output).parent
    shutil.copy(codes(output), folder / "0007.jsonl")
    codes(output, "0001.jsonl").unlink()
    statistics = output / "jsonl_after_tokenizer" / "fixed_256_data_statistic.json"
    statistics.write_text("{}")
    (output / "annotations" / "0000.jsonl").open("a").write("\n")
    assert verify(output) == 1
    said = capsys.readouterr().out
    for kind in ("foreign file: 1", "output file missing: 1", "statistics differ: 1", "annotations changed: 1"):
        assert kind in said


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
