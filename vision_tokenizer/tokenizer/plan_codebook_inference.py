"""Before codebook inference: what it will make of the data sets, how long, how much disk, and what is wrong with them.

    python vision_tokenizer/tokenizer/plan_codebook_inference.py --data_config meta.json \\
        --resolution_type fixed_anchors --images_per_second 40

Reads annotations and image headers only, by the job's own rules; neither a checkpoint nor a GPU is needed. Checks the
metadata config and every annotation line, those of data sets that need no codes too. Writes into --out_dir:
`plan.json`, `plan.png` (with `pip install 'vistoken[plot]'`) and `problems.jsonl`, a line for each thing that is wrong.

The exit code is 0 only if the run would be clean: every file and line read, every image there, every conversation by
the rules, at least one data set to encode, none written over another or into a folder that cannot be written. Items
that the crop threshold rejects are counted, not held against it. Truncated files are found; what else only decoding the
pixels can show is not.
"""

import argparse
import sys
from math import inf
from pathlib import Path

from vision_tokenizer.codebook.annotations import Dataset, needing_codes, note_left_out, read_data_config
from vision_tokenizer.images.anchors import RESOLUTION_TYPES, anchors
from vistoken.cli import run_command
from vistoken.errors import UserError

EXAMPLES = 3  # problems of a kind shown in the terminal


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_config", type=Path, required=True, help="metadata config (.json)")
    add("--datasets", nargs="+", metavar="NAME", help="only these data sets of the config")
    add("--resolution_type", choices=RESOLUTION_TYPES, default="fixed_anchors")
    add("--resolution", type=int, default=512, help="side in pixels, for `fixed`")
    add("--crop_percent_thresh", type=float, default=0.2, help="as codebook inference has it; 0 keeps all")
    add("--model_config", type=Path, help="the tokenizer's .py config, if its codebooks are not the released sizes")
    add("--images_per_second", type=float, help="speed of the whole run, to say how long it takes")
    add("--num_workers", type=int, help="processes (default: the cores, at most 16)")
    add("--out_dir", type=Path, default=Path("plan"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    for name, low in (("resolution", 16), ("num_workers", 1)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            parser.error(f"--{name} must be at least {low}, not {getattr(args, name)}")
    if not 0 <= args.crop_percent_thresh <= 1:
        parser.error(f"--crop_percent_thresh is a share from 0 to 1, not {args.crop_percent_thresh}")
    if args.images_per_second is not None and not 0 < args.images_per_second < inf:
        parser.error(f"--images_per_second must be a number above 0, not {args.images_per_second}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    datasets = read_data_config(args.data_config, args.datasets)
    note_left_out(datasets)
    surveys, errors = survey(args, datasets)

    import orjson

    from vision_tokenizer.codebook.output import Settings, check_folders, unwritable
    from vision_tokenizer.models.dualvitok.config import read_config
    from vision_tokenizer.review.plan_report import RELEASED_CODEBOOKS, Estimate, as_dict, describe, draw_ratios
    from vistoken.jobs.files import write_bytes

    codebooks = RELEASED_CODEBOOKS
    if args.model_config:
        sizes = read_config(args.model_config)
        codebooks = (sizes.semantic_quantizer.codebook_size, sizes.pixel_quantizer.codebook_size)
    estimates = {name: Estimate.of(each, codebooks, args.images_per_second) for name, each in surveys.items()}
    print(describe(surveys, estimates, args.images_per_second))
    messages = [message for each in errors.values() for message in each]
    try:
        settings = Settings(resolution_type=args.resolution_type, resolution=args.resolution)
        chosen = needing_codes(datasets, args.data_config)
        check_folders(chosen, settings)
        messages += unwritable(chosen, settings)
    except UserError as error:
        messages.append(str(error))
    plan = {
        "data_config": str(args.data_config),
        "resolution_type": args.resolution_type,
        "resolution": args.resolution,
        "crop_percent_thresh": args.crop_percent_thresh,
        "datasets": {name: as_dict(surveys[name], estimates[name], errors[name]) for name in surveys},
    }
    write_bytes(args.out_dir / "plan.json", orjson.dumps(plan, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    picture = args.out_dir / "plan.png"
    try:
        draw_ratios(picture, list(surveys.values()), anchors(args.resolution_type, args.resolution))
    except UserError as error:
        print(f"no {picture}: {error}", file=sys.stderr)
    print(f"written: {args.out_dir}/plan.json, plan.png, problems.jsonl")
    for message in messages:
        print(f"error: {message}", file=sys.stderr)
    clean = all(each.clean for each in surveys.values()) and not messages
    print("The run would be clean." if clean else "The run would not be clean; see above and problems.jsonl.")
    return 0 if clean else 1


def survey(args: argparse.Namespace, datasets: list[Dataset]) -> tuple[dict, dict]:
    """Data set name -> its survey, and -> what kept it or its files from being read. Problems go to a file as found."""
    from collections import Counter
    from dataclasses import asdict

    import orjson

    from vision_tokenizer.review.plan import Rules, Survey, survey_dataset
    from vistoken.device import default_workers
    from vistoken.jobs.counts import Problem
    from vistoken.jobs.files import atomic_write
    from vistoken.jobs.progress import bar

    surveys, errors, shown = {}, {}, Counter()
    with atomic_write(args.out_dir / "problems.jsonl") as file, bar("reading") as progress:

        def note(problem: Problem) -> None:
            file.write(orjson.dumps(asdict(problem), option=orjson.OPT_APPEND_NEWLINE))
            shown[problem.reason] += 1
            if shown[problem.reason] <= EXAMPLES and problem.kind == "failed":
                progress.write(f"{problem.file}, {problem.where}: {problem.reason}: {problem.detail}", file=sys.stderr)

        for dataset in datasets:
            rules = Rules(dataset, anchors(args.resolution_type, args.resolution), args.crop_percent_thresh)
            workers = args.num_workers or default_workers()
            try:
                surveys[dataset.name], errors[dataset.name] = survey_dataset(rules, workers, progress.update, note)
            except UserError as error:
                surveys[dataset.name], errors[dataset.name] = Survey(), [str(error)]
    return surveys, errors


if __name__ == "__main__":
    run_command(main)
