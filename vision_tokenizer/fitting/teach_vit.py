"""Teach the ViT of a small DualViTok to see, with EfficientNet-Lite0 as its teacher; then it is frozen.

    python -m vision_tokenizer.fitting.teach_vit --config configs/example/dualvitok/dualvitok_small.py \
        --data_path output/photographs --out output/vit.safetensors

A full-size DualViTok starts from Qwen2-VL's pretrained ViT. A small one has no such thing to start from, so its ViT
learns, through a linear layer that is thrown away, the teacher's last two feature maps and the mean colours of 4 x 4
parts of each 28 x 28 patch. On a CPU; needs vistoken[lite0].
"""

import argparse
import json
import time
from pathlib import Path

from vistoken.cli import command_parser, run_command


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a DualViTok config (.py, executed)")
    parser.add_argument("--data_path", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--out", type=Path, required=True, help="where the ViT's weights go (.safetensors)")
    parser.add_argument("--steps", type=int, default=400, help="batches to learn from")
    parser.add_argument("--batch", type=int, default=8, help="pictures per batch")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--save_every", type=int, default=50, help="steps between files")
    parser.add_argument("--seed", type=int, default=0, help="another one draws others")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    import torch
    import torch.nn.functional as F
    from safetensors.torch import save_file
    from torch import nn

    from vision_tokenizer.fitting.lessons import Lessons
    from vision_tokenizer.models.dualvitok.config import read_config
    from vision_tokenizer.models.dualvitok.vit import VisionTransformer
    from vistoken.device import keep_freed_memory

    keep_freed_memory()
    torch.manual_seed(args.seed)
    sizes = read_config(args.config).semantic_encoder.vit
    vit, lessons = VisionTransformer(sizes), Lessons(args.data_path, args.batch, args.seed)
    mean, std = lessons.spread()
    head = nn.Linear(sizes.hidden_size, len(mean))
    parameters = [*vit.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
    began, running = time.time(), None
    for step in range(args.steps):
        image, wanted = lessons(step)
        with torch.autocast("cpu", torch.bfloat16):
            merged = vit(image)
            found = head(F.layer_norm(merged, merged.shape[-1:], eps=1e-6))
        loss = F.mse_loss(found.float(), (wanted - mean) / std)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            facts = {"steps": step + 1, "unexplained_share": round(running, 4), "seconds": round(time.time() - began)}
            save_file(vit.state_dict(), args.out, metadata={"teach_vit": json.dumps(facts)})
            print(json.dumps(facts), flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
