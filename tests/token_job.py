"""Running pre_tokenize.py in tests."""

import json
from pathlib import Path

from PIL import Image

from pre_tokenize import concat_record
from pre_tokenize.pre_tokenize import main
from pre_tokenize.token_file import TokenFiles


def run_here(folder: Path, tokenizer: Path, items, *more, target_size=64, items_per_file=4, out="out") -> int:
    """The command on items, or a file of them, into `folder / out`; its exit code. Small crops unless told."""
    path = items
    if not isinstance(items, Path):
        path = folder / "data.json"
        path.write_text(items if isinstance(items, str) else json.dumps(items))
    command = ["--in_filename", path, "--out_dir", folder / out, "--tokenizer_dir", tokenizer]
    command += ["--target_size", target_size, "--items_per_file", items_per_file, "--device", "cpu"]
    return main([str(argument) for argument in (*command, *more)])


def make_picture(folder: Path, number: int) -> Path:
    """A small picture; each number has its own colour."""
    path = folder / f"picture{number}.png"
    Image.new("RGB", (80, 70), (40 * number % 256, 90, 255 - 30 * number % 256)).save(path)
    return path


def samples(folder):
    """What was written, by item."""
    concat_record.main(["--sub_record_dir", str(folder), "--save_path", str(folder / "record.json")])
    return {sample.id: sample for sample in TokenFiles(folder / "record.json")}


def rejected(folder, name="0-of-1-record"):
    path = folder / f"{name}.rejected.jsonl"
    return {line["item"]: line for line in map(json.loads, path.read_text().splitlines())} if path.exists() else {}


def ask(question, answer="yes", images=()):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, "image": [str(image) for image in images]}


def files_of(folder):
    """Everything of a finished run that must be the same bytes however it came about."""
    paths = [*(folder / "files").iterdir(), *folder.glob("*-record.jsonl"), folder / "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
