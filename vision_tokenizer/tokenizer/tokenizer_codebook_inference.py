"""Codebook inference: the images of annotated data sets become DualViTok codes.

One process, on a GPU if there is one:
    python tokenizer/tokenizer_codebook_inference.py --model_config C.py --tokenizer_checkpoint pytorch_model.bin \\
        --data_config meta.json --resolution_type fixed --resolution 256
Eight GPUs, or more machines with one shared folder (`--nnodes 4 --rdzv_backend c10d --rdzv_endpoint host:29500`):
    torchrun --nproc_per_node=8 tokenizer/tokenizer_codebook_inference.py ...
Without a GPU: add `--device cpu`.

Stop it whenever you like: the same command, with any number of processes, goes on from there. The exit code is 0 if
every annotation file was read and at most `--max_failed` of a data set's items failed.
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from vision_tokenizer.codebook.annotations import note_left_out, select_datasets
from vision_tokenizer.tokenizer.flags import add_crop, add_output, add_tokenizer, load_named, note_resolution
from vistoken.cli import (
    BAD_CALL,
    BAD_DATA,
    OK,
    Outcome,
    add_batches,
    add_dtype,
    add_max_failed,
    add_other_devices,
    add_speed,
    add_workers,
    check_workers,
    command_parser,
    run_command,
    settings_of,
)

if TYPE_CHECKING:
    from vistoken.jobs.workers import Workers


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    model = add_tokenizer(parser, required=True)
    add_dtype(model)
    add_speed(model)
    data = parser.add_argument_group("data")
    add_output(data)
    add_crop(data)
    data.add_argument(
        "--output_format", choices=("jsonl", "arrow"), default="jsonl", help="arrow: smaller, and read faster"
    )
    job = parser.add_argument_group("job")
    add_batches(job)
    add_max_failed(job)
    add_other_devices(job)
    job.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on from what is there")
    job.add_argument("--overwrite", action="store_true", help="begin anew even if other settings made what is there")
    add_workers(job)
    args = parser.parse_args(argv)
    check_workers(args, parser)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    from vistoken.jobs.workers import run_job

    return run_job(run, "vision_tokenizer.tokenizer.tokenizer_codebook_inference", args, "codes")


def run(args: argparse.Namespace, make_workers: "Callable[[], Workers]") -> Outcome:
    """The job as one of its workers."""
    note_resolution(args)
    datasets = select_datasets(args.data_config, args.datasets)
    note_left_out(datasets)

    from vision_tokenizer.codebook.graphs import check_graphs
    from vision_tokenizer.codebook.job import report, run_codebook_inference
    from vision_tokenizer.codebook.output import Settings
    from vistoken.device import default_batch_size, default_workers, local_device

    device = local_device(args.device)
    check_graphs(args.cuda_graphs, device)
    args.batch_size = args.batch_size or default_batch_size(device)
    settings = settings_of(Settings, args)
    tokenizer = load_named(args, dtype=args.torch_dtype, decoder=False, compile=args.compile)
    workers = make_workers()
    counts, unreadable = run_codebook_inference(
        datasets,
        tokenizer,
        settings,
        workers,
        num_workers=args.num_workers or default_workers(),
        restart="any" if args.overwrite else None if args.resume else "same",
        other_devices=args.allow_other_devices,
    )
    if workers.waits and workers.rank != 0:
        return Outcome()
    too_many = [name for name, of_dataset in counts.items() if of_dataset.failed_share > args.max_failed]
    warning = f"more than --max_failed {args.max_failed:g} of the items failed: {', '.join(too_many)}"
    code = BAD_DATA if unreadable or too_many else OK
    if unreadable and not counts and workers.waits:
        code = BAD_CALL  # nothing was done: the config names no data set that can be read
    return Outcome(report(datasets, settings, counts, unreadable), warning if too_many else "", code)


if __name__ == "__main__":
    run_command(main, resumes=True)
