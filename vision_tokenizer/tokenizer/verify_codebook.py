"""After codebook inference: is everything there, and are the codes right?

    python vision_tokenizer/tokenizer/verify_codebook.py --data_config meta.json --resolution_type fixed_anchors \\
        --model_config C.py --tokenizer_checkpoint pytorch_model.bin --sample 100

Every annotation must have its line or its entry in `*.rejected.jsonl`; shapes, code ranges, anchors, statistics,
summary and manifest must agree. Then `--sample` images, drawn from all data sets, are encoded again, one at a time in
fp32. The report says which share of the codes is equal and, where one differs, how near the tie was. Without
`--tokenizer_checkpoint` no image is encoded.

Writes nothing. One process, on a GPU if there is one (`--device cpu` if not).
"""

import argparse
from typing import TYPE_CHECKING

from vision_tokenizer.codebook.annotations import select_datasets
from vision_tokenizer.tokenizer.flags import add_output, add_tokenizer, check_tokenizer_files, load_named
from vistoken.cli import add_sample, command_parser, run_command, settings_of

if TYPE_CHECKING:
    from vision_tokenizer.codebook.read import Output, Place
    from vision_tokenizer.models.dualvitok.model import DualViTok
    from vision_tokenizer.review.issues import Issues, Reservoir


def open_outputs(args: argparse.Namespace) -> "list[Output]":
    """The output that the flags of `add_output` name, of every data set."""
    from vision_tokenizer.codebook.output import Settings
    from vision_tokenizer.codebook.read import open_output

    where = settings_of(Settings, args)
    return [open_output(dataset, where) for dataset in select_datasets(args.data_config, args.datasets)]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add_output(parser.add_argument_group("data"))
    add_tokenizer(parser, required=False)
    add_sample(parser, "images to encode again", default=100, low=0)
    args = parser.parse_args(argv)
    check_tokenizer_files(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    outputs = open_outputs(args)

    from vision_tokenizer.codebook.read import Place
    from vision_tokenizer.review.issues import Issues, Reservoir
    from vision_tokenizer.review.verify import verify_output
    from vistoken.jobs.counts import counts_table
    from vistoken.jobs.progress import bar

    tokenizer = None
    if args.tokenizer_checkpoint is not None:  # first: a wrong path should not come to light after millions of lines
        tokenizer = load_named(args, decoder=False)
    issues, sample = Issues(), Reservoir[Place](args.sample if tokenizer else 0, args.seed)
    counts = {}
    with bar("reading") as progress:
        for output in outputs:
            counts[output.dataset.name] = verify_output(output, sample, issues, progress.update)
    print(counts_table(counts))
    print(f"{sum(n.tallies['images'] for n in counts.values()):,} images with codes")
    if tokenizer:
        encode_again(tokenizer, args.tokenizer_checkpoint, outputs, sample, issues)
    else:
        print("no image was encoded again: that needs --model_config and --tokenizer_checkpoint")
    print(f"\n{issues}")
    return 1 if issues.counts else 0


def encode_again(
    tokenizer: "DualViTok", checkpoint: str, outputs: "list[Output]", sample: "Reservoir[Place]", issues: "Issues"
) -> None:
    from vision_tokenizer.review.reencode import reencode

    for output in outputs:
        if output.fingerprint != tokenizer.fingerprint:
            found = f"{checkpoint} is {tokenizer.fingerprint}"
            issues.add("another tokenizer", f"{output.folder} was made with {output.fingerprint}, {found}")
    places = [place for place in sample.drawn if place.output.fingerprint == tokenizer.fingerprint]
    print(f"{len(places):,} images encoded again, one at a time in fp32:")
    for branch, agreement in reencode(tokenizer, places, issues).items():
        print(f"  {branch}: {agreement}")


if __name__ == "__main__":
    run_command(main)
