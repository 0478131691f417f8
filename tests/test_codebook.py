"""Codebook inference against the reference's numbers, and its accounting."""

import json

import pytest
from codebook_job import OUTPUT_FIELDS, dataset, read_lines, run_here, write_config

TAGS = {"fixed_256": ("fixed", "256"), "fixed_512": ("fixed", "512"), "fixed_anchors": ("fixed_anchors", "512")}


def identity(line: dict) -> str:
    return json.dumps({key: value for key, value in line.items() if key not in OUTPUT_FIELDS}, sort_keys=True)


@pytest.mark.parametrize("tag", TAGS)
def test_every_code_equals_the_reference(tag, tmp_path, golden, dualvitok_config, dualvitok_checkpoint):
    sets = {
        name: dataset(tmp_path / name, golden / "images", golden / "codebook" / name / "annotations")
        for name in ("generation", "editing")
    }
    config = write_config(tmp_path / "meta.json", **sets)
    kind, resolution = TAGS[tag]
    run_here(
        *(dualvitok_config, dualvitok_checkpoint, config),
        *("--resolution_type", kind, "--resolution", resolution, "--max_failed", "1"),
    )
    for expected_file in sorted((golden / "codebook" / "expected").glob(f"*/{tag}/*.jsonl")):
        name = expected_file.parts[-3]
        written = read_lines(tmp_path / name / "jsonl_after_tokenizer" / "dualvitok" / tag / expected_file.name)
        expected = {identity(line): line for line in read_lines(expected_file)}
        assert {identity(line): line for line in written} == expected
        annotations = read_lines(golden / "codebook" / name / "annotations" / expected_file.name)
        order = [identity(line) for line in annotations if identity(line) in expected]
        assert [identity(line) for line in written] == order
