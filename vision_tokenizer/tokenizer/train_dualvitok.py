"""Train a DualViTok, or Chameleon's VQGAN, on your own pictures.

One machine with 8 GPUs, as published (from vision_tokenizer/, as all of this toolkit's documents have it):

    torchrun --nproc_per_node 8 tokenizer/train_dualvitok.py ../configs/example/dualvitok/dualvitok_anyres_max512.py \
        --data_path=PICTURES --lpips_vgg=vgg16-397923af.pth --lpips_linear=vgg.pth

One process, on a GPU or a CPU:

    python vision_tokenizer/tokenizer/train_dualvitok.py configs/example/dualvitok/dualvitok_small.py \
        --data_path=PICTURES --eval_path=HELD_OUT

Settings are the config's; `--key=value` and `--key.sub=value` replace one. The same command resumes after any
interruption. `--init_from=CHECKPOINT` starts a new run from weights, for fine-tuning. What is written lies in
{results_dir}/{type of the model}: checkpoints/, metrics.jsonl, tensorboard/, loss.png, held_out.png.
"""

import argparse
import sys
from pathlib import Path

from vistoken.cli import command_parser, leave_at_once, note, run_command


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("config", type=Path, help="a .py config with `vq_model` and `vq_loss` (executed)")
    parser.add_argument("--dry_run", action="store_true", help="print the settings, train nothing")
    given = sys.argv[1:] if argv is None else argv
    overrides = [text for text in given if text.startswith("--") and "=" in text]
    args = parser.parse_args([text for text in given if text not in overrides])
    args.overrides = overrides
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    from vision_tokenizer.fitting.config import flatten, read_settings

    settings, unread = read_settings(args.config, args.overrides)
    if unread:
        note(f"{args.config}: nothing reads {', '.join(unread)}, here as in the published trainer")
    if args.dry_run:
        for key, value in flatten(settings).items():
            print(f"{key} = {value!r}")
        return 0

    from vision_tokenizer.fitting.run import train

    path = train(settings)
    note(f"done: {path}")
    return 0


if __name__ == "__main__":
    run_command(main, leave=leave_at_once, resumes=True)
