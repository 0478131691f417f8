"""Measure updates of a tokenizer's training against the machine's matrix rate, and its evaluation against a plain loop.

    python exps/benchmark_tokenizer_training.py --models small
    python exps/benchmark_tokenizer_training.py --device cuda --models full --losses published --batch_sizes 8 32 64

Physics. An update is nearly all matrix products and convolutions, so images/s are bounded by (matrix rate) / (FLOP per
image). torch counts the FLOPs of the first update, which is not timed; the matrix rate is measured in the same process.
On a CPU both are taken by this process's CPU seconds, which other processes disturb least; wall clock stands beside
them. Pictures are drawn and ready: what decoding takes is not in it. Every case is a process of its own, whose peak is
the memory told; on a GPU that is what tensors took.

Losses: `pixels` (no LPIPS, no discriminator), `gan` (with the discriminator), `published` (and with LPIPS). All weights
are drawn, which changes no timing. The last line of the output is JSON.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from measure import REPO, Clock, Rates, best_by_turns, describe_machine, make_images, matrix_rate, print_report
from torch.utils.flop_counter import FlopCounterMode

from vision_tokenizer.fitting.config import read_settings
from vision_tokenizer.fitting.perceptual import Lpips
from vision_tokenizer.fitting.run import make_updater
from vision_tokenizer.fitting.update import Updater
from vision_tokenizer.images.dualvitok import normalize
from vision_tokenizer.review.evaluate import Evaluation, evaluate, keep_arrays, measured, picture, reconstruct
from vision_tokenizer.review.frechet import Moments, frechet_distance
from vision_tokenizer.tokenizer import evaluate_tokenizer
from vistoken.cli import OK, add_device, at_least, command_parser, run_command
from vistoken.device import float32_products, keep_freed_memory, local_device
from vistoken.jobs.workers import OneProcess

CONFIGS = {
    "small": REPO / "configs/example/dualvitok/dualvitok_small.py",
    "full": REPO / "configs/example/dualvitok/dualvitok_fix256.py",
}
DISCRIMINATOR_WEIGHT = {"pixels": 0.0, "gan": 0.5, "published": 0.5}


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="*", choices=CONFIGS, default=list(CONFIGS), help="whose training is measured")
    add("--losses", nargs="+", choices=DISCRIMINATOR_WEIGHT, default=["pixels", "gan"])
    add("--precisions", nargs="+", choices=("none", "bf16", "fp16"), default=["none", "bf16"], help="mixed_precision")
    add("--batch_sizes", nargs="+", type=at_least(1), help="default: the small config's own; 1 of the full model")
    add("--side", type=at_least(16), help="of the pictures (default: the config's)")
    add("--updates", type=at_least(1), help="that are timed (default: 10 of the small model, 2 of the full one)")
    add("--compile", action="store_true", help="compile the convolutional parts, as the command's --compile=True")
    add("--pictures", type=int, default=64, help="to evaluate; 0 leaves the evaluation out")
    add("--turns", type=at_least(1), default=2, help="of evaluation and plain loop")
    add_device(parser)
    args = parser.parse_args(argv)
    device = local_device(args.device)
    rows = []
    for model in args.models:
        for losses in args.losses:
            for precision in args.precisions:
                for batch in args.batch_sizes or [8 if model == "small" else 1]:
                    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                        case = process.submit(measure_updates, model, losses, precision, batch, args)
                        rows.append(case.result())
                    print(json.dumps(rows[-1]), file=sys.stderr)
    report = describe_machine(device) | {"threads": torch.get_num_threads(), "compile": args.compile}
    if args.pictures:
        report["evaluation"] = measure_evaluation(args)
    shown = [
        "model",
        "losses",
        "precision",
        "batch",
        "side",
        "images/s",
        "images per s of CPU",
        "of the matrix rate",
        "GiB",
    ]
    print_report(report, rows, shown)
    return OK


def measure_updates(model: str, losses: str, precision: str, batch: int, args: argparse.Namespace) -> dict:
    """In a process of its own."""
    device = local_device(args.device)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        keep_freed_memory()
    dtype = ("tf32" if on_gpu else "fp32") if precision == "none" else precision
    clock = time.perf_counter if on_gpu else time.process_time
    rate = matrix_rate(device, dtype, clock)
    fit, side = open_updater(model, losses, precision, args, device)
    pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8).to(device)
    updates = args.updates or (10 if model == "small" else 2)
    with float32_products(tf32=True):
        with FlopCounterMode(display=False) as counter:
            fit.update([normalize(pixels)], lr=1e-5)
        if on_gpu:
            torch.cuda.synchronize()
        began = Clock()
        for _ in range(updates):
            fit.update([normalize(pixels)], lr=1e-5)
        if on_gpu:
            torch.cuda.synchronize()
        rates = began.rates(updates * batch)
    rate = max(rate, matrix_rate(device, dtype, clock))
    flop = counter.get_total_flops() / batch
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "model": model,
        "losses": losses,
        "precision": precision,
        "batch": batch,
        "side": side,
        "images/s": round(rates.wall, 4),
        "images per s of CPU": round(rates.cpu, 4),
        "GFLOP per image": round(flop / 1e9, 1),
        "matrix GFLOP/s": round(rate / 1e9),
        "of the matrix rate": round((rates.wall if on_gpu else rates.cpu) * flop / rate, 3),
        "GiB": round(peak / 2**30, 2),
    }


def open_updater(
    model: str, losses: str, precision: str, args: argparse.Namespace, device: torch.device
) -> tuple[Updater, int]:
    """What the training command makes of the config, and the side of its pictures."""
    overrides = [
        "--vit_checkpoint=random",
        "--vq_loss.perceptual_weight=0",
        f"--vq_loss.disc_weight={DISCRIMINATOR_WEIGHT[losses]}",
        "--vq_loss.disc_start=1",
        f"--mixed_precision={precision}",
        f"--compile={args.compile}",
    ]
    settings, _ = read_settings(CONFIGS[model], overrides)
    fit = make_updater(settings, device)
    if losses == "published":
        fit.perceptual = Lpips().to(device)  # as much arithmetic as with its real weights
        fit.losses = replace(fit.losses, perceptual_weight=1.0)
    return fit, args.side or settings.data_args.resolution


def measure_evaluation(args: argparse.Namespace) -> dict:
    """The built-in tokenizer, evaluated by the job and picture by picture: the same figures, by turns."""
    with tempfile.TemporaryDirectory(prefix="vistoken-benchmark-") as folder:
        scratch = Path(folder)
        images = make_images(scratch / "pictures", args.pictures)
        given = ["--images", str(scratch / "pictures"), "--out_dir", str(scratch), "--device", args.device]
        command = evaluate_tokenizer.parse_args(given)
        tokenizer, measures = evaluate_tokenizer.open_tokenizer(command), evaluate_tokenizer.open_measures(command)

        def job(turn: int) -> Rates:
            clock = Clock()
            output = Evaluation(scratch / str(turn), images, tokenizer, {})
            if evaluate(output, tokenizer, measures, command.side, command.batch_size, OneProcess()) is None:
                raise SystemExit("the evaluation has no result")
            return clock.rates(len(images))

        def one_by_one(turn: int) -> Rates:
            clock = Clock()
            arrays: dict[str, list[np.ndarray]] = {}
            for path in images:
                pixels = picture(path, command.side)[None]
                codes, others = reconstruct(tokenizer, pixels, 1)
                measured([str(path)], pixels, others, measures, tokenizer)
                keep_arrays(arrays, tokenizer, codes, pixels, others, measures)
            for name in measures.features:
                kinds = (np.concatenate(arrays[f"{name} {kind}"]) for kind in ("originals", "others"))
                frechet_distance(*map(Moments.of, kinds))
            return clock.rates(len(images))

        (ours, our_cpu), (loop, loop_cpu) = best_by_turns(args.turns, job, one_by_one)
    return {
        "pictures": args.pictures,
        "batch": command.batch_size,
        "figures": sorted([*measures.distances, *measures.features]),
        "job_images_s": round(ours, 2),
        "one_by_one_images_s": round(loop, 2),
        "ratio": round(ours / loop, 2),
        "job_images_per_s_of_cpu": round(our_cpu, 2),
        "ratio_of_cpu_time": round(our_cpu / loop_cpu, 2),
    }


if __name__ == "__main__":
    run_command(main)
