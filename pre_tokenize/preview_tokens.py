"""Look at token files: conversations in order, the learned part coloured, images decoded in place.

    python -u pre_tokenize/preview_tokens.py --record tokens/record.json --tokenizer_dir ckpts/chameleon/tokenizer \\
        --sample 12 --out_dir preview

Writes `report.html`, one file that needs no network, and `contact_sheet.png` for terminals that show pictures:
conversations, image sizes, codebook use, lengths. Images of Chameleon tokens are decoded by the VQGAN of
`--tokenizer_dir`; those of DualViTok tokens need `--model_config` and `--tokenizer_checkpoint`, else they are named
only. One process, on a GPU if there is one (`--device cpu` if not).
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: its folder comes first, and hides the package of the same name
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import argparse

from vistoken.cli import run_command
from vistoken.errors import UserError


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--record", type=Path, required=True, help="what concat_record.py wrote")
    add("--tokenizer_dir", default="ckpts/chameleon/tokenizer", help="as pre_tokenize.py had it")
    add("--text_tokenizer", help="another folder, file or hub id for the text (default: as above)")
    add("--image_dir", type=Path, help="where relative image paths begin (default: as pre_tokenize.py had it)")
    add("--model_config", type=Path, help="DualViTok's .py config (code: it is run)")
    add("--tokenizer_checkpoint", help="DualViTok's .bin, .pt, .safetensors, a folder or a hub id")
    add("--sample", type=int, default=12, help="conversations to show (default: %(default)s)")
    add("--seed", type=int, default=0, help="another one draws other conversations")
    add("--note", default="", help="a sentence to show on top of the report")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out_dir", type=Path, default=Path("preview"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.sample < 1:
        parser.error(f"--sample must be at least 1, is {args.sample}")
    if (args.model_config is None) != (args.tokenizer_checkpoint is None):
        parser.error("--model_config and --tokenizer_checkpoint belong together")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    from pre_tokenize.formats import load_format
    from pre_tokenize.text import TextTokenizer
    from pre_tokenize.token_file import TokenFiles
    from pre_tokenize.token_preview import COUNTED, Renderer, count_contents, write_report
    from vision_tokenizer.review.issues import draw

    files = TokenFiles(args.record, args.image_dir)
    if not len(files):
        raise UserError(f"{args.record}: no items in it")
    manifest = files.manifest()
    reader = load_format(manifest, TextTokenizer(args.text_tokenizer or args.tokenizer_dir))
    tokenizer, original = image_parts(args, manifest)
    renderer, conversations = Renderer(reader, tokenizer, original), []
    contents = count_contents(files, draw(len(files), COUNTED, args.seed), reader)
    for position in draw(len(files), args.sample, args.seed):
        try:
            conversations.append(renderer.conversation(files[position]))
        except (ValueError, IndexError) as error:
            print(f"item {files.record[position].id} cannot be shown: {error}; see verify_tokens.py", file=sys.stderr)
    write_report(args.out_dir, files, contents, conversations, renderer.pairs, args.note)
    print(f"{len(conversations):,} of {len(files):,} conversations, {len(renderer.pairs):,} images decoded")
    print(f"look at {args.out_dir / 'report.html'}")
    return 0


def image_parts(args: argparse.Namespace, manifest):
    """What decodes the codes (None: nothing), and what reads an original as it was encoded."""
    name = manifest["image_tokenizer"]["name"] if manifest else "chameleon"
    if name == "chameleon":
        from vision_tokenizer.images.chameleon import prepare
        from vision_tokenizer.models.chameleon.vqgan import load_chameleon

        tokenizer = load_chameleon(args.tokenizer_dir, device=args.device, decoder=True)
        check_fingerprint(manifest, tokenizer, args.tokenizer_dir)
        return tokenizer, lambda path, block: prepare(path, [block.size[::-1]])[0]

    from vision_tokenizer.images.dualvitok import prepare as prepare_at
    from vision_tokenizer.models.dualvitok.model import load_dualvitok

    tokenizer = None
    if args.model_config:
        tokenizer = load_dualvitok(args.model_config, args.tokenizer_checkpoint, device=args.device, decoder=True)
        check_fingerprint(manifest, tokenizer, args.tokenizer_checkpoint)
    return tokenizer, lambda path, block: prepare_at(path, (block.size,), 0.0)[0]


def check_fingerprint(manifest, tokenizer, source: str) -> None:
    """Another tokenizer's decoder would show something else."""
    made_with = manifest["image_tokenizer"]["fingerprint"] if manifest else None
    if made_with not in (None, tokenizer.fingerprint):
        raise UserError(
            f"the token files were made with the image tokenizer {made_with}, but {source} is "
            f"{tokenizer.fingerprint}. Name the one they were made with."
        )


if __name__ == "__main__":
    run_command(main)
