"""The scripts in examples/ do what they show."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pre_tokenize.token_file import TokenFiles

ROOT = Path(__file__).parents[1]


def run(*command) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_encode_and_decode(tmp_path, tiny_dualvitok, golden):
    said = run(ROOT / "examples/encode_and_decode.py", *tiny_dualvitok, golden / "images/tiny.png", tmp_path / "a.png")
    with Image.open(golden / "images/tiny.png") as image, Image.open(tmp_path / "a.png") as again:
        assert f"{image.width} x {image.height} pixels" in said
        assert abs(image.width - again.width) <= 8 and abs(image.height - again.height) <= 8  # multiples of 16
        assert f"pixel codes: {again.height // 16} rows of {again.width // 16}" in said


@pytest.mark.slow
def test_llava_items(tmp_path, chameleon_folder, golden):
    asked = {"from": "human", "value": "<image>\nWho is this?"}
    turns = [{"from": "system", "value": "Be kind."}, asked, {"from": "gpt", "value": "An astronaut."}]
    items = [
        {"id": 1, "image": "sq_astronaut.png", "conversations": turns},
        {"id": 2, "image": "moving.gif", "conversations": turns},
        {"id": 3, "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(items))
    flags = {
        "in_filename": tmp_path / "llava.json",
        "out_dir": tmp_path / "tokens",
        "image_dir": golden / "images",
        "tokenizer_dir": chameleon_folder,
        "target_size": 64,
        "device": "cpu",
        "item_processor": f"{ROOT / 'examples/llava_items.py'}:LlavaItems",
    }
    run("pre_tokenize/pre_tokenize.py", *(f"--{name}={value}" for name, value in flags.items()))
    tokens, record = tmp_path / "tokens", tmp_path / "tokens/record.json"
    run("pre_tokenize/concat_record.py", f"--sub_record_dir={tokens}", f"--save_path={record}")
    files = TokenFiles(record)
    assert [(sample.id, len(sample.images)) for sample in files] == [(0, 1), (2, 0)]
    [rejected] = [json.loads(line) for line in (tokens / "record.rejected.jsonl").read_text().splitlines()]
    assert (rejected["kind"], rejected["reason"], rejected["detail"]) == ("rejected", "animation", "moving.gif")
