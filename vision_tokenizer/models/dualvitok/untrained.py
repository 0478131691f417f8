"""Write an untrained checkpoint, so that everything can be tried without downloading one.

    python -m vision_tokenizer.models.dualvitok.untrained \
        --config configs/example/dualvitok/dualvitok_small.py --out checkpoints/quickstart/pytorch_model.bin

The weights are random, drawn from each tensor's name, the same on every machine. Different images get different
codes, but the codes mean nothing and decode to noise. Needs no GPU; the small model takes a second.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from vistoken.cli import command_parser, run_command

if TYPE_CHECKING:
    import numpy as np


def untrained_state(shapes: dict[str, tuple[int, ...]]) -> dict:
    """Random tensors of these names and shapes, scaled so that signals neither vanish nor blow up."""
    import numpy as np
    import torch

    state = {}
    for name, shape in shapes.items():
        seed = int.from_bytes(hashlib.sha256(f"untrained {name}".encode()).digest()[:8], "little")
        noise = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        state[name] = torch.from_numpy(_scaled(name, noise))
    return state


def _scaled(name: str, noise: "np.ndarray") -> "np.ndarray":
    if name.endswith("codebook"):
        return 0.5 * noise
    if name.endswith(".bias"):
        return 0.02 * noise
    if noise.ndim == 1:  # a norm's scale
        return 1 + 0.1 * noise
    weight = noise / (noise[0].size ** 0.5)
    # a branch that adds little leaves tokens of different patches different
    return 0.25 * weight if name.endswith(("attn.proj.weight", "mlp.fc2.weight")) else weight


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a DualViTok config (.py, executed)")
    parser.add_argument("--out", type=Path, required=True, help="where to write, e.g. .../pytorch_model.bin")
    args = parser.parse_args(argv)

    import torch

    from vision_tokenizer.models.dualvitok.config import read_config
    from vision_tokenizer.models.dualvitok.model import DualViTok
    from vistoken.jobs.files import atomic_write

    with torch.device("meta"):
        model = DualViTok(read_config(args.config), decoder=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with atomic_write(args.out) as file:
        torch.save(untrained_state(shapes), file)
    print(f"wrote {args.out}: untrained weights, for trying things out only")
    return 0


if __name__ == "__main__":
    run_command(main)
