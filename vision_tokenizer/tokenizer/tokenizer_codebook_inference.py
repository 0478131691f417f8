"""Codebook inference: the images of annotated data sets become DualViTok codes.

One process, on a GPU if there is one:
    python tokenizer/tokenizer_codebook_inference.py --model_config C.py --tokenizer_checkpoint pytorch_model.bin \\
        --data_config meta.json --resolution_type fixed --resolution 256
Eight GPUs, or more machines with one shared folder (`--nnodes 4 --rdzv_backend c10d --rdzv_endpoint host:29500`):
    torchrun --nproc_per_node=8 tokenizer/tokenizer_codebook_inference.py ...
Without a GPU: add `--device cpu`.

Stop it whenever you like: the same command, with any number of processes, goes on from there. The exit code is 0 if
every annotation file was read and at most `--max_failed` of a data set's items failed, 1 if not, 2 for a mistake in the
call.
"""

import argparse
from pathlib import Path

from vision_tokenizer.codebook.annotations import note_left_out, select_datasets
from vision_tokenizer.images.anchors import RESOLUTION_TYPES
from vistoken.cli import note, run_command

DTYPES = ("fp32", "tf32", "bf16", "fp16")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("tokenizer")
    model.add_argument("--model_config", type=Path, required=True, help="the tokenizer's .py config (code: it is run)")
    model.add_argument("--tokenizer_checkpoint", required=True, help=".bin, .pt, .safetensors, a folder or a hub id")
    model.add_argument("--use-ema", action="store_true", help="take the checkpoint's `ema` weights")
    model.add_argument("--torch_dtype", choices=DTYPES, default="fp32", help="fp32 is IEEE; the others are faster")
    model.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    model.add_argument("--compile", action="store_true", help="torch.compile the encoder")
    data = parser.add_argument_group("data")
    data.add_argument("--data_config", type=Path, required=True, help="metadata config (.json)")
    data.add_argument("--datasets", nargs="+", metavar="NAME", help="only these data sets of the config")
    data.add_argument("--resolution_type", choices=RESOLUTION_TYPES, default="fixed_anchors")
    data.add_argument("--resolution", type=int, default=512, help="side in pixels, for `fixed`")
    data.add_argument(
        "--crop_percent_thresh",
        type=float,
        default=0.2,
        help="reject items with an image that loses a larger share to the crop; 0 keeps all",
    )
    data.add_argument("--tokenizer_version", default="dualvitok", help="name of the output folder")
    data.add_argument("--output_dirname", default="jsonl_after_tokenizer", help="name of the folder around it")
    job = parser.add_argument_group("job")
    job.add_argument("--batch_size", type=int, help="images per batch (default: 1 on CPU, 32 on a GPU)")
    job.add_argument(
        "--num_workers", type=int, help="decoding threads (default: this process's share of the cores, at most 16)"
    )
    job.add_argument("--max_failed", type=float, default=0.01, help="share of failed items up to which we exit with 0")
    job.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on from what is there")
    job.add_argument("--overwrite", action="store_true", help="begin anew even if other settings made what is there")
    args = parser.parse_args(argv)
    for name, low in (("resolution", 16), ("batch_size", 1), ("num_workers", 1)):
        value = getattr(args, name)
        if value is not None and value < low:
            parser.error(f"--{name} must be at least {low}, not {value}")
    for name in ("crop_percent_thresh", "max_failed"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} is a share from 0 to 1, not {getattr(args, name)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    datasets = select_datasets(args.data_config, args.datasets)
    note_left_out(datasets)

    from vision_tokenizer.codebook.job import report, run_codebook_inference
    from vision_tokenizer.codebook.output import Settings
    from vision_tokenizer.models.dualvitok.model import load_dualvitok
    from vistoken.device import default_batch_size, default_workers, local_device
    from vistoken.jobs.workers import crew

    device = local_device(args.device)
    settings = Settings(
        resolution_type=args.resolution_type,
        resolution=args.resolution,
        crop_percent_thresh=args.crop_percent_thresh,
        torch_dtype=args.torch_dtype,
        batch_size=args.batch_size or default_batch_size(device),
        compile=args.compile,
        tokenizer_version=args.tokenizer_version,
        output_dirname=args.output_dirname,
    )
    tokenizer = load_dualvitok(
        args.model_config,
        args.tokenizer_checkpoint,
        device=device,
        dtype=args.torch_dtype,
        use_ema=args.use_ema,
        decoder=False,
        compile=args.compile,
    )
    claims = crew()
    accounts, errors = run_codebook_inference(
        datasets,
        tokenizer,
        settings,
        claims,
        num_workers=args.num_workers or default_workers(),
        restart="any" if args.overwrite else None if args.resume else "same",
    )
    if claims.rank != 0:
        return 0
    print(report(datasets, settings, accounts, errors))
    too_many = [name for name, account in accounts.items() if account.failed_share > args.max_failed]
    if too_many:
        note(f"more than --max_failed {args.max_failed:g} of the items failed: {', '.join(too_many)}")
    return 1 if errors or too_many else 0


if __name__ == "__main__":
    run_command(main, resumes=True)
