"""Are drawn pictures those that were learned? Compares the answers of generate.py with the token files of training.

    python exps/compare_drawn.py --record tokens/record.json --answers drawn --tokenizer_dir ckpts/chameleon/tokenizer

Writes sheet.png into the folder of the answers: each photograph, and beside it what its codes decode to and what was
drawn from its caption. Exits with 1 unless all codes are the same.
"""

from pathlib import Path

import numpy as np
import orjson
from PIL import Image

from pre_tokenize.formats import load_format
from pre_tokenize.preview_tokens import image_parts
from pre_tokenize.text import TextTokenizer
from pre_tokenize.token_file import TokenFiles
from training.generation.answers import ANSWERS
from vision_tokenizer.images.dualvitok import to_image
from vision_tokenizer.review.contact_sheet import contact_sheet
from vision_tokenizer.review.preview import decode_codes
from vistoken.cli import BAD_DATA, OK, command_parser, run_command
from vistoken.errors import UserError


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--record", type=Path, required=True, help="what concat_record.py wrote")
    add("--answers", type=Path, required=True, help="folder that generate.py wrote, of the same items")
    add("--tokenizer_dir", required=True, help="as pre_tokenize.py had it")
    add("--text_tokenizer", help="as pre_tokenize.py had it")
    add("--model_config", type=Path, help="DualViTok's .py config (code: it is run)")
    add("--tokenizer_checkpoint", help="DualViTok's weights")
    args = parser.parse_args(argv)
    args.device = "cpu"

    files = TokenFiles(args.record)
    format = load_format(files.manifest(), TextTokenizer(args.text_tokenizer or args.tokenizer_dir))
    tokenizer, original = image_parts(args, files.manifest())
    if tokenizer is None:
        raise UserError("DualViTok's codes are decoded with --model_config and --tokenizer_checkpoint")
    learned, cells, same = {sample.id: sample for sample in files}, [], 0
    lines = [orjson.loads(line) for line in (args.answers / ANSWERS).read_bytes().splitlines()]
    for line in lines:
        sample = learned[line["item"]]
        drawn = [[np.array(grid) for grid in grids] for grids in line["image_embed_inds"]]
        blocks = [block for block in format.blocks(sample.tokens) if sample.loss_mask[block.start]]
        equal = len(drawn) == len(blocks) and all(
            np.array_equal(grid, given)
            for grids, block in zip(drawn, blocks, strict=True)
            for grid, given in zip(grids, block.grids, strict=True)
        )
        same += equal
        pictures = [decode_codes(tokenizer, grids) for grids in (blocks[0].grids, drawn[0])]
        beside = Image.fromarray(np.concatenate([np.asarray(to_image(picture)) for picture in pictures], axis=1))
        photograph = to_image(original(Path(sample.images[-1]), blocks[0]))
        cells.append((photograph, beside, f"{line['id']}: codes {'equal' if equal else 'differ'}"))
    title = "Photographs; their codes decoded, beside what was drawn from the caption"
    contact_sheet(title, cells, columns=2).save(args.answers / "sheet.png")
    print(f"{same} of {len(files)} pictures drawn exactly as learned: {args.answers / 'sheet.png'}")
    return OK if same == len(files) else BAD_DATA


if __name__ == "__main__":
    run_command(main)
