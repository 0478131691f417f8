"""Turn a training checkpoint into a folder that loads: the weights alone, in bf16.

    python -m vision_tokenizer.fitting.export --checkpoint .../checkpoints/0000500.pt --out checkpoints/mine --use_ema

A DualViTok becomes `model.safetensors`, to be loaded with its config; a Chameleon VQGAN `vqgan.ckpt` and
`vqgan.yaml`.
"""

import argparse
import json
from pathlib import Path

from vistoken.cli import command_parser, run_command


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a .pt that train_dualvitok.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--use_ema", action="store_true", help="take the running means of the weights")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    import safetensors.torch
    import torch
    import yaml

    from vistoken.errors import UserError
    from vistoken.jobs.files import atomic_write, write_bytes
    from vistoken.weights import read_state_dict

    state = read_state_dict(args.checkpoint, use_ema=args.use_ema)
    state = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    stored = torch.load(args.checkpoint, map_location="cpu", weights_only=True, mmap=True)
    if "args" not in stored:
        raise UserError(f"{args.checkpoint}: no checkpoint of train_dualvitok.py, which keeps its settings in `args`")
    settings = json.loads(stored["args"])
    facts = {"steps": str(stored["steps"]), "weights": "ema" if args.use_ema else "model"}
    if settings["vq_model"]["type"] == "ChameleonVQGAN":
        written = args.out / "vqgan.ckpt"
        with atomic_write(written) as file:
            torch.save({"state_dict": state}, file)
        params = {"model": {"params": settings["vq_model"]["config"]}}
        write_bytes(args.out / "vqgan.yaml", yaml.safe_dump(params).encode())
    else:
        written = args.out / "model.safetensors"
        write_bytes(written, safetensors.torch.save(state, metadata=facts))
    print(f"wrote {written}: {written.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run_command(main)
