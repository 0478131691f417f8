"""What codebook inference is for, in one test: the annotations in, the reference's codes out. Begin reading here.

`golden/codebook/{generation,editing}/annotations` hold the input, `golden/images` the pictures, and
`golden/codebook/expected/{generation,editing}/{tag}` the lines that the published implementation wrote with the same
weights: codes, sizes and matched ratios. Items that are missing there are those that the crop threshold rejects, or
whose image does not decode.
"""

import json
from pathlib import Path

import pytest
from codebook_job import OUTPUT_FIELDS, dataset, read_lines, run_here, write_config

DATASETS = ("generation", "editing")


@pytest.mark.parametrize(
    ("tag", "flags"),
    [
        ("fixed_256", ("--resolution_type", "fixed", "--resolution", "256")),
        pytest.param("fixed_512", ("--resolution_type", "fixed", "--resolution", "512"), marks=pytest.mark.slow),
        pytest.param("fixed_anchors", ("--resolution_type", "fixed_anchors"), marks=pytest.mark.slow),
    ],
    ids=["fixed_256", "fixed_512", "fixed_anchors"],
)
def test_every_code_equals_the_reference(tag, flags, tmp_path, golden, dualvitok_config, dualvitok_checkpoint):
    entries = {
        name: dataset(tmp_path / name, golden / "images", golden / "codebook" / name / "annotations")
        for name in DATASETS
    }
    data_config = write_config(tmp_path / "meta.json", **entries)

    run_here(dualvitok_config, dualvitok_checkpoint, data_config, *flags, "--max_failed", "1")

    for name in DATASETS:
        for expected_file in sorted((golden / "codebook" / "expected" / name / tag).glob("*.jsonl")):
            written = read_lines(tmp_path / name / "jsonl_after_tokenizer" / "dualvitok" / tag / expected_file.name)
            annotations = golden / "codebook" / name / "annotations" / expected_file.name
            assert written == in_input_order(read_lines(expected_file), annotations)


def in_input_order(expected: list[dict], annotations: Path) -> list[dict]:
    """The reference groups its lines by ratio; ours keep the order of the annotations."""
    by_item = {item_of(line): line for line in expected}
    return [by_item[item_of(line)] for line in read_lines(annotations) if item_of(line) in by_item]


def item_of(line: dict) -> str:
    """The annotation that a line was made from."""
    return json.dumps({key: value for key, value in line.items() if key not in OUTPUT_FIELDS}, sort_keys=True)
