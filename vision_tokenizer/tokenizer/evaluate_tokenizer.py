"""Measure how well a tokenizer reconstructs pictures, and compare tokenizers on the same ones.

    python vision_tokenizer/tokenizer/evaluate_tokenizer.py --images PICTURES --out_dir evaluation/small \\
        --model_config C.py --tokenizer_checkpoint model.safetensors
    python vision_tokenizer/tokenizer/evaluate_tokenizer.py --images PICTURES --out_dir evaluation/chameleon \\
        --chameleon checkpoints/chameleon_small --compare evaluation/small

Every picture's shorter side becomes `--side`, its centre is cut out, encoded and decoded. Writes `metrics.json`,
`per_image.jsonl` and `report.html`. Started under torchrun, or again after an interruption, it shares the work and
comes to the same figures. Without a tokenizer named, the built-in one is measured.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vision_tokenizer.tokenizer.flags import add_tokenizer, check_tokenizer_files
from vistoken.cli import BAD_DATA, OK, add_dtype, add_max_failed, at_least, command_parser, note, run_command
from vistoken.errors import UserError

if TYPE_CHECKING:
    from vision_tokenizer.models.protocol import ImageTokenizer
    from vision_tokenizer.review.evaluate import Measures


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    pictures = parser.add_mutually_exclusive_group(required=True).add_argument
    pictures("--images", type=Path, help="folder of pictures, with all its subfolders (default: none)")
    pictures("--data_config", type=Path, help="metadata config: the pictures of its data sets (default: none)")
    add = parser.add_argument
    add("--out_dir", type=Path, required=True, help="folder of this evaluation")
    add("--side", type=at_least(16), default=256, help="of the square pictures, a multiple of 16")
    add("--batch_size", type=at_least(1), default=4, help="pictures per batch")
    others = "folders of evaluations of the same pictures (default: none)"
    add("--compare", type=Path, nargs="+", default=[], help=others)
    add("--lpips_vgg", type=Path, help="VGG16's weights: measure LPIPS, too (default: none)")
    add("--lpips_linear", type=Path, help="LPIPS's linear weights (default: none)")
    add("--inception", type=Path, help="Inception-2015-12-05's weights: measure FID (default: none)")
    add("--no_lite0", action="store_true", help="leave EfficientNet-Lite0's distances out")
    add_max_failed(parser, of="pictures")
    model = add_tokenizer(parser, required=False)
    add_dtype(model)
    model.add_argument("--chameleon", type=Path, help="folder of a Chameleon tokenizer (default: none)")
    args = parser.parse_args(argv)
    check_tokenizer_files(parser, args)
    if args.side % 16:
        parser.error(f"--side must be a multiple of 16, is {args.side}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    import json

    from vision_tokenizer.fitting.config import DataSettings
    from vision_tokenizer.fitting.data import find_images
    from vision_tokenizer.review.evaluate import Evaluation, evaluate
    from vision_tokenizer.review.evaluation_report import as_text, table, write_report
    from vistoken.jobs.workers import launched_workers

    where = DataSettings(data_path=str(args.images or ""), data_config=str(args.data_config or ""))
    images = [path for path, _ in find_images(where)]
    tokenizer, measures = open_tokenizer(args), open_measures(args)
    settings = {
        "side": args.side,
        "batch_size": args.batch_size,
        "dtype": args.torch_dtype,
        "measures": sorted([*measures.distances, *measures.features]),
    }
    workers = launched_workers()
    output = Evaluation(args.out_dir, images, tokenizer, settings)
    others = []
    for folder in args.compare:  # told before hours of measuring
        try:
            other = json.loads((folder / "metrics.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--compare {folder}: no finished evaluation in it ({error})") from error
        if (folder / "images.jsonl").read_bytes() != (args.out_dir / "images.jsonl").read_bytes():
            raise UserError(f"--compare {folder}: it is of other pictures than {args.out_dir}")
        others.append((folder.name, other))
    result = evaluate(output, tokenizer, measures, args.side, args.batch_size, workers)
    if result is None:
        return 0
    counts, figures = result
    evaluations = [(args.out_dir.name, figures), *others]
    print(as_text(table(evaluations)))
    if figures["pictures"] < 2000 and any("frechet" in name or name == "fid" for name in figures["figures"]):
        note(f"a Frechet distance of {figures['pictures']:,} pictures says little: take thousands")
    print(f"{counts.done:,} of {counts.items:,} pictures measured")
    if figures["pictures"]:
        write_report(args.out_dir, evaluations, tokenizer, args.side, args.batch_size)
        print(f"look at {args.out_dir / 'report.html'}")
    if counts.failed:
        print(f"not measured, and why: {args.out_dir / 'per_image.rejected.jsonl'}")
    if counts.failed_share <= args.max_failed:
        return OK
    print(f"more than --max_failed {args.max_failed:g} of the pictures failed", file=sys.stderr)
    return BAD_DATA


def open_tokenizer(args: argparse.Namespace) -> "ImageTokenizer":
    if args.chameleon:
        from vision_tokenizer.models.chameleon.vqgan import load_chameleon

        return load_chameleon(args.chameleon, device=args.device, dtype=args.torch_dtype, decoder=True)
    from vision_tokenizer.api import load_tokenizer

    return load_tokenizer(
        args.model_config, args.tokenizer_checkpoint, device=args.device, dtype=args.torch_dtype, use_ema=args.use_ema
    ).model


def open_measures(args: argparse.Namespace) -> "Measures":
    from vision_tokenizer.images.dualvitok import denormalize
    from vision_tokenizer.review.evaluate import Distance, Features, Measures
    from vistoken.device import local_device

    device = local_device(args.device)
    distances: dict[str, Distance] = {}
    features: dict[str, Features] = {}
    if args.lpips_vgg or args.lpips_linear:
        from vision_tokenizer.fitting.perceptual import load_lpips

        distances["lpips"] = load_lpips(args.lpips_vgg or Path(), args.lpips_linear or Path()).to(device)
    if args.inception:
        try:  # torch-fidelity's network with weights from a file
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UserError("--inception needs torch-fidelity. Please install torch-fidelity") from error
        inception = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=str(args.inception)
        )
        inception = inception.to(device).eval()
        features["inception"] = lambda pixels: inception(denormalize(pixels).to(device))[0]
    if not args.no_lite0:
        from vision_tokenizer.fitting.lite0 import Lite0Distance, load_lite0

        try:
            network = load_lite0().to(device)
        except UserError as error:
            note(f"{error}; its distances are left out")
        else:
            distances["lite0_distance"], features["lite0"] = Lite0Distance(network), network.pooled
    return Measures(distances, features)


if __name__ == "__main__":
    run_command(main, resumes=True)
