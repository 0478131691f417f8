"""How well a tokenizer reconstructs pictures: a job over a list of them, and the figures it comes to.

{out_dir}/images.jsonl          the pictures, one a line: what is evaluated
{out_dir}/per_image.jsonl       one line of figures per picture, in that order
{out_dir}/metrics.json          all figures with their definitions; report.html and report's pictures beside it
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from torch import Tensor

from vision_tokenizer.fitting.transforms import shorter_side_crop
from vision_tokenizer.images.dualvitok import denormalize, normalize, to_pixels
from vision_tokenizer.images.files import damage_named, read_image
from vision_tokenizer.models.protocol import ImageTokenizer
from vision_tokenizer.review.frechet import Moments, frechet_distance
from vision_tokenizer.review.quality import CodeUse, psnr, ssim, ssim_uniform
from vistoken.device import default_workers
from vistoken.errors import ItemError, UserError
from vistoken.files import is_text
from vistoken.jobs.chunks import Item, chunk_table
from vistoken.jobs.counts import Counts
from vistoken.jobs.files import write_bytes
from vistoken.jobs.progress import Progress, Stopwatch
from vistoken.jobs.results import Results
from vistoken.jobs.run import WORK, JoinedSource, OpenChunk, Output, todo
from vistoken.jobs.workers import Workers
from vistoken.store import Location, location

CHUNK_IMAGES = 64
DEFINITIONS = {
    "psnr": "10 log10(255^2 / mean squared error) of 8-bit RGB, dB, mean over pictures",
    "ssim": "11 x 11 Gaussian window, sigma 1.5, data range 255",
    "ssim_uniform": "7 x 7 uniform window, sample covariance, data range 1 of values in [0, 1]",
    "ssim_published": "as ssim_uniform but with data range 2, as the published evaluation has it: flatters",
    "lpips": "LPIPS 0.1 on VGG16, mean over pictures",
    "lite0_distance": "LPIPS's construction on EfficientNet-Lite0, untrained linear part: no published number is of it",
    "fid": "Frechet distance of Inception-2015-12-05 features, 2048 wide",
    "lite0_frechet": "Frechet distance of EfficientNet-Lite0's pooled features, 1280 wide: no FID",
}

Distance = Callable[[Tensor, Tensor], Tensor]  # (B, 3, H, W) twice in [-1, 1] -> (B,)
Features = Callable[[Tensor], Tensor]  # (B, 3, H, W) in [-1, 1] -> (B, C)


@dataclass(frozen=True)
class Measures:
    """What is measured beyond PSNR and SSIM, by name."""

    distances: Mapping[str, Distance]
    features: Mapping[str, Features]


class Evaluation(Output):
    """The output folder of one evaluation: a tokenizer, a list of pictures, a side."""

    def __init__(
        self, folder: Path, images: Sequence[Location], tokenizer: ImageTokenizer, settings: Mapping[str, Any]
    ):
        listed = folder / "images.jsonl"
        if strange := next((str(path) for path in images if not is_text(str(path))), None):
            raise UserError(f"not UTF-8: {strange!r}. Rename the file or folder.")
        lines = b"".join(orjson.dumps({"image": str(path)}) + b"\n" for path in images)
        if not listed.exists() or listed.read_bytes() != lines:
            write_bytes(listed, lines)
        work = folder / WORK
        table = chunk_table(listed, CHUNK_IMAGES, work / "images.json")
        self.source = JoinedSource(table, Results(work / "images"), folder / "per_image.jsonl")
        identity = {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint}
        manifest = {
            "format": "vistoken-evaluation",
            "tokenizer": identity,
            "settings": dict(settings),
            "images": table.fingerprint,
        }
        super().__init__(folder, manifest, [self.source])

    def made(self) -> list[Location]:
        return [self.folder / name for name in ("per_image.jsonl", "metrics.json", "report.html")]


def evaluate(
    output: Evaluation, tokenizer: ImageTokenizer, measures: Measures, side: int, batch_size: int, workers: Workers
) -> tuple[Counts, dict[str, Any]] | None:
    """Returns, on the first worker, the counts and all figures. A finished evaluation is read, not made again."""
    metrics = output.folder / "metrics.json"
    with output.begin(workers):
        source = output.source
        if source.was_finished and not metrics.exists():
            raise UserError(f"{metrics} is gone, and what it was made of, too: restore it, or name another --out_dir")
        with Progress(workers, source.table.items, "pictures") as progress:
            for task in todo([source], workers, progress):
                chunk = OpenChunk(replace(task, previous=None))  # one that failed in part is made anew
                evaluate_chunk(chunk, tokenizer, measures, side, batch_size, progress)
            progress.wait_for_all()
        if workers.rank:
            return None
        if not source.was_finished:
            figures = summarize(output, tokenizer)
            write_bytes(metrics, json.dumps(figures, indent=1).encode())
        return source.finish().counts, json.loads(metrics.read_text())


def evaluate_chunk(
    chunk: OpenChunk, tokenizer: ImageTokenizer, measures: Measures, side: int, batch_size: int, progress: Progress
) -> None:
    """Save what is measured on each picture, and the codes and features that figures over all of them need."""
    watch = Stopwatch()
    rows: list[dict[str, Any]] = []
    arrays: dict[str, list[np.ndarray]] = {}
    ready: list[tuple[Item, Tensor]] = []
    with ThreadPoolExecutor(default_workers()) as pool:
        opened = [(item, pool.submit(picture, location(item.value["image"]), side)) for item in chunk.todo()]
        for item, decoded in opened:
            try:
                with watch("decode"):
                    ready.append((item, decoded.result()))
            except ItemError as error:
                chunk.fail(item, error)
    for start in range(0, len(ready), batch_size):
        batch = ready[start : start + batch_size]
        with watch("tokenizer"):
            originals = torch.stack([pixels for _, pixels in batch])
            codes, others = reconstruct(tokenizer, originals, batch_size)
        with watch("measure"):
            rows += measured([item.value["image"] for item, _ in batch], originals, others, measures, tokenizer)
            keep_arrays(arrays, tokenizer, codes, originals, others, measures)
        progress.count(images=len(batch))
    stored = io.BytesIO()
    joined = {name: np.concatenate(parts) for name, parts in arrays.items()}
    np.savez(stored, **joined)  # type: ignore[arg-type]  # no array is named like its flag allow_pickle
    results, index = chunk.source.results, chunk.chunk.index
    files = {
        results.path(index, ".jsonl"): b"".join(orjson.dumps(row) + b"\n" for row in rows),
        results.path(index, ".npz"): stored.getvalue(),
    }
    chunk.save(files, tallies={}, seconds=watch.take(), progress=progress)


def picture(path: Location, side: int) -> Tensor:
    """uint8 (3, side, side), by the published validation transform. Raises `Failed`."""
    image = read_image(path)
    with damage_named(path):
        return to_pixels(shorter_side_crop(image.convert("RGB"), side))


def reconstruct(tokenizer: ImageTokenizer, pixels: Tensor, batch_size: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """uint8 (B, 3, H, W) -> codes per branch and uint8 reconstructions; every batch has `batch_size` pictures."""
    filled = torch.cat([pixels, pixels[-1:].expand(batch_size - len(pixels), -1, -1, -1)])
    grids = tokenizer.encode(normalize(filled))
    others = denormalize(tokenizer.decode(grids))
    return tuple(grid[: len(pixels)].cpu() for grid in grids), others[: len(pixels)]


def measured(
    names: Sequence[str], originals: Tensor, others: Tensor, measures: Measures, tokenizer: ImageTokenizer
) -> list[dict[str, Any]]:
    rows = [
        {
            "image": name,
            "psnr": psnr(original, other),
            "ssim": ssim(original, other),
            "ssim_uniform": ssim_uniform(original, other, 1.0),
            "ssim_published": ssim_uniform(original, other, 2.0),
        }
        for name, original, other in zip(names, originals, others, strict=True)
    ]
    x, y = (normalize(pixels).to(tokenizer.device) for pixels in (originals, others))
    for name, distance in measures.distances.items():
        with torch.no_grad():
            for row, value in zip(rows, distance(x, y).tolist(), strict=True):
                row[name] = value
    return rows


def keep_arrays(
    arrays: dict[str, list[np.ndarray]],
    tokenizer: ImageTokenizer,
    codes: tuple[Tensor, ...],
    originals: Tensor,
    others: Tensor,
    measures: Measures,
) -> None:
    for branch, grid in zip(tokenizer.branches, codes, strict=True):
        arrays.setdefault(f"codes {branch}", []).append(grid.flatten().numpy().astype(np.int32))
    for name, features in measures.features.items():
        for kind, pixels in (("originals", originals), ("others", others)):
            with torch.no_grad():
                found = features(normalize(pixels).to(tokenizer.device))
            arrays.setdefault(f"{name} {kind}", []).append(found.float().cpu().numpy())


def summarize(output: Evaluation, tokenizer: ImageTokenizer) -> dict[str, Any]:
    """All figures of a complete evaluation, merged in the order of the chunks."""
    results, chunks = output.source.results, range(len(output.source.table))
    rows = [orjson.loads(line) for _, content in results.contents(chunks, ".jsonl") for line in content.splitlines()]
    uses = {b: CodeUse(size) for b, size in zip(tokenizer.branches, tokenizer.codebook_sizes, strict=True)}
    moments: dict[str, list[Moments]] = {}
    for _, content in results.contents(chunks, ".npz"):
        with np.load(io.BytesIO(content)) as stored:
            for name in stored.files:
                kind, _, what = name.partition(" ")
                if kind == "codes":
                    uses[what].add(stored[name])
                else:
                    moments.setdefault(name, []).append(Moments.of(stored[name]))
    names = [name for name in (rows[0] if rows else {}) if name != "image"]
    finite = {name: [row[name] for row in rows if np.isfinite(row[name])] for name in names}
    figures: dict[str, Any] = {name: float(np.mean(values)) if values else None for name, values in finite.items()}
    for kind in sorted({name.partition(" ")[0] for name in moments}):
        one, other = (Moments.merged(moments[f"{kind} {which}"]) for which in ("originals", "others"))
        name = "fid" if kind == "inception" else f"{kind}_frechet"
        figures[name] = frechet_distance(one, other) if one.count > 1 else None
    return {
        "tokenizer": output.manifest["tokenizer"],
        "settings": output.manifest["settings"],
        "pictures": len(rows),
        "figures": figures,
        "codes": {
            branch: {
                "codebook": len(use.counts),
                "codes": use.total,
                "used": use.distinct,
                "used_share": 1 - use.dead_share,
                "perplexity": use.perplexity,
            }
            for branch, use in uses.items()
        },
        "definitions": {name: DEFINITIONS[name] for name in figures if name in DEFINITIONS},
    }


def per_image(folder: Path) -> list[dict[str, Any]]:
    """The lines of a finished evaluation."""
    return [orjson.loads(line) for line in (folder / "per_image.jsonl").read_bytes().splitlines()]
