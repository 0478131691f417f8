"""Look at the output of codebook inference: images beside what their codes decode to, and how the codes are used.

    python vision_tokenizer/tokenizer/preview_codes.py --data_config meta.json --resolution_type fixed_anchors \\
        --model_config C.py --tokenizer_checkpoint pytorch_model.bin --sample 24 --out_dir preview

Writes `report.html`, one file that needs no network, and `contact_sheet.png` for terminals that show pictures. It
counts all lines, and decodes `--sample` images, drawn from all data sets, one at a time in fp32. One process, on a GPU
if there is one (`--device cpu` if not).
"""

import argparse
from pathlib import Path

from vision_tokenizer.tokenizer.flags import add_output, add_tokenizer, load_named
from vision_tokenizer.tokenizer.verify_codebook import open_outputs
from vistoken.cli import add_sample, command_parser, run_command
from vistoken.errors import UserError
from vistoken.jobs.counts import SUMMARY
from vistoken.store import location


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add_output(parser.add_argument_group("data"))
    add_tokenizer(parser, required=True)
    add_sample(parser, "images to decode", default=24)
    parser.add_argument("--note", default="", help="a sentence to show on top of the report")
    parser.add_argument("--out_dir", type=location, default=Path("preview"), help="folder to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    outputs = open_outputs(args)

    from vision_tokenizer.codebook.read import Place
    from vision_tokenizer.review.issues import Reservoir
    from vision_tokenizer.review.preview import Contents, decode_place, read_contents, write_report
    from vistoken.jobs.progress import bar

    tokenizer = load_named(args, decoder=True)
    for output in outputs:
        if output.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{output.folder} was made with the tokenizer {output.fingerprint}, but {args.tokenizer_checkpoint} is "
                f"{tokenizer.fingerprint}: its decoder would show something else. Name the one it was made with."
            )
    contents, sample = Contents(), Reservoir[Place](args.sample, args.seed)
    with bar("reading") as progress:
        for output in outputs:
            read_contents(output, contents, sample, progress.update)
    if not sample.drawn:
        ended = (outputs[0].folder / SUMMARY).exists()
        see = f"see its {SUMMARY} and *.rejected.jsonl" if ended else "the run has not ended; its command goes on"
        raise UserError(f"{outputs[0].folder}: no image with codes in it; {see}")
    pairs = [decode_place(tokenizer, place) for place in bar("decoding", iterable=sample.drawn)]
    write_report(args.out_dir, outputs, contents, pairs, args.note)
    print(f"{contents.images:,} images of {contents.items:,} items; {len(pairs):,} decoded")
    print(f"look at {args.out_dir / 'report.html'} and {args.out_dir / 'contact_sheet.png'}")
    return 0


if __name__ == "__main__":
    run_command(main)
