"""Turn a data set in a common format into the annotations and image folder that codebook inference reads.

    python vision_tokenizer/tokenizer/import_annotations.py --format coco --source captions_train2017.json \\
        --image_source train2017 --root datasets/coco --task generation --data_config configs/my_data.json

Formats, and what `--source` is:
    llava       a .json list or .jsonl of {"id", "image", "conversations"}     images in the folder --image_source
    coco        a captions_*.json                                              images in the folder --image_source
    pairs       a folder of images, each with a .txt of the same name          images stay in that folder
    webdataset  a .tar file or a folder of them, images with .txt or .json     images are written to {root}/images
    parquet     a .parquet file or a folder of them, the image bytes inside    images are written to {root}/images

Captions become conversations that ask to describe the image (`--task understanding`) or to generate it (`--task
generation`; codebook inference encodes these data sets). Conversations stay as they are.

Every record ends in {root}/annotations/*.jsonl or, with its reason, in {root}/import/*.rejected.jsonl. The same
command goes on where it was interrupted and tries again what failed. If the source has changed, `--overwrite` begins
anew. Under torchrun, ranks share the work.
"""

import argparse
import sys
from pathlib import Path

from vistoken.cli import add_max_failed, command_parser, run_command
from vistoken.errors import UserError

FORMAT_NAMES = ("llava", "coco", "pairs", "webdataset", "parquet")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--format", choices=FORMAT_NAMES, required=True, help="what the source is, see above")
    add("--source", type=Path, required=True, help="the annotation file, or the folder")
    add("--image_source", type=Path, help="folder of the images; llava and coco need it (default: none)")
    add("--root", type=Path, required=True, help="folder of the new data set")
    add("--name", help="of the data set in the metadata config (default: the name of --root)")
    add("--task", choices=("understanding", "generation"), required=True, help="what the captions are made into")
    add("--data_config", type=Path, help="metadata config to add the data set to (default: {root}/data_config.json)")
    add("--text_field", help="field or column of the text (default: the first of conversations, caption, text)")
    add("--image_field", default="image", help="parquet column of the images")
    add_max_failed(parser, of="records")
    add("--overwrite", action="store_true", help="import anew over another import in --root")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import orjson

    from vision_tokenizer.importers.job import FORMATS, config_entry, run_import, write_entry
    from vistoken.jobs.counts import Counts, counts_table
    from vistoken.jobs.workers import launched_workers

    image_dir = image_folder(args)
    kind = FORMATS[args.format]
    source = kind(args.source, image_dir, args.task, args.text_field, args.image_field, args.root / "import" / "chunks")
    workers = launched_workers()
    counts = run_import(args.format, source, args.root, workers, args.overwrite)
    if workers.rank:
        return 0

    entry = config_entry(args.root, image_dir, args.task)
    name, config = args.name or args.root.resolve().name, args.data_config or args.root / "data_config.json"
    write_entry(config, name, entry, args.overwrite)
    print(counts_table(counts, "file"))
    print(f"annotations: {args.root / 'annotations'}")
    total = Counts()
    for of_file in counts.values():
        total.add(of_file)
    if total.rejected + total.failed:
        print(f"what was left out, and why: {args.root / 'import'}/*.rejected.jsonl")
    print(f"in {config}:\n{orjson.dumps({name: entry}, option=orjson.OPT_INDENT_2).decode()}")
    if total.failed_share > args.max_failed:
        print(
            f"{total.failed_share:.1%} of the records failed, more than --max_failed {args.max_failed:g}",
            file=sys.stderr,
        )
        return 1
    return 0


def image_folder(args: argparse.Namespace) -> Path:
    """Where the images lie, or will be written. Raises `UserError` for arguments that do not fit the format."""
    in_a_folder = args.format in ("llava", "coco")
    if in_a_folder != (args.image_source is not None):
        needs = "needs --image_source, the folder of its images" if in_a_folder else "does not take --image_source"
        raise UserError(f"--format {args.format} {needs}")
    for given in filter(None, (args.source, args.image_source)):
        if not given.exists():
            raise UserError(f"{given} does not exist")
        if not (given.is_file() or given.is_dir()):
            raise UserError(f"{given} is neither a file nor a folder")
    if args.image_source and not args.image_source.is_dir():
        raise UserError(f"--image_source {args.image_source} is not a folder")
    if args.source.is_dir() if in_a_folder else args.format == "pairs" and args.source.is_file():
        raise UserError(f"--source {args.source}: --format {args.format} takes a {'file' if in_a_folder else 'folder'}")
    if args.format == "pairs":
        return args.source
    return args.image_source or args.root / "images"


if __name__ == "__main__":
    run_command(main, resumes=True)
