"""The flags that several commands about codes have, declared once: which data, at which size, which tokenizer."""

import argparse
from math import isqrt
from typing import TYPE_CHECKING, Any

from vision_tokenizer.images.anchors import MAX_AREA, ORIENTATIONS, RESOLUTION_TYPES, SIDE
from vistoken.cli import Flags, add_device, at_least, folder_name, note, share
from vistoken.store import location

if TYPE_CHECKING:
    from vision_tokenizer.models.dualvitok.model import DualViTok

ANCHORS_SIDE = 512  # the default, and what the document gives with fixed_anchors, whose area it is
SIDES = range(64, 1025, 64)  # that have a word in models/dualvitok/vocabulary.py, not imported here: NumPy is slow
CHECKPOINT = ".bin, .pt, .safetensors, a folder or a hub id"


def add_output(flags: Flags) -> None:
    """An output of codebook inference, to write or to read: of which data sets, at which size, where."""
    add = flags.add_argument
    add("--data_config", type=location, required=True, help="metadata config (.json)")
    add("--datasets", nargs="+", metavar="NAME", help="only these data sets of the config (default: all)")
    shapes = "one size for all images, or the nearest of eleven shapes"
    add("--resolution_type", choices=RESOLUTION_TYPES, default="fixed_anchors", help=shapes)
    add("--resolution", type=_side, default=ANCHORS_SIDE, help="side in pixels, for `fixed`")
    add("--tokenizer_version", type=folder_name, default="dualvitok", help="name of the output folder")
    add("--output_dirname", type=folder_name, default="jsonl_after_tokenizer", help="name of the folder around it")


def _side(text: str) -> int:
    side = at_least(SIDE)(text)
    if side * side > MAX_AREA:
        raise argparse.ArgumentTypeError(f"must be at most {isqrt(MAX_AREA)}, what the model takes, not {side}")
    return side


def note_resolution(args: argparse.Namespace) -> None:
    """Tell at the start what a resolution will not do."""
    if args.resolution_type == "fixed_anchors" and args.resolution != ANCHORS_SIDE:
        note(f"--resolution {args.resolution} is ignored: fixed_anchors has sizes of its own, of about 512 x 512")
        args.resolution = ANCHORS_SIDE
    elif args.resolution_type == "fixed" and args.resolution not in SIDES:
        note(
            f"--resolution {args.resolution}: a language model has words for multiples of {SIDES.step} only, so that "
            "pre_tokenize.py will fail every item of these codes; they can be decoded, previewed and verified"
        )


def add_crop(flags: Flags) -> None:
    threshold = "reject items with an image that loses a larger share to the crop; 0 keeps all"
    flags.add_argument("--crop_percent_thresh", type=share, default=0.2, help=threshold)
    add_exif_orientation(flags)


def add_exif_orientation(flags: Flags) -> None:
    ways = "ignore: as published, phone portraits lie on their side; apply: they are turned upright"
    flags.add_argument("--exif_orientation", choices=ORIENTATIONS, default=ORIENTATIONS[0], help=ways)


def add_tokenizer(parser: argparse.ArgumentParser, *, required: bool) -> Flags:
    """DualViTok and the device it runs on; gives the group, for what else a command wants to know of it."""
    model = parser.add_argument_group("tokenizer")
    add_tokenizer_files(model, required=required)
    model.add_argument("--use-ema", "--use_ema", action="store_true", help="take the checkpoint's `ema` weights")
    add_device(model)
    return model


def load_named(args: argparse.Namespace, **options: Any) -> "DualViTok":
    """The tokenizer that the flags of `add_tokenizer` name; `options` are `load_dualvitok`'s own."""
    from vision_tokenizer.models.dualvitok.model import load_dualvitok

    files = args.model_config, args.tokenizer_checkpoint
    return load_dualvitok(*files, device=args.device, use_ema=args.use_ema, **options)


def add_tokenizer_files(flags: Flags, *, required: bool) -> None:
    needed = "" if required else " (default: none)"
    config = f"DualViTok's .py config (code: it is run){needed}"
    flags.add_argument("--model_config", type=location, required=required, help=config)
    flags.add_argument("--tokenizer_checkpoint", required=required, help=f"{CHECKPOINT}{needed}")


def check_tokenizer_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if (args.model_config is None) != (args.tokenizer_checkpoint is None):
        parser.error("--model_config and --tokenizer_checkpoint belong together")
