"""What a small ViT learns from: photographs, and what EfficientNet-Lite0 says of each of their tokens.

Legend: B batch, T numbers that are told of a token.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_tokenizer.fitting.config import DataSettings
from vision_tokenizer.fitting.data import Photographs, Place, join, list_images
from vision_tokenizer.fitting.lite0 import load_lite0
from vision_tokenizer.images.dualvitok import normalize
from vision_tokenizer.models.dualvitok.semantic import vit_input

SIDE, SHOWN = 256, 288  # of it the ViT sees 252, which is 9 x 9 tokens; the teacher's last map has 9 x 9 cells of 288


class Lessons:
    """Step -> the ViT's input and what it is to say of every token, (B, 81, T); the same ones for the same seed."""

    def __init__(self, folder: Path, batch: int, seed: int):
        self.batch, self.seed = batch, seed
        settings = DataSettings(augment="random_crop", crop_share=(0.5, 1.0), cache=True)
        self._photographs, self._teacher = Photographs(list_images(folder), settings), load_lite0()

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        name = f"{self.seed} {step}"
        draw, count = random.Random(name), len(self._photographs)
        places = [Place(draw.randrange(count), (SIDE, SIDE), f"{name} {i}") for i in range(self.batch)]
        pixels = normalize(join([self._photographs[place] for place in places]).pixels)
        with torch.no_grad():
            shown = F.interpolate(pixels, (SHOWN, SHOWN), mode="bilinear", antialias=True)
            *_, middle, _, last = self._teacher.stages(shown)
            colours = F.interpolate(pixels, (36, 36), mode="area")
            maps = [last, F.avg_pool2d(middle, 2), F.pixel_unshuffle(colours, 4)]
            return vit_input(pixels), torch.cat([m.flatten(2).mT for m in maps], dim=2)

    def spread(self) -> tuple[Tensor, Tensor]:
        """(T,) mean and standard deviation of what is told, over a few lessons that are no step's."""
        told = torch.cat([self(-1 - i)[1] for i in range(8)]).flatten(0, 1)
        return told.mean(0), told.std(0) + 1e-3
