"""List pictures with their sizes, so that training at any resolution starts at once instead of reading every header.

    python -m vision_tokenizer.fitting.size_list --data_path PICTURES --out sizes.json

The list is `--size_list` of train_dualvitok.py, in the published form: [{"image": path below PICTURES, "width": w,
"height": h}, ...]. Files whose header cannot be read are named, counted, and left out.
"""

import argparse
from pathlib import Path

from vistoken.cli import add_max_failed, command_parser, note, run_command


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--data_path", type=Path, required=True, help="folder of pictures, with all its subfolders")
    parser.add_argument("--out", type=Path, required=True, help="the list to write (.json)")
    add_max_failed(parser, of="pictures")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    import json

    from vision_tokenizer.fitting.data import SUFFIXES, list_images, read_sizes
    from vistoken.errors import Failed, UserError
    from vistoken.jobs.files import write_bytes

    files = list_images(args.data_path)
    rows = []
    for path, size in zip(files, read_sizes(files), strict=True):
        if isinstance(size, Failed):
            note(f"left out: {size}")
        else:
            rows.append({"image": str(path.relative_to(args.data_path)), "width": size[1], "height": size[0]})
    if not rows:
        raise UserError(f"{args.data_path}: no images ({', '.join(SUFFIXES)}) in it that can be read")
    write_bytes(args.out, ("[" + ",\n ".join(map(json.dumps, rows)) + "]\n").encode())
    failed = len(files) - len(rows)
    print(f"wrote {args.out}: {len(rows):,} pictures; {failed:,} could not be read")
    return 1 if failed > args.max_failed * len(files) else 0


if __name__ == "__main__":
    run_command(main)
