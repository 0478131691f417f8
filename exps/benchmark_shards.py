"""Measure shards in place against the same images in a folder, and against webdataset's own reading of the same tars.

Physics. A sample is read, decoded and resized on the CPU, then encoded. With a tokenizer that does nothing, what is
measured is the feeding: decoding and resizing a JPEG of a megapixel takes some 15 ms of one core, reading it from the
page cache a tenth of a millisecond, so folder, tar and parquet should be as fast as each other, and as webdataset with
as many workers doing the same to each image (`pip install webdataset`, for this benchmark only). The same tars and
parquet files on S3 come from moto's server, a process of its own on the same machine: it takes CPU time from the side
that it serves, so look at images per second of the job's CPU time. Sides run by turns; the best of each counts. Then:
peak memory of the command with 1 and with many shards, and how long it takes to the first chunk with many names, on the
disk and on S3. The last line of the output is JSON.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measure import REPO, Clock, Rates, best_by_turns, describe_machine, make_images, measure_command, print_report

from vision_tokenizer.codebook.annotations import Dataset, read_data_config
from vision_tokenizer.codebook.job import run_codebook_inference
from vision_tokenizer.codebook.output import CodebookOutput, Settings
from vision_tokenizer.images.anchors import anchors
from vision_tokenizer.images.dualvitok import prepare
from vision_tokenizer.models.dualvitok.untrained import main as write_untrained
from vistoken.cli import command_parser
from vistoken.device import default_workers
from vistoken.jobs.files import write_bytes
from vistoken.jobs.progress import Progress
from vistoken.jobs.run import todo
from vistoken.jobs.shards import NamedBytes
from vistoken.jobs.workers import OneProcess
from vistoken.store import Location, Url, read_ahead

COMMAND = REPO / "vision_tokenizer/tokenizer/tokenizer_codebook_inference.py"
SMALL = REPO / "configs/example/dualvitok/dualvitok_small.py"
SERVER = """
import threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server._server.server_port, flush=True)
threading.Event().wait()
"""
load = partial(prepare, choices=anchors("fixed", 256), crop_percent_thresh=0.0)


class Nothing:
    """A tokenizer that takes no time, so that what feeds it is measured."""

    name, fingerprint, device = "nothing", "0", torch.device("cpu")
    branches, codebook_sizes = ("semantic", "pixel"), (32768, 98304)

    def grid_sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        return (9, 9), (16, 16)

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(len(pixels), *size, dtype=torch.int64) for size in self.grid_sizes(256, 256))

    def decode(self, grids: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.zeros(len(grids[0]), 3, 256, 256)


def parse_args() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--images", type=int, default=400, help="distinct JPEGs of a megapixel")
    parser.add_argument("--samples", type=int, default=100, help="of a shard")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--shards", type=int, default=100, help="for peak memory, of 20 samples")
    parser.add_argument("--names", type=int, default=100_000, help="of shards, for the time to the first chunk")
    parser.add_argument("--stored_names", type=int, default=10_000, help="the same on S3, where each takes a put")
    parser.add_argument("--stored_parquets", type=int, default=1_000, help="the same of parquet files")
    return parser.parse_args()


def caption(path: Path) -> str:
    return f"Photograph {path.stem}"


def write_tar(target: Path, images: list[Path], keys: list[str]) -> None:
    with tarfile.open(target, "w") as tar:
        for path, key in zip(images, keys, strict=True):
            for suffix, content in ((".jpg", path.read_bytes()), (".txt", caption(path).encode())):
                info = tarfile.TarInfo(key + suffix)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def make_forms(base: Path, images: list[Path], samples: int) -> dict[str, dict]:
    """The same items three times: name -> entry of the metadata config without its root."""
    (base / "annotations").mkdir()
    for number, start in enumerate(range(0, len(images), samples)):
        some = images[start : start + samples]
        lines = [{"images": [path.name], "caption": caption(path)} for path in some]
        (base / "annotations" / f"{number:04}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_tar(base / f"{number:04}.tar", some, [path.stem for path in some])
        table = pa.table({"image": [path.read_bytes() for path in some], "text": [caption(path) for path in some]})
        pq.write_table(table, base / f"{number:04}.parquet", compression="none", row_group_size=64)
    return {
        "folder": {"image_dir": str(images[0].parent), "annotation_dir": str(base / "annotations")},
        "tar": {"shards": f"{base}/*.tar"},
        "parquet": {"shards": f"{base}/*.parquet"},
    }


@contextmanager
def s3() -> Iterator[Url]:
    """A bucket on moto's server."""
    from pyarrow import fs

    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert server.stdout is not None  # a pipe, as asked for
    try:
        address = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        os.environ |= {"AWS_ENDPOINT_URL": address, "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench"}
        fs.S3FileSystem(endpoint_override=address, allow_bucket_creation=True).create_dir("bench")
        yield Url("s3://bench")
    finally:
        server.kill()


def dataset(root: Location, entry: dict) -> Dataset:
    root.mkdir()
    config = root / "meta.json"
    config.write_bytes(json.dumps({"bench": {**entry, "root": str(root), "tokenizer_inference": True}}).encode())
    return read_data_config(config)[0]


def job(scratch: Location, name: str, entry: dict, count: int, turn: int, output_format: str = "jsonl") -> Rates:
    data = dataset(scratch / f"{name}-{output_format}-{turn}", entry)
    settings = Settings("fixed", 256, crop_percent_thresh=0.0, batch_size=8, output_format=output_format)
    clock = Clock()
    counts, _ = run_codebook_inference([data], Nothing(), settings, OneProcess(), num_workers=default_workers())
    if counts["bench"].done != count:
        raise SystemExit(f"{name}: only {counts['bench'].done} of {count} images were done")
    return clock.rates(count)


def webdataset_side(pattern: list[str], count: int, to_pixels: Callable[[bytes], object] | None, turn: int) -> Rates:
    """Its own reader in as many processes; `to_pixels` None: its decoder ("pilrgb"), nothing resized."""
    import webdataset

    data = webdataset.WebDataset(pattern, shardshuffle=False, empty_check=False)
    data = data.decode("pilrgb").to_tuple("jpg") if to_pixels is None else data.to_tuple("jpg").map_tuple(to_pixels)
    workers = default_workers()
    clock = Clock()
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers, collate_fn=lambda sample: 0)
    seen = sum(1 for _ in loader)
    if seen != count:
        raise SystemExit(f"webdataset: {seen} of {count} samples")
    return clock.rates(count)


def resized(content: bytes) -> np.ndarray:
    return load(NamedBytes("image", content))[0].numpy()


def bench_rates(args: argparse.Namespace, scratch: Path, bucket: Url) -> list[dict]:
    images = make_images(scratch / "images", args.images)
    base = scratch / "shards"
    base.mkdir()
    forms = make_forms(base, images, args.samples)
    tars = [str(path) for path in sorted(base.glob("*.tar"))]
    sides: dict[str, Callable[[int], Rates]]
    sides = {name: partial(job, scratch, name, entry, len(images)) for name, entry in forms.items()}
    for kind in ("tar", "parquet"):
        for path in base.glob(f"*.{kind}"):
            write_bytes(bucket / "in" / path.name, path.read_bytes())
        entry = {"shards": f"{bucket}/in/*.{kind}"}
        sides[f"{kind} on S3, output on S3"] = partial(job, bucket, f"out-{kind}", entry, len(images))
    sides["tar, codes as Arrow"] = partial(job, scratch, "arrow", forms["tar"], len(images), output_format="arrow")
    sides["webdataset, decoded and resized as ours"] = partial(webdataset_side, tars, len(images), resized)
    sides["webdataset, decoded alone"] = partial(webdataset_side, tars, len(images), None)
    rates = best_by_turns(args.turns, *sides.values())
    rows = []
    for name, rate in zip(sides, rates, strict=True):
        row = {"side": name, "images_s": round(rate.wall, 1), "of_the_folder": round(rate.wall / rates[0].wall, 2)}
        rows.append({**row, "images_cpu_s": round(rate.cpu, 1)})
    return rows


def bench_memory(args: argparse.Namespace, scratch: Path) -> dict[int, float]:
    """Number of shards -> peak MiB of the command."""
    checkpoint = scratch / "small" / "pytorch_model.bin"
    peaks: dict[int, float] = {}
    write_untrained(["--config", str(SMALL), "--out", str(checkpoint)])
    images = sorted((scratch / "images").glob("*.jpg"))[:20]
    (scratch / "many").mkdir()
    for number in range(args.shards):
        write_tar(scratch / "many" / f"{number:04}.tar", images, [f"{number}-{path.stem}" for path in images])
    for shards in (1, args.shards):
        root = scratch / f"memory-{shards}"
        entry = {"shards": f"{scratch}/many/{{0000..{shards - 1:04}}}.tar"}
        dataset(root, entry)
        command = [COMMAND, "--model_config", SMALL, "--tokenizer_checkpoint", checkpoint, "--device", "cpu"]
        command += ["--data_config", root / "meta.json", "--resolution_type", "fixed", "--resolution", 32]
        peaks[shards] = round(measure_command(command)[1])
    return peaks


def bench_names(args: argparse.Namespace, scratch: Path) -> list[float]:
    """Seconds, of wall clock and of CPU, until the first of so many shards may be read; which are links to a few."""
    folder = scratch / "names"
    folder.mkdir()
    first = next((scratch / "shards").glob("*.tar"))
    for number in range(args.names):
        name = folder / f"{number:06}.tar"
        if number % 50_000 == 0:  # a file system has a limit of links to one file
            first = Path(shutil.copy(first, name))
        else:
            os.link(first, name)
    return to_first_chunk(dataset(scratch / "many-names", {"shards": f"{folder}/{{000000..{args.names - 1:06}}}.tar"}))


def bench_stored_names(args: argparse.Namespace, scratch: Path, bucket: Url) -> dict[str, list[float]]:
    """The same of objects: empty tar files, and parquet files of which the footer is read."""
    small = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": [b"?"] * 640, "text": ["?"] * 640}), small, row_group_size=64)
    parquet = small.getvalue().to_pybytes()
    found = {}
    for kind, count, content in (("tar", args.stored_names, b""), ("parquet", args.stored_parquets, parquet)):
        names = (bucket / f"many/{number:06}.{kind}" for number in range(count))
        deque(read_ahead(partial(write_bytes, content=content), names), maxlen=0)
        data = dataset(scratch / f"many-{kind}", {"shards": f"{bucket}/many/{{000000..{count - 1:06}}}.{kind}"})
        found[f"{count} {kind}"] = to_first_chunk(data)
    return found


def to_first_chunk(data: Dataset) -> list[float]:
    clock = Clock()
    output = CodebookOutput(data, Nothing(), Settings("fixed", 256))
    with output.begin(OneProcess()), Progress(OneProcess(), None, "codes") as progress:
        sources = [file for file in output.sources if not file.was_finished]
        next(todo(sources, OneProcess(), progress))
        return [round(1 / rate, 1) for rate in clock.rates(1)]


def main() -> None:
    args = parse_args()
    report = describe_machine(torch.device("cpu")) | {"workers": default_workers()}
    with tempfile.TemporaryDirectory(prefix="vistoken-benchmark-") as folder:
        scratch = Path(folder)
        with s3() as bucket:
            rows = bench_rates(args, scratch, bucket)
            report["seconds_to_the_first_chunk_wall_cpu"] = {f"{args.names} tar": bench_names(args, scratch)}
            report["on_s3"] = bench_stored_names(args, scratch, bucket)
        report["peak_mib"] = bench_memory(args, scratch)
    print_report(report, rows, ["side", "images_s", "of_the_folder", "images_cpu_s"])


if __name__ == "__main__":
    main()
