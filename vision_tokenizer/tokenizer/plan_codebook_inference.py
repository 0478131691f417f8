"""Before codebook inference: what it will write, how long it will take, and what is wrong with the data.

    python vision_tokenizer/tokenizer/plan_codebook_inference.py --data_config meta.json \\
        --resolution_type fixed_anchors --images_per_second 40

Reads annotations and image headers, with the job's own rules, and needs neither a checkpoint nor a GPU. A few images
are decoded to say how many cores keep a GPU busy. Checks the metadata config and every annotation line, also of data
sets that need no codes. Writes into --out_dir: `plan.json`, `plan.png` (with `pip install 'vistoken[plot]'`) and
`problems.jsonl`, a line for each thing that is wrong.

The exit code is 0 only if the run would be clean. It is 1 if a file or line cannot be read, an image is missing, or a
conversation breaks the rules; 2 if no data set needs codes, two would be written to one place, or the place cannot be
written to. Items that the crop threshold rejects do not count as wrong; the last lines say how many other thresholds
would reject. Truncated files are found; other damage to the pixels shows only in the run.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vision_tokenizer.codebook.annotations import Dataset, needing_codes, note_left_out, read_data_config
from vision_tokenizer.images.anchors import anchors
from vision_tokenizer.tokenizer.flags import add_crop, add_output, note_resolution
from vistoken.cli import (
    BAD_CALL,
    BAD_DATA,
    MAX_WORKERS,
    OK,
    above_zero,
    at_least,
    command_parser,
    run_command,
    settings_of,
)
from vistoken.errors import UserError
from vistoken.store import location

if TYPE_CHECKING:
    from vision_tokenizer.review.plan import Survey
    from vision_tokenizer.review.plan_report import Estimate

EXAMPLES = 3  # problems of a kind shown in the terminal


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add_output(parser)
    add_crop(parser)
    add = parser.add_argument
    add("--model_config", type=location, help="the tokenizer's .py config (default: codebooks of the released sizes)")
    add("--images_per_second", type=above_zero, help="speed of the whole run, to say how long it takes (default: none)")
    add("--num_workers", type=at_least(1), help=f"processes (default: the cores, at most {MAX_WORKERS})")
    add("--out_dir", type=location, default=Path("plan"), help="folder to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    note_resolution(args)
    datasets = read_data_config(args.data_config, args.datasets)
    note_left_out(datasets)
    surveys, errors, refused = survey(args, datasets)

    from vision_tokenizer.codebook.output import Settings, check_folders, unwritable
    from vision_tokenizer.models.dualvitok.config import read_config
    from vision_tokenizer.review.plan_report import (
        RELEASED_CODEBOOKS,
        Estimate,
        crop_verdict,
        decoding,
        decoding_line,
        describe,
    )

    codebooks = RELEASED_CODEBOOKS
    if args.model_config:
        sizes = read_config(args.model_config)
        codebooks = (sizes.semantic_quantizer.codebook_size, sizes.pixel_quantizer.codebook_size)
    estimates = {name: Estimate.of(each, codebooks, args.images_per_second) for name, each in surveys.items()}
    print(describe(surveys, estimates, args.images_per_second))
    if decoded := decoding(surveys.values()):
        print(decoding_line(decoded))
    try:
        settings = settings_of(Settings, args)
        chosen = needing_codes(datasets, args.data_config)
        check_folders(chosen, settings)
        refused += unwritable(chosen, settings)
    except UserError as error:
        refused.append(str(error))
    write_plan(args, surveys, estimates, errors, decoded)
    print(f"written: {args.out_dir}/plan.json, plan.png, problems.jsonl")
    unread = [message for each in errors.values() for message in each]
    for message in dict.fromkeys([*unread, *refused]):
        print(f"error: {message}", file=sys.stderr)
    clean = all(each.clean for each in surveys.values()) and not unread
    code = BAD_CALL if refused else OK if clean else BAD_DATA
    if verdict := crop_verdict(surveys.values(), args.crop_percent_thresh):
        print(verdict)
    print("The run would not be clean; see above and problems.jsonl." if code else "The run would be clean.")
    return code


def write_plan(
    args: argparse.Namespace,
    surveys: "dict[str, Survey]",
    estimates: "dict[str, Estimate]",
    errors: dict[str, list[str]],
    decoded: dict[str, float] | None,
) -> None:
    """plan.json, and plan.png where matplotlib is there."""
    from vision_tokenizer.review.plan_report import as_dict, draw_ratios
    from vistoken.jobs.files import write_json

    plan = {
        "data_config": str(args.data_config),
        "resolution_type": args.resolution_type,
        "resolution": args.resolution,
        "crop_percent_thresh": args.crop_percent_thresh,
        "exif_orientation": args.exif_orientation,
        "decoding": decoded,
        "datasets": {name: as_dict(surveys[name], estimates[name], errors[name]) for name in surveys},
    }
    write_json(args.out_dir / "plan.json", plan)
    picture = args.out_dir / "plan.png"
    try:
        draw_ratios(picture, list(surveys.values()), anchors(args.resolution_type, args.resolution))
    except UserError as error:
        print(f"no {picture}: {error}", file=sys.stderr)


def survey(
    args: argparse.Namespace, datasets: list[Dataset]
) -> "tuple[dict[str, Survey], dict[str, list[str]], list[str]]":
    """Data set name -> its survey, and -> why files of it cannot be read; and what is wrong with the config.

    Problems go to a file as they are found.
    """
    from collections import Counter
    from dataclasses import asdict

    import orjson

    from vision_tokenizer.review.plan import Rules, Survey, survey_dataset
    from vistoken.device import default_workers
    from vistoken.jobs.counts import Problem
    from vistoken.jobs.files import atomic_write
    from vistoken.jobs.progress import bar

    surveys, errors, refused = {}, {}, []
    shown: Counter[str] = Counter()
    with atomic_write(args.out_dir / "problems.jsonl") as file, bar("reading") as progress:

        def note(problem: Problem) -> None:
            file.write(orjson.dumps(asdict(problem), option=orjson.OPT_APPEND_NEWLINE))
            shown[problem.reason] += 1
            if shown[problem.reason] <= EXAMPLES and problem.kind == "failed":
                progress.write(f"{problem.file}, {problem.where}: {problem.reason}: {problem.detail}", file=sys.stderr)

        for dataset in datasets:
            choices = anchors(args.resolution_type, args.resolution)
            rules = Rules(dataset, choices, args.crop_percent_thresh, args.exif_orientation)
            workers = args.num_workers or default_workers()
            try:
                surveys[dataset.name], errors[dataset.name] = survey_dataset(rules, workers, progress.update, note)
            except UserError as error:
                surveys[dataset.name], errors[dataset.name] = Survey(), [str(error)]
                refused.append(str(error))
    return surveys, errors, refused


if __name__ == "__main__":
    run_command(main)
