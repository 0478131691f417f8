"""Thousands of hostile inputs, the same ones every time: none may end a command in a traceback, hang it, start a
process, be lost from the counts, or leave a file under its final name that is not whole.

`FUZZ_SEED=7 pytest -m slow tests/test_fuzz.py` tries others.
"""

import io
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from codebook_job import arguments, dataset, read_lines, write_config
from conftest import TINY_DUALVITOK
from fuzzing import WEIRD, Found, Watch, damaged, twisted
from lm_small import extended_tokenizer, made_line
from PIL import Image
from train_small import text_samples, write_record

from pre_tokenize import concat_record, extend_tokenizer, pre_tokenize, preview_tokens, verify_tokens
from pre_tokenize.record import Record, entry_line, sub_record
from pre_tokenize.token_file import TokenFiles, hash_of, pickle_bytes, shard_bytes
from training import export_checkpoint, train
from vision_tokenizer.models.dualvitok.model import load_dualvitok
from vision_tokenizer.tokenizer import (
    import_annotations,
    plan_codebook_inference,
    preview_codes,
    tokenizer_codebook_inference,
    verify_codebook,
)
from vistoken.errors import UserError
from vistoken.jobs.chunks import chunk_table

pytestmark = pytest.mark.slow
SEED = int(os.environ.get("FUZZ_SEED", "0"))


@pytest.fixture(scope="session")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def rng(request) -> random.Random:
    return random.Random(f"{request.node.originalname} {SEED}")


@pytest.fixture
def found(watch, monkeypatch, tmp_path) -> Found:
    monkeypatch.chdir(tmp_path)
    return Found(watch)


def items_in(content: bytes) -> int:
    """Lines that hold something, as the jobs count them."""
    return sum(bool(line.removeprefix(b"\xef\xbb\xbf").strip()) for line in content.split(b"\n"))


def check_counts(summary: dict, items: int, output: Path, rejected: Path) -> None:
    assert summary["items"] == items == summary["done"] + summary["rejected"] + summary["failed"]
    assert len(output.read_bytes().splitlines()) == summary["done"]
    listed = read_lines(rejected) if rejected.exists() else []
    assert len(listed) == summary["rejected"] + summary["failed"]


def nothing_unfinished(folder: Path) -> None:
    """No temporary files stay, and what has a final name is whole."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if path.name.endswith(".tmp")]
    for path in files:
        if path.suffix == ".json" and "chunks" not in path.name:
            json.loads(path.read_bytes())


def encode(found: Found, what: str, tiny, folder: Path, lines: bytes) -> None:
    """Run codebook inference over lines in `folder`, and check that each is accounted for."""
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / "a.jsonl").write_bytes(lines)
    config = write_config(folder / "meta.json", d=dataset(folder / "out", folder / "images", folder / "annotations"))
    more = ("--resolution_type", "fixed", "--resolution", "32", "--batch_size", "8", "--max_failed", "1")
    assert found.end(what, tokenizer_codebook_inference.main, arguments(*tiny, config, *more), (0,)) == 0
    output = folder / "out" / "jsonl_after_tokenizer" / "dualvitok" / "fixed_32"
    summary = json.loads((output / "run_summary.json").read_text())["total"]
    check_counts(summary, items_in(lines), output / "a.jsonl", output / "a.rejected.jsonl")
    nothing_unfinished(folder / "out")
    where = ["--data_config", config, "--resolution_type", "fixed", "--resolution", "32"]
    assert found.end(f"{what}, verified", verify_codebook.main, where, (0,)) == 0
    found.end(f"{what}, planned", plan_codebook_inference.main, [*where, "--num_workers", "1"])


def test_annotation_lines(tmp_path, tiny_dualvitok, found, rng):
    (tmp_path / "images").mkdir()
    for name, size in (("a.png", (40, 40)), ("b.png", (40, 36)), ("wide.png", (90, 30))):
        Image.new("RGB", size, "teal").save(tmp_path / "images" / name)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Teal."}]
    good = [{"images": names, "conversations": turns, "id": 3} for names in ("a.png", ["a.png", "b.png"], ["wide.png"])]
    lines = [json.dumps(twisted(rng, rng.choice(good))).encode() for _ in range(450)]
    lines += [damaged(rng, json.dumps(rng.choice(good)).encode()) for _ in range(450)]
    rng.shuffle(lines)
    encode(found, "lines", tiny_dualvitok, tmp_path, b"\n".join(lines))
    found.inputs += len(lines)
    found.check(900)


def test_lists_of_annotations(tmp_path, found, rng):
    good = json.dumps([{"images": f"{n}.png", "text": "中😀"} for n in range(6)], indent=1, ensure_ascii=False).encode()
    path = tmp_path / "a.json"

    def read() -> None:
        table = chunk_table(path, 2, tmp_path / "cache.json")
        assert sum(1 for index in range(len(table)) for _ in table.read(table[index])) == table.items

    for number in range(250):
        path.write_bytes(content := damaged(rng, good))
        os.utime(path, ns=(number, number))
        found.run(content, read, UserError)
    found.check(250)


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


def test_images(tmp_path, tiny_dualvitok, found, rng):
    Image.init()
    (tmp_path / "images").mkdir()
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (36, 40, 3), np.uint8))
    options = {"JPEG": [{}, {"progressive": True}], "TIFF": [{}, {"compression": "jpeg"}, {"compression": "tiff_lzw"}]}
    names = []
    for kind in FORMATS:
        if kind not in Image.SAVE:
            continue
        for number in range(70):
            stream, mode = io.BytesIO(), rng.choice(("RGB", "L", "RGBA", "P", "1"))
            image = photo.convert(mode if kind in ("PNG", "TIFF", "GIF") else "RGB")
            image.save(stream, kind, **rng.choice(options.get(kind, [{}]) if image.mode == "RGB" else [{}]))
            names.append(f"{kind}{number}.png")  # the content decides, not the name
            (tmp_path / "images" / names[-1]).write_bytes(damaged(rng, stream.getvalue()))
    lines = b"".join(json.dumps({"images": name}).encode() + b"\n" for name in names)
    encode(found, "images", tiny_dualvitok, tmp_path, lines)
    found.inputs += len(names)
    found.check(400)


def test_metadata_configs(tmp_path, found, rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # pictures take most of the time
    for name in ("images", "annotations"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "a.png")
    (tmp_path / "annotations" / "a.jsonl").write_text('{"images": "a.png"}')
    good = {"birds": dataset(Path("out"), Path("images"), Path("annotations")), "cats": dataset("o2", "images", "x")}
    shards = {"root": "o3", "shards": "s/{000..003}.tar", "tokenizer_inference": True, "text_field": "caption"}
    for number in range(350):
        chosen = good if rng.random() < 0.8 else {**good, "shards": shards}
        content = json.dumps(twisted(rng, chosen)).encode()
        if number % 3 == 0:
            content = damaged(rng, json.dumps(chosen).encode())
        Path("meta.json").write_bytes(content)
        found.end(content, plan_codebook_inference.main, ["--data_config", "meta.json", "--num_workers", "1"])
    found.check(350)


def test_checkpoints(tmp_path, tiny_dualvitok, found, rng):
    config, checkpoint = tiny_dualvitok
    good = checkpoint.read_bytes()
    state = torch.load(checkpoint, weights_only=True)
    names = list(state)
    for number in range(130):
        path = tmp_path / "pytorch_model.bin"
        if number % 2:
            head = (
                rng.random() < 0.7
            )  # the pickle and the directory of the zip, where damage is not just another number
            ends = good[:4000], good[4000:-60000], good[-60000:]
            path.write_bytes(damaged(rng, ends[0]) + ends[1] + damaged(rng, ends[2]) if head else damaged(rng, good))
        else:
            changed, name = dict(state), rng.choice(names)
            tensor = state[name]
            others = [None, 3, "x", [tensor], {"weight": tensor}, tensor[:0], tensor.flatten(), tensor[None]]
            others += [tensor.double(), tensor.to(torch.int8), tensor.to(torch.complex64)]
            others += [tensor.to_sparse(), tensor.to("meta")]
            changed[name] = rng.choice(others)
            if rng.random() < 0.3:
                changed = {"model": changed} if rng.random() < 0.5 else {f"module.{k}": v for k, v in changed.items()}
            torch.save(changed, path)
        found.run(number, lambda path=path: load_dualvitok(config, path, device="cpu"), UserError)
    found.check(130)


def test_model_configs(tmp_path, tiny_dualvitok, found, rng):
    values = list(re.finditer(r'(?<==)(\d+|True|"[a-zA-Z_]+"|\[[\d, ]+\])', TINY_DUALVITOK))
    keys = list(re.finditer(r"\b[a-z_]+(?==)", TINY_DUALVITOK))
    plain = [value for value in WEIRD if value not in (float("inf"), [[float("inf")]])]
    for _ in range(220):
        if rng.random() < 0.7:
            place, new = rng.choice(values), repr(rng.choice([*plain, 3, 5, 10**6, [1, 1], "SimVQ"]))
        else:
            place = rng.choice(keys)
            new = rng.choice((f"{place[0]}s", "depth", "config", "_base_"))
        content = TINY_DUALVITOK[: place.start()] + new + TINY_DUALVITOK[place.end() :]
        Path("c.py").write_text(content, encoding="utf-8")
        told = f"{place[0]} -> {new}"
        found.run(told, lambda: load_dualvitok("c.py", tiny_dualvitok[1], device="cpu"), UserError)
    found.check(220)


def test_conversations(tmp_path, chameleon_folder, found, rng):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 40), "teal").save(name)
    turns = [{"from": "human", "value": "<|image|> What?"}, {"from": "gpt", "value": "Teal <|image|>"}]
    good = {"conversations": turns, "image": ["a.png", "b.png"], "id": 5}
    items = [json.dumps(twisted(rng, good)).encode() for _ in range(250)]
    items += [damaged(rng, json.dumps(good).encode()) for _ in range(150)]
    command = ["--tokenizer_dir", chameleon_folder, "--target_size", 32, "--device", "cpu", "--batch_size", 4]
    tokenize(found, b"\n".join(items), command)
    found.inputs += len(items)
    found.check(400)


def test_lines_of_codes(tmp_path, found, rng):
    extended = extended_tokenizer(tmp_path)
    good = made_line("<image>\nWhat?", "Teal.", "Another: {resolution_tag}", "<image>", anchors=((64, 64), (64, 128)))
    items = [json.dumps(twisted(rng, twisted(rng, good))).encode() for _ in range(300)]
    items += [damaged(rng, json.dumps(good).encode()) for _ in range(150)]
    tokenize(found, b"\n".join(items), ["--image_tokenizer", "dualvitok", "--tokenizer_dir", extended])
    found.inputs += len(items)
    found.check(450)


def tokenize(found: Found, items: bytes, command: list) -> None:
    """Run pre_tokenize.py and concat_record.py, and check that each item is accounted for."""
    Path("data.jsonl").write_bytes(items)
    command += ["--in_filename", "data.jsonl", "--out_dir", "out", "--max_failed", 1, "--items_per_file", 40]
    assert found.end("items", pre_tokenize.main, command, (0,)) == 0
    record = sub_record(Path("out"), 0, 1)
    summary = json.loads(record.with_suffix(".summary.json").read_text())
    account = next(value for value in summary.values() if isinstance(value, dict) and "done" in value)
    check_counts(account, items_in(items), record, record.with_suffix(".rejected.jsonl"))
    joined = ["--sub_record_dir", "out", "--save_path", "out/record.json"]
    assert found.end("joined", concat_record.main, joined, (0,)) == 0
    assert len(list(TokenFiles("out/record.json"))) == account["done"]
    nothing_unfinished(Path("out"))


@pytest.mark.parametrize("form", ["arrow", "pkl"])
def test_token_files(tmp_path, found, rng, form):
    samples = text_samples(6)
    for sha256 in (True, False):
        good = shard_bytes(samples, {"image_dir": "x"}) if form == "arrow" else pickle_bytes(samples[0])
        count = len(samples) if form == "arrow" else 1
        lines = [
            entry_line(f"0.{form}", row if form == "arrow" else None, len(s.tokens), s.id, hash_of(good))
            for row, s in enumerate(samples[:count])
        ]
        if not sha256:
            lines = [re.sub(rb',"sha256":"\w+"', b"", line) for line in lines]
        sub_record(tmp_path, 0, 1).write_bytes(b"\n".join(lines) + b"\n")
        for number in range(150):
            Path(f"0.{form}").write_bytes(content := damaged(rng, good))

            def read() -> list:
                return list(TokenFiles(sub_record(tmp_path, 0, 1)))

            read_back = found.run(number, read, UserError)
            if sha256 and content != good:
                assert read_back is None
            joined = ["--sub_record_dir", ".", "--save_path", "record.json"]
            if form == "pkl" or number % 3 == 0:
                assert found.end(number, concat_record.main, joined, (0, 1)) is not None
                assert not (sha256 and content != good and Path("record.json").exists())
            Path("record.json").unlink(missing_ok=True)
    found.check(400)


def test_records(tmp_path, found, rng):
    record = write_record(tmp_path / "tokens", text_samples(5))
    entries = [json.loads(line) for line in record.read_text().splitlines()]
    entries[0]["sha256"] = hash_of((tmp_path / "tokens/files/0.arrow").read_bytes())
    path, folder = tmp_path / "tokens" / "r.json", tmp_path / "tokens"
    for number in range(300):
        listed = number % 2
        changed = twisted(rng, entries)
        if not listed and isinstance(changed, list):
            content = "\n".join(map(json.dumps, changed)).encode()
        else:
            content = json.dumps(changed, indent=rng.choice((None, 0))).encode()
        path.write_bytes(content if number % 3 else damaged(rng, content))
        found.run(content, lambda: list(TokenFiles(Record.load(path))), UserError)
        shutil.copy(path, sub_record(folder, 0, 1))
        joined = ["--sub_record_dir", folder, "--save_path", folder / "joined.json", *["--allow_partial"][: number % 2]]
        if found.end(content, concat_record.main, joined, (0, 1)) == 0:
            list(TokenFiles(folder / "joined.json"))
    found.check(600)


def test_training_configs(tmp_path, found, rng):
    record = write_record(tmp_path / "tokens", text_samples(5))
    data = {"META": [{"path": str(record), "ratio": 1, "type": "text"}, {"path": str(record), "image_dir": "."}]}
    config = {"init_from": "nowhere", "data_config": "data.yaml", "output_dir": "out", "lr": 1e-4, "stage": "II"}
    config |= {"epochs": 2, "batch_size": 4, "global_batch_size": 8, "seed": 1, "checkpointing": True}
    plain = {"allow_unicode": True, "sort_keys": False}
    for number in range(300):
        contents = {"data.yaml": data, "config.yaml": config}
        chosen = rng.choice(list(contents))
        contents[chosen] = twisted(rng, contents[chosen])
        texts = {name: yaml.safe_dump(content, **plain).encode() for name, content in contents.items()}
        if number % 3 == 0:
            texts[chosen] = damaged(rng, texts[chosen])
        for name, text in texts.items():
            Path(name).write_bytes(text)
        found.end(texts[chosen], train.main, ["--config", "config.yaml"], (2,))
    found.check(300)


COMMANDS = {
    tokenizer_codebook_inference: ("--model_config", "--tokenizer_checkpoint", "--data_config"),
    plan_codebook_inference: ("--data_config",),
    verify_codebook: ("--data_config",),
    preview_codes: ("--data_config",),
    import_annotations: ("--format", "--source", "--root", "--task"),
    pre_tokenize: ("--in_filename", "--out_dir"),
    concat_record: ("--sub_record_dir", "--save_path"),
    verify_tokens: ("--record",),
    preview_tokens: ("--record",),
    extend_tokenizer: (),
    train: (),
    export_checkpoint: (),
}
VALUES = [
    "",
    " ",
    "0",
    "-1",
    "1",
    "1e9",
    "nan",
    "inf",
    "-inf",
    "9" * 30,
    "x",
    "../x",
    "a/b",
    "x.json",
    "x.jsonl",
    "cpu",
]
VALUES += [
    "fixed",
    "llava",
    "pairs",
    "generation",
    "\udce9",
    "中😀",
    "a" * 400,
    "--",
    "-",
    "I",
    "lm",
    "fp32",
    "0x10",
    ".",
]


def test_flags(tmp_path, found, rng, capsys):
    Path("x.json").write_text("{}")
    Path("x.jsonl").write_text("{}\n")
    for command, required in COMMANDS.items():
        with pytest.raises(SystemExit):
            command.main(["--help"])
        known = sorted(set(re.findall(r"--[a-z][a-z_-]+", capsys.readouterr().out)) - {"--help"})
        for _ in range(30):
            argv = []
            for flag in [
                *rng.sample(required, rng.randint(0, len(required))),
                *rng.choices(known, k=rng.randint(0, 4)),
            ]:
                argv += [flag, rng.choice(VALUES)] if rng.random() < 0.9 else [flag]
            found.end([command.__name__, *argv], command.main, argv, (0, 1, 2))
    found.check(360)
