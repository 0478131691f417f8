"""Look at token files: the conversations as the model reads them, the learned part coloured, images decoded in place.

    python -u pre_tokenize/preview_tokens.py --record tokens/record.json --tokenizer_dir ckpts/chameleon/tokenizer \\
        --sample 12 --out_dir preview

Writes `report.html`, one file that needs no network, and `contact_sheet.png` for terminals that show pictures:
conversations, image sizes, codebook use, lengths. The VQGAN in `--tokenizer_dir` decodes
the images of Chameleon tokens. Those of DualViTok tokens need `--model_config` and `--tokenizer_checkpoint`; without
them, images are only named. One process, on a GPU if there is one (`--device cpu` if not).
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vision_tokenizer.tokenizer.flags import add_tokenizer_files, check_tokenizer_files
from vistoken.cli import Flags, add_device, add_sample, command_parser, run_command
from vistoken.errors import Failed, UserError
from vistoken.store import Location, location

if TYPE_CHECKING:
    from pre_tokenize.token_preview import Original
    from vision_tokenizer.codebook.shards import Embedded
    from vision_tokenizer.models.protocol import ImageTokenizer


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add_record(parser)
    add_tokenizer_files(parser, required=False)
    add_sample(parser, "conversations to show", default=12)
    parser.add_argument(
        "--data_config",
        type=location,
        help="of images that lay in shards: codebook inference's metadata config, to find them there (default: none)",
    )
    parser.add_argument("--note", default="", help="a sentence to show on top of the report")
    add_device(parser)
    parser.add_argument("--out_dir", type=location, default=Path("preview"), help="folder to write")
    args = parser.parse_args(argv)
    check_tokenizer_files(parser, args)
    return args


def add_record(flags: Flags) -> None:
    """Which token files to read, and what wrote them."""
    add = flags.add_argument
    add("--record", type=location, required=True, help="what concat_record.py wrote")
    add("--tokenizer_dir", default="ckpts/chameleon/tokenizer", help="as pre_tokenize.py had it")
    add("--text_tokenizer", help="another folder, file or hub id for the text (default: --tokenizer_dir)")
    add("--image_dir", type=location, help="where relative image paths begin (default: as pre_tokenize.py had it)")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    from pre_tokenize.formats import load_format
    from pre_tokenize.text import TextTokenizer
    from pre_tokenize.token_file import TokenFiles
    from pre_tokenize.token_preview import COUNTED, Renderer, count_contents, write_report
    from vision_tokenizer.review.issues import draw

    files = TokenFiles(args.record, "" if args.data_config else args.image_dir)
    if not len(files):
        raise UserError(f"{args.record}: no items in it")
    manifest = files.manifest()
    reader = load_format(manifest, TextTokenizer(args.text_tokenizer or args.tokenizer_dir))
    tokenizer, original = image_parts(args, manifest, args.data_config)
    renderer, conversations = Renderer(reader, tokenizer, original), []
    contents = count_contents(files, draw(len(files), COUNTED, args.seed), reader)
    for position in draw(len(files), args.sample, args.seed):
        try:
            conversations.append(renderer.conversation(files[position]))
        except (ValueError, IndexError) as error:
            print(f"item {files.record.ids[position]} cannot be shown: {error}; see verify_tokens.py", file=sys.stderr)
    if renderer.pairs and not any(pair.original for pair in renderer.pairs):
        print(
            "none of the originals was found: name their folder with --image_dir or, where they lay in shards, the "
            "metadata config with --data_config",
            file=sys.stderr,
        )
    write_report(args.out_dir, files, contents, conversations, renderer.pairs, args.note)
    print(f"{len(conversations):,} of {len(files):,} conversations, {len(renderer.pairs):,} images decoded")
    print(f"look at {args.out_dir / 'report.html'}")
    return 0


def image_parts(
    args: argparse.Namespace, manifest: dict[str, Any] | None, data_config: Location | None = None
) -> "tuple[ImageTokenizer | None, Original]":
    """What decodes the codes (None: nothing), and what reads an original as it was encoded.

    `data_config` names the shards where images lie that are no files.
    """
    name = manifest["image_tokenizer"]["name"] if manifest else "chameleon"
    if name == "chameleon":
        from pre_tokenize.token_file import exif_orientation_of
        from vision_tokenizer.images.chameleon import prepare
        from vision_tokenizer.models.chameleon.vqgan import load_chameleon

        vqgan = load_chameleon(args.tokenizer_dir, device=args.device, decoder=True)
        check_fingerprint(manifest, vqgan, args.tokenizer_dir)
        orientation = exif_orientation_of(manifest)
        return vqgan, lambda path, block: prepare(path, [block.size[::-1]], orientation)[0]

    from vision_tokenizer.images.dualvitok import prepare as prepare_at
    from vision_tokenizer.models.dualvitok.model import load_dualvitok

    tokenizer = None
    if args.model_config:
        tokenizer = load_dualvitok(args.model_config, args.tokenizer_checkpoint, device=args.device, decoder=True)
        check_fingerprint(manifest, tokenizer, args.tokenizer_checkpoint)
    find = shard_images(data_config) if data_config else lambda path: path
    return tokenizer, lambda path, block: prepare_at(find(path), (block.size,), 0.0)[0]


def shard_images(data_config: Location) -> "Callable[[Location], Location | Embedded]":
    """Finds an image by its name in the shards of a metadata config."""
    from vision_tokenizer.codebook.annotations import read_data_config
    from vision_tokenizer.codebook.inputs import stored_image

    datasets = [dataset for dataset in read_data_config(data_config) if dataset.shards is not None]
    if not datasets:
        raise UserError(f"{data_config}: no data set of shards in it. Name the folder of its images with --image_dir.")

    def find(name: Location) -> "Location | Embedded":
        for dataset in datasets:
            with suppress(Failed):
                return stored_image(dataset, str(name))
        raise Failed("image not found", f"{name} is in no shard of {data_config}")

    return find


def check_fingerprint(manifest: dict[str, Any] | None, tokenizer: "ImageTokenizer", source: str) -> None:
    """Another tokenizer's decoder would show something else."""
    made_with = manifest["image_tokenizer"]["fingerprint"] if manifest else None
    if made_with not in (None, tokenizer.fingerprint):
        raise UserError(
            f"the token files were made with the image tokenizer {made_with}, but {source} is "
            f"{tokenizer.fingerprint}. Name the one they were made with."
        )


if __name__ == "__main__":
    run_command(main)
