"""The flags that several commands about codes have, declared once: which data, at which size, which tokenizer."""

import argparse
from pathlib import Path

from vision_tokenizer.images.anchors import RESOLUTION_TYPES
from vistoken.cli import Flags, add_device, at_least, share

CHECKPOINT = ".bin, .pt, .safetensors, a folder or a hub id"


def add_datasets(flags: Flags) -> None:
    flags.add_argument("--data_config", type=Path, required=True, help="metadata config (.json)")
    flags.add_argument(
        "--datasets", nargs="+", metavar="NAME", help="only these data sets of the config (default: all)"
    )


def add_resolution(flags: Flags) -> None:
    flags.add_argument(
        "--resolution_type",
        choices=RESOLUTION_TYPES,
        default="fixed_anchors",
        help="one size for all images, or the nearest of eleven shapes",
    )
    flags.add_argument("--resolution", type=at_least(16), default=512, help="side in pixels, for `fixed`")


def add_crop_threshold(flags: Flags) -> None:
    flags.add_argument(
        "--crop_percent_thresh",
        type=share,
        default=0.2,
        help="reject items with an image that loses a larger share to the crop; 0 keeps all",
    )


def add_output_names(flags: Flags) -> None:
    flags.add_argument("--tokenizer_version", default="dualvitok", help="name of the output folder")
    flags.add_argument("--output_dirname", default="jsonl_after_tokenizer", help="name of the folder around it")


def add_tokenizer(parser: argparse.ArgumentParser, *, required: bool) -> Flags:
    """DualViTok and the device it runs on; gives the group, for what else a command wants to know of it."""
    model = parser.add_argument_group("tokenizer")
    add_tokenizer_files(model, required=required)
    model.add_argument("--use-ema", "--use_ema", action="store_true", help="take the checkpoint's `ema` weights")
    add_device(model)
    return model


def add_tokenizer_files(flags: Flags, *, required: bool) -> None:
    needed = "" if required else " (default: none)"
    flags.add_argument(
        "--model_config", type=Path, required=required, help=f"DualViTok's .py config (code: it is run){needed}"
    )
    flags.add_argument("--tokenizer_checkpoint", required=required, help=f"{CHECKPOINT}{needed}")


def check_tokenizer_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if (args.model_config is None) != (args.tokenizer_checkpoint is None):
        parser.error("--model_config and --tokenizer_checkpoint belong together")
