"""Measure pre-tokenization: the job against a plain loop, and token files against one pickle an item.

Physics. An image costs what the VQGAN's encoder computes (its rate is that of codebook inference); text costs what the
BPE of the `tokenizers` library costs, on all cores; everything else should vanish beside these two. A random read from
an Arrow file in the page cache is two slices of mapped memory; from a pickle it is an open, a read and one Python
object for each token. A pickle takes 2 x 2 or 3 bytes a token for ids and labels, and whole blocks of the file system.

Both sides of a ratio run in this process, one after the other, with the same model and data. Weights are untrained,
which changes no timing. The last line of the output is JSON.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from measure import (
    REPO,
    Clock,
    Rates,
    best_by_turns,
    describe_machine,
    make_images,
    measure_command,
    print_report,
)

from pre_tokenize.chameleon import ChameleonFormat, Settings, load_tokenizers, make_encoder, make_manifest
from pre_tokenize.conversation import parse_conversation
from pre_tokenize.job import run_pre_tokenization
from pre_tokenize.output import TokenOutput, open_source
from pre_tokenize.record import entry_line, sub_record
from pre_tokenize.sequences import join
from pre_tokenize.text import TextTokenizer
from pre_tokenize.token_file import TokenFiles, TokenSample, pickle_bytes, shard_bytes
from vision_tokenizer.images.chameleon import crop_sizes, prepare
from vision_tokenizer.images.dualvitok import normalize
from vision_tokenizer.models.chameleon.untrained import main as write_untrained
from vision_tokenizer.models.chameleon.vocabulary import ChameleonVocabulary
from vision_tokenizer.models.chameleon.vqgan import ChameleonVQGAN
from vistoken.cli import command_parser
from vistoken.device import default_batch_size, default_workers, local_device
from vistoken.jobs.workers import OneProcess

WORDS = (REPO / "LICENSE").read_text().split()
COMMAND, CONCAT = REPO / "pre_tokenize/pre_tokenize.py", REPO / "pre_tokenize/concat_record.py"
PER_SHARD = 512


def parse_args() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=("small", "full"), default=["small", "full"])
    parser.add_argument("--images", type=int, default=48, help="distinct images; a sixth of it for the full model")
    parser.add_argument("--items", type=int, default=1_000_000, help="text items, and records, of the large cases")
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch_size", type=int, help="default: the command's")
    return parser.parse_args()


def conversation(rng: random.Random, image: Path | None = None) -> dict:
    question, answer = (" ".join(rng.choices(WORDS, k=k)) for k in (20, 30))
    turns = [{"from": "human", "value": ("<|image|>" if image else "") + question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | ({"image": [str(image)]} if image else {})


def write_items(path: Path, items: Iterable[dict]) -> Path:
    with path.open("w") as file:
        for number, item in enumerate(items):
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(item))
        file.write("\n]\n")
    return path


def one_by_one(data: Path, made: Path, text: TextTokenizer, vqgan: ChameleonVQGAN, turn: int) -> Rates:
    """A plain loop: each image alone through the model, each text alone, one pickle an item."""
    vocabulary, sizes = ChameleonVocabulary(text.ids, str(text.path)), crop_sizes(512)
    out = made / f"loop {turn}"
    out.mkdir(parents=True)
    items = json.loads(data.read_text())
    clock = Clock()
    for number, item in enumerate(items):
        parsed = parse_conversation(item)
        blocks = []
        for image in parsed.images:
            pixels, _ = prepare(Path(image), sizes)
            codes = vqgan.encode(normalize(pixels[None].to(vqgan.device)))[0][0]
            blocks.append(vocabulary.image_block(codes.cpu().numpy()))
        ends = [[vocabulary.end_of_turn]] * len(parsed.learned)
        tokens, mask = join(text.encode(parsed.text), parsed.learned, blocks, [vocabulary.begin], ends)
        (out / f"{number}.pkl").write_bytes(pickle_bytes(TokenSample(number, tokens, mask, parsed.images)))
    return clock.rates(len(items))


def job(data: Path, made: Path, text: TextTokenizer, vqgan: ChameleonVQGAN, settings: Settings, turn: int) -> Rates:
    """The job, from opening the input to its record."""
    clock, out = Clock(), made / f"job {turn}"
    source = open_source(data, out, settings.items_per_file)
    manifest = make_manifest(settings, text, vqgan, source.table) | {"token_files": "arrow", "image_dir": "."}
    sequences = ChameleonFormat(text, lambda item: item, Path())
    encoder = partial(make_encoder, vqgan, settings, default_workers())
    finished = run_pre_tokenization(TokenOutput(out, manifest, source), sequences, encoder, OneProcess())
    assert finished is not None  # None is for the others where many write one record
    _, counts, _ = finished
    if counts.done != counts.items:
        raise SystemExit(f"only {counts.done} of {counts.items} items were tokenized")
    return clock.rates(counts.items)


def bench_job(name: str, tokenizers: Path, args: argparse.Namespace, scratch: Path) -> Iterator[dict]:
    """The job and the plain loop on the same items: distinct images, images that four items share, text alone."""
    rng, device = random.Random(0), local_device(args.device)
    batch_size = args.batch_size or default_batch_size(device)
    settings = Settings(512, "square", "fp32", batch_size, PER_SHARD)
    text, vqgan = load_tokenizers(None, str(tokenizers), device, settings)
    images = make_images(scratch / f"images-{name}", args.images if name == "small" else max(4, args.images // 6))
    cases: dict[str, list[Path] | list[None]] = {"distinct images": images}
    if name == "small":
        cases |= {"each image in four items": images[: len(images) // 4] * 4, "text alone": [None] * 20_000}
    for count in {1, batch_size}:
        vqgan.encode(torch.zeros(count, 3, 512, 512, device=device))  # warm
    for case, of_item in cases.items():
        data = write_items(scratch / f"{name} {case}.json", (conversation(rng, image) for image in of_item))
        made = scratch / f"{name} {case}"
        ours, loop = best_by_turns(
            2,
            partial(job, data, made, text, vqgan, settings),
            partial(one_by_one, data, made, text, vqgan),
        )
        yield {
            "model": name,
            "case": case,
            "items": len(of_item),
            "job_items_s": round(ours.wall, 2),
            "loop_items_s": round(loop.wall, 2),
            "ratio": round(ours.wall / loop.wall, 2),
            "ratio_of_cpu_time": round(ours.cpu / loop.cpu, 2),
        }


def samples(count: int) -> Iterator[TokenSample]:
    """Token sequences as short as text gets, where a pickle's overhead is largest."""
    rng = np.random.default_rng(0)
    for number in range(count):
        tokens = rng.integers(9000, 65536, rng.integers(50, 150)).astype(np.int32)
        yield TokenSample(number, tokens, np.arange(len(tokens)) > len(tokens) // 3, ())


def write_million(folder: Path, count: int) -> tuple[Path, Path]:
    """The same samples as Arrow shards with eight ranks' sub-records, and as pickles with one record."""
    arrow, pickles = folder / "arrow", folder / "pickles"
    for path in (arrow, pickles):
        (path / "files").mkdir(parents=True)
    stream, pickle_lines = samples(count), []
    rank_lines: list[list[bytes]] = [[] for _ in range(8)]
    for first in range(0, count, PER_SHARD):
        shard = list(islice(stream, PER_SHARD))
        name = f"files/{first}-{first + len(shard)}.arrow"
        (arrow / name).write_bytes(shard_bytes(shard, {}))
        for row, sample in enumerate(shard):
            (pickles / f"files/{sample.id}.pkl").write_bytes(pickle_bytes(sample))
            rank_lines[first * 8 // count].append(entry_line(name, row, len(sample.tokens), sample.id))
            pickle_lines.append(entry_line(f"files/{sample.id}.pkl", None, len(sample.tokens), sample.id))
    for rank, lines in enumerate(rank_lines):
        sub_record(arrow, rank, 8).write_bytes(b"\n".join(lines) + b"\n")
    (pickles / "record.jsonl").write_bytes(b"\n".join(pickle_lines) + b"\n")
    return arrow, pickles


def bench_files(args: argparse.Namespace, scratch: Path) -> dict:
    """Size, random reads and joining of `--items` short sequences."""
    arrow, pickles = write_million(scratch / "million", args.items)
    record = arrow / "record.json"
    seconds, peak = measure_command([CONCAT, "--sub_record_dir", arrow, "--save_path", record])
    files = {"arrow": TokenFiles(record), "pkl": TokenFiles(pickles / "record.jsonl")}
    order = np.random.default_rng(1).integers(0, args.items, args.reads)
    reads = {}
    for name, token_files in files.items():
        for index in order:  # once to warm the page cache, so that both are measured without the disk
            token_files[int(index)]
        began = time.perf_counter()
        for index in order:
            token_files[int(index)]
        reads[name] = round(args.reads / (time.perf_counter() - began))
    tokens = int(files["arrow"].lengths.sum())
    used = {name: disk_use(folder / "files") for name, folder in (("arrow", arrow), ("pkl", pickles))}
    return {
        "items": args.items,
        "tokens_per_item": round(tokens / args.items, 1),
        "bytes_per_token": {name: round(size / tokens, 2) for name, (size, _) in used.items()},
        "bytes_per_token_in_blocks": {name: round(blocks / tokens, 2) for name, (_, blocks) in used.items()},
        "reads_s": reads,
        "reads_ratio": round(reads["arrow"] / reads["pkl"], 2),
        "concat_seconds": round(seconds, 1),
        "concat_peak_mib": round(peak),
        "concat_peak_mib_of_1000": round(run_concat_of(scratch / "thousand", 1000)),
    }


def run_concat_of(folder: Path, count: int) -> float:
    arrow, _ = write_million(folder, count)
    return measure_command([CONCAT, "--sub_record_dir", arrow, "--save_path", arrow / "record.json"])[1]


def disk_use(folder: Path) -> tuple[int, int]:
    """Bytes in a folder's files, and bytes of the blocks that they occupy."""
    sizes = [entry.stat() for entry in os.scandir(folder)]
    return sum(size.st_size for size in sizes), sum(512 * size.st_blocks for size in sizes)


def bench_long_sequences(scratch: Path) -> dict[str, float]:
    """Bytes a token of sequences with an image of 512 x 512, 1,160 tokens."""
    rng = np.random.default_rng(0)
    rows = [
        TokenSample(i, rng.integers(4, 65536, 1160).astype(np.int32), np.arange(1160) > 1100, ()) for i in range(512)
    ]
    pickles = sum(len(pickle_bytes(row)) for row in rows)
    return {"arrow": round(len(shard_bytes(rows, {})) / 1160 / 512, 2), "pkl": round(pickles / 1160 / 512, 2)}


def bench_memory(tokenizers: Path, args: argparse.Namespace, scratch: Path) -> dict:
    """Peak memory of the command on text, for an input of a hundredth and of all of `--items`."""
    rng, result = random.Random(0), {}
    for count in (args.items // 100, args.items):
        data = write_items(scratch / "text.json", (conversation(rng) for _ in range(count)))
        out = scratch / f"memory-{count}"
        command = [COMMAND, "--in_filename", data, "--out_dir", out, "--tokenizer_dir", tokenizers, "--device", "cpu"]
        seconds, peak = measure_command(command)
        result[count] = {
            "peak_mib": round(peak),
            "seconds": round(seconds, 1),
            "input_mb": data.stat().st_size // 10**6,
        }
    return result


def main() -> None:
    args = parse_args()
    device = local_device(args.device)
    report = describe_machine(device)
    rows = []
    with tempfile.TemporaryDirectory(prefix="vistoken-benchmark-") as folder:
        scratch = Path(folder)
        for name in args.models:
            write_untrained(["--out", str(scratch / name), "--size", name])
            for row in bench_job(name, scratch / name, args, scratch):
                print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append(row)
        report["files"] = bench_files(args, scratch)
        report["bytes_per_token_with_image"] = bench_long_sequences(scratch)
        shutil.rmtree(scratch / "million")
        report["memory"] = bench_memory(scratch / args.models[0], args, scratch)
    print_report(report, rows, list(rows[0]))


if __name__ == "__main__":
    main()
