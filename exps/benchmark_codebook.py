"""Measure codebook inference: the whole job, JPEG decode and JSON included, against the machine's own limits.

Physics. An encoder forward is nearly all matrix products and convolutions: 585 GFLOP for a 256 x 256 image and
2.55 TFLOP at 512 x 512 with the full model, so images/s are bounded by (matrix rate) / (FLOP per image). The matrix
rate is measured here, in the same run, since clocks and neighbours change. What keeps the job below it: element-wise
layers, which are bound by memory bandwidth, image decoding, and padding. Ratios within one run are meaningful;
seconds on another machine are not.

Weights are untrained, which changes no timing. The last line of the output is JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from measure import (
    REPO,
    Clock,
    Rates,
    best_by_turns,
    describe_machine,
    make_images,
    matrix_rate,
    measure_command,
    print_report,
)
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from vision_tokenizer.codebook.annotations import read_data_config
from vision_tokenizer.codebook.job import run_codebook_inference
from vision_tokenizer.codebook.output import Settings
from vision_tokenizer.images.anchors import anchors
from vision_tokenizer.images.dualvitok import normalize, prepare
from vision_tokenizer.models.dualvitok.config import read_config
from vision_tokenizer.models.dualvitok.model import DualViTok, load_dualvitok
from vision_tokenizer.models.dualvitok.untrained import main as write_untrained
from vistoken.cli import command_parser
from vistoken.device import default_batch_size, default_workers, local_device
from vistoken.jobs.workers import OneProcess

CONFIGS = {
    "small": REPO / "configs/example/dualvitok/dualvitok_small.py",
    "full": REPO / "configs/example/dualvitok/dualvitok_anyres_max512.py",
}
COMMAND = REPO / "vision_tokenizer/tokenizer/tokenizer_codebook_inference.py"
MODES = {"fixed 256": ("fixed", 256), "anchors": ("fixed_anchors", 512)}


def parse_args() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch_size", type=int, help="default: the command's")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--images_small", type=int, default=128)
    parser.add_argument("--images_full", type=int, default=16, help="at 256; a quarter of it at the anchors")
    parser.add_argument("--lines", nargs="+", type=int, default=[1_000, 200_000], help="input sizes for peak memory")
    parser.add_argument("--skip_memory", action="store_true")
    return parser.parse_args()


def flop_per_image(config: Path, height: int, width: int) -> int:
    """Of encoding, counted by torch on the meta device."""
    with torch.device("meta"):
        model = DualViTok(read_config(config), decoder=False)
        pixels = torch.empty(1, 3, height, width)
        with FlopCounterMode(display=False) as counter:
            model.semantic_features(pixels)
            model.pixel_features(pixels)
    return counter.get_total_flops()


def write_dataset(base: Path, images: Path, lines: list[list[str]]) -> Path:
    (base / "annotations").mkdir(parents=True)
    with (base / "annotations" / "0000.jsonl").open("w") as file:
        file.writelines(json.dumps({"images": names}) + "\n" for names in lines)
    entry = {"root": str(base), "image_dir": str(images), "annotation_dir": str(base / "annotations")}
    (base / "meta.json").write_text(json.dumps({"bench": {**entry, "tokenizer_inference": True}}))
    return base / "meta.json"


def one_by_one(model: DualViTok, images: list[Path], kind: str, resolution: int) -> Rates:
    """A plain loop: read, resize, encode a batch of one, collect the codes."""
    clock = Clock()
    for path in images:
        pixels, _ = prepare(path, anchors(kind, resolution), 0.2)
        codes = model.encode(normalize(pixels[None].to(model.device)))
        json.dumps([grid.tolist() for grid in codes])
    return clock.rates(len(images))


def run_job(model: DualViTok, settings: Settings, images: list[Path], scratch: Path, seconds: dict) -> Rates:
    """The whole job. `seconds` is told by stage where the time went, of the last turn."""
    base = scratch / f"job-{time.monotonic_ns()}"
    data_config = write_dataset(base, images[0].parent, [[path.name] for path in images])
    clock = Clock()
    counts, _ = run_codebook_inference(
        read_data_config(data_config), model, settings, OneProcess(), num_workers=default_workers()
    )
    rates = clock.rates(len(images))
    if counts["bench"].done != len(images):
        raise SystemExit(f"only {counts['bench'].done} of {len(images)} images were encoded")
    seconds.update(counts["bench"].seconds)
    return rates


def bench_mode(model: DualViTok, config: Path, mode: str, args: argparse.Namespace, count: int, scratch: Path) -> dict:
    """The job and the plain loop on the same images with the same model, and the matrix rate around them."""
    kind, resolution = MODES[mode]
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(model.dtype, "tf32" if model.tf32 else "fp32")
    ratio = 1.0 if kind == "fixed" else 1.5
    images = scratch / f"images-{ratio}-{count}"
    if not images.exists():
        make_images(images, count, ratio)
    files = sorted(images.glob("*.jpg"))
    settings = Settings(kind, resolution, batch_size=args.batch_size, torch_dtype=dtype)
    pixels, _ = prepare(files[0], anchors(kind, resolution), 0.2)
    warm = normalize(pixels[None]).repeat(args.batch_size, 1, 1, 1)
    model.encode(warm.to(model.device))
    model.encode(warm[:1].to(model.device))
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    rate = matrix_rate(model.device, dtype)
    seconds: dict[str, float] = {}
    (job, _), (loop, _), (matrix, _) = best_by_turns(
        args.turns,
        lambda turn: run_job(model, settings, files, scratch, seconds),
        lambda turn: one_by_one(model, files[: max(4, count // 4)], kind, resolution),
        lambda turn: Rates(matrix_rate(model.device, dtype), 0),
    )
    rate, flop = max(rate, matrix), flop_per_image(config, *pixels.shape[1:])
    return {
        "mode": f"{mode} ({pixels.shape[1]} x {pixels.shape[2]})",
        "dtype": dtype,
        "images": count,
        "job_images_s": round(job, 3),
        "one_by_one_images_s": round(loop, 3),
        "ratio": round(job / loop, 2),
        "gflop_per_image": round(flop / 1e9),
        "matrix_gflop_s": round(rate / 1e9),
        "share_of_matrix_rate": round(job * flop / rate, 3),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def agreement(models: dict[str, DualViTok], images: list[Path], kind: str, resolution: int) -> dict[str, dict]:
    """Share of codes of each dtype that equal fp32's, per branch."""
    load = partial(prepare, choices=anchors(kind, resolution), crop_percent_thresh=0.2)
    equal: dict[str, dict] = {}
    for path in images:
        pixels = normalize(load(path)[0][None])
        codes = {dtype: model.encode(pixels.to(model.device)) for dtype, model in models.items()}
        for dtype in codes.keys() - {"fp32"}:
            for branch, ours, exact in zip(DualViTok.branches, codes[dtype], codes["fp32"], strict=True):
                shares = equal.setdefault(dtype, {}).setdefault(branch, [])
                shares.append((ours == exact).float().mean().item())
    return {d: {b: round(sum(s) / len(s), 4) for b, s in branches.items()} for d, branches in equal.items()}


def bench_process(checkpoint: Path, args: argparse.Namespace, scratch: Path) -> dict:
    """Start-up and peak memory of the command itself with the small model, few images named by many lines."""
    images = scratch / "thumbnails"
    images.mkdir()
    for path in make_images(scratch / "large", 3):
        Image.open(path).resize((64, 64)).save(images / path.name)
    names = sorted(path.name for path in images.iterdir())
    common = ["--model_config", str(CONFIGS["small"]), "--tokenizer_checkpoint", str(checkpoint), "--device", "cpu"]
    common += ["--resolution_type", "fixed", "--resolution", "32"]
    peaks: dict[int, int] = {}
    result = {"help_seconds": round(measure_command([str(COMMAND), "--help"])[0], 2), "peak_mib": peaks}
    first = write_dataset(scratch / "first", images, [[names[0]]])
    result["one_image_seconds"] = round(measure_command([str(COMMAND), *common, "--data_config", str(first)])[0], 1)
    for lines in [] if args.skip_memory else args.lines:
        data = write_dataset(scratch / f"lines-{lines}", images, [[names[n % len(names)]] for n in range(lines)])
        peaks[lines] = round(measure_command([str(COMMAND), *common, "--data_config", str(data)])[1])
    return result


def main() -> None:
    args = parse_args()
    device = local_device(args.device)
    args.batch_size = args.batch_size or default_batch_size(device)
    rows, report = [], describe_machine(device)
    with tempfile.TemporaryDirectory(prefix="vistoken-benchmark-") as folder:
        scratch = Path(folder)
        for name in args.models:
            config, checkpoint = CONFIGS[name], scratch / name / "pytorch_model.bin"
            write_untrained(["--config", str(config), "--out", str(checkpoint)])
            models = {dtype: load_dualvitok(config, checkpoint, device=device, dtype=dtype) for dtype in args.dtypes}
            for model in models.values():
                for mode in MODES:
                    whole = args.images_small if name == "small" else args.images_full
                    count = whole if mode == "fixed 256" else max(4, args.batch_size, whole // 4)
                    rows.append({"model": name, **bench_mode(model, config, mode, args, count, scratch)})
                    print(json.dumps(rows[-1]), file=sys.stderr)
            if "fp32" in models:
                files = sorted(next(scratch.glob("images-1.0-*")).iterdir())[:8]
                report[f"agreement_with_fp32_{name}_256"] = agreement(models, files, "fixed", 256)
            del models
        small = scratch / "small" / "pytorch_model.bin"
        if small.exists():
            report["process"] = bench_process(small, args, scratch)
    shown = ["model", "mode", "dtype", "images", "job_images_s", "one_by_one_images_s", "ratio", "share_of_matrix_rate"]
    print_report(report, rows, shown)


if __name__ == "__main__":
    main()
