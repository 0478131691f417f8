"""A small set-up to train a tokenizer: a config, pictures, and the command run on them in this process."""

from pathlib import Path

import torch
from conftest import GOLDEN, TINY_DUALVITOK
from PIL import Image

from vision_tokenizer.tokenizer.train_dualvitok import main as train

ROOT = Path(__file__).parents[1]
COMMAND = ROOT / "vision_tokenizer" / "tokenizer" / "train_dualvitok.py"
TRAINING = """
vq_loss = dict(perceptual_weight=0.0, disc_start=3, disc_dim=4)
data_args = dict(resolution=32, augment="random_crop")
global_batch_size = 4
max_steps = 6
lr = 1e-3
mixed_precision = "none"
ema = True
num_workers = 0
log_every = 1
ckpt_every = 2
vit_checkpoint = "random"
fit_codebooks = "covariance"
"""


def write_pictures(folder: Path) -> Path:
    (folder / "of_a_class").mkdir(parents=True)
    for name in ("sq_astronaut.png", "sq_chelsea.png", "h384_w512.png", "h512_w384.png", "photo.jpg"):
        image = Image.open(GOLDEN / "images" / name).convert("RGB")
        image.resize((image.width // 4, image.height // 4)).save(folder / "of_a_class" / name)
    return folder


def write_config(path: Path) -> Path:
    text = TINY_DUALVITOK.replace("config=dict(", "config=dict(pixel_drop_rate=0.2, pixel_drop_batch_rate=0.5,", 1)
    path.write_text(text + TRAINING)
    return path


def run(config: Path, pictures: Path, out: Path, *more: str) -> dict:
    """What its last checkpoint holds."""
    train([str(config), f"--data_path={pictures}", f"--results_dir={out}", *more])
    return torch.load(next(iter(sorted(Path(out).rglob("*.pt"))[-1:])), weights_only=True)
