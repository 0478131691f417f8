"""The PatchGAN discriminator (arXiv 1611.07004): which patches of a picture look reconstructed.

Attribute names are those of the published training checkpoints.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """(B, 3, H, W) -> logits (B, 1, about H / 8, about W / 8). Always in train mode, so each call normalises with the
    statistics of its own batch: real and reconstructed pictures go through in calls of their own."""

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        before = width
        for i in range(1, layers + 1):
            after = width * min(2**i, 8)
            modules += [
                nn.Conv2d(before, after, 4, stride=2 if i < layers else 1, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.2),
            ]
            before = after
        self.main = nn.Sequential(*modules, nn.Conv2d(before, 1, 4, padding=1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.main(pictures)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss on logits of originals and of reconstructions."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
