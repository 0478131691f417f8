"""After pre_tokenize.py and concat_record.py: is every item there, and are the tokens right?

    python -u pre_tokenize/verify_tokens.py --record tokens/record.json --tokenizer_dir ckpts/chameleon/tokenizer \\
        --in_filename data.json --sample 100

Every item of the input must be in the record once, or among the rejected with its reason. Every token file must hold
what the record says. In every sequence the ids must exist, turns and image blocks must be well formed, and the loss
mask must follow the turns. With `--in_filename`, `--sample` items are tokenised again, their images one at a time in
fp32: the text must be the same, and where a code differs, the report says how near the tie was.

Writes nothing. One process, on a GPU if there is one (`--device cpu` if not). Published token files (pickles) are read,
too; they have no manifest, so nothing is tokenised again.
"""

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from pre_tokenize.preview_tokens import add_record
from vistoken.cli import add_device, add_sample, command_parser, run_command
from vistoken.store import location

if TYPE_CHECKING:
    from pre_tokenize.sequences import SequenceFormat
    from pre_tokenize.text import TextTokenizer
    from pre_tokenize.token_file import TokenFiles
    from vision_tokenizer.review.issues import Issues
    from vistoken.jobs.run import Table


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add_record(parser)
    add = parser.add_argument
    add("--in_filename", type=location, help="the conversations that the tokens were made from (default: none)")
    add("--item_processor", metavar="FILE.py:Class", help="as pre_tokenize.py had it (default: none)")
    add_sample(parser, "items to tokenise again", default=100, low=0)
    add_device(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    from pre_tokenize.formats import load_format
    from pre_tokenize.pre_tokenize import load_item_processor
    from pre_tokenize.text import TextTokenizer
    from pre_tokenize.token_checks import check_input, check_record, check_sequences
    from pre_tokenize.token_file import TokenFiles
    from vision_tokenizer.review.issues import Issues
    from vistoken.errors import UserError
    from vistoken.jobs.progress import bar

    files, issues = TokenFiles(args.record), Issues()
    if not len(files):
        raise UserError(f"{args.record}: no items in it")
    text, manifest = TextTokenizer(args.text_tokenizer or args.tokenizer_dir), files.manifest()
    processor, _ = load_item_processor(args.item_processor)
    image_dir = args.image_dir or location(manifest["image_dir"] if manifest else "")
    reader = load_format(manifest, text, processor.process_item, image_dir)
    table = check_input(manifest, args.in_filename, issues) if manifest and args.in_filename else None
    check_record(files.record, manifest, issues)
    with bar("reading", len(files)) as progress:
        found = check_sequences(files, reader, issues, progress.update)
    print(
        f"{len(files):,} sequences of {found['tokens']:,} tokens, {found['learned'] / max(found['tokens'], 1):.1%} of "
        f"them learned; {found['images']:,} images"
    )
    if manifest is None:
        print("no item was tokenised again: there is no manifest")
    elif args.in_filename is None:
        print("no item was tokenised again: that needs --in_filename")
    elif table is not None:
        tokenize_again(args, files, table, manifest, text, reader, issues)
    print(f"\n{issues}")
    return 1 if issues.counts else 0


def tokenize_again(
    args: argparse.Namespace,
    files: "TokenFiles",
    table: "Table",
    manifest: dict[str, Any],
    text: "TextTokenizer",
    reader: "SequenceFormat",
    issues: "Issues",
) -> None:
    from pre_tokenize.token_checks import Reencoder, Retokenizer, check_tokenizer, retokenize

    if manifest["image_tokenizer"]["name"] == "chameleon":
        from vision_tokenizer.images.chameleon import crop_sizes, prepare
        from vision_tokenizer.models.chameleon.vqgan import load_chameleon
        from vision_tokenizer.review.reencode import MAX_GAP

        settings, vqgan = manifest["settings"], load_chameleon(args.tokenizer_dir, device=args.device)
        sizes = crop_sizes(settings["target_size"], settings["crop"])
        crops = partial(prepare, sizes=sizes, orientation=settings.get("exif_orientation", "ignore"))
        again = Retokenizer(reader, issues, Reencoder(crops, vqgan, MAX_GAP[settings["torch_dtype"]]))
        check_tokenizer(manifest, text.sha256, vqgan.fingerprint, issues)
    else:
        again = Retokenizer(reader, issues)
        check_tokenizer(manifest, text.sha256, None, issues)
    count = retokenize(files, table, again, args.sample, args.seed)
    codes = f"; {again.agreement}" if again.agreement.codes else ""
    print(f"{count:,} items tokenised again{codes}")


if __name__ == "__main__":
    run_command(main)
