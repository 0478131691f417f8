"""How different two pictures look: LPIPS (arXiv 1801.03924), or an offline stand-in from EfficientNet-Lite0's features.

LPIPS needs two files that nobody may fetch silently; `load_lpips` takes their paths and checks what they are.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from vistoken.errors import UserError

VGG_SHA256 = "397923af"  # begins so; torchvision puts it into the file's name
VGG_SOURCE = "https://download.pytorch.org/models/vgg16-397923af.pth (torchvision's VGG16_Weights.IMAGENET1K_V1)"
LINEAR_MD5 = "d507d7349b931f0638a25a48a722f98a"
LINEAR_SOURCE = "weights/v0.1/vgg.pth inside the PyPI package lpips"
WIDTHS = (64, 128, 256, 512, 512)
CONVS_BEFORE_POOL = (2, 2, 3, 3, 3)


class Lpips(nn.Module):
    """(B, 3, H, W) twice, in [-1, 1] -> (B,) distances. Frozen; gradients reach the pictures."""

    TAPS = (3, 8, 15, 22, 29)  # ReLUs, as numbered in `features`
    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        modules: list[nn.Module] = []  # VGG16's, with torchvision's numbering, without the last pool
        before = 3
        for stage, (width, convs) in enumerate(zip(WIDTHS, CONVS_BEFORE_POOL, strict=True)):
            if stage:
                modules.append(nn.MaxPool2d(2))
            for _ in range(convs):
                modules += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
        self.features = nn.Sequential(*modules)
        self.linear = nn.ParameterList(torch.zeros(width) for width in WIDTHS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, original: Tensor, other: Tensor) -> Tensor:
        return torch.stack(self.layers(original, other)).sum(0)

    def layers(self, original: Tensor, other: Tensor) -> list[Tensor]:
        """(B,) of each of the five depths."""
        with torch.no_grad():
            wanted = self._taps(original)
        return [
            ((a - b).square() * weight.view(1, -1, 1, 1)).sum(1).mean((1, 2))
            for a, b, weight in zip(wanted, self._taps(other), self.linear, strict=True)
        ]

    def _taps(self, pictures: Tensor) -> list[Tensor]:
        x, taps = (pictures - self.shift) / self.scale, []
        for i, module in enumerate(self.features):
            x = module(x)
            if i in self.TAPS:
                taps.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return taps


def _read_checked(path: Path, kind: str, expected: str, source: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file. LPIPS needs it: {source}. Or set perceptual_weight=0.")
    found = hashlib.new(kind, path.read_bytes()).hexdigest()
    if not found.startswith(expected):
        raise UserError(f"{path}: its {kind} is {found}, not {expected}...: this is not {source}")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_lpips(vgg: Path, linear: Path) -> Lpips:
    """LPIPS from VGG16's weights and the published linear weights, both checked by hash. Raises `UserError`."""
    return build_lpips(
        _read_checked(vgg, "sha256", VGG_SHA256, VGG_SOURCE), _read_checked(linear, "md5", LINEAR_MD5, LINEAR_SOURCE)
    )


def build_lpips(vgg: dict[str, Tensor], linear: dict[str, Tensor]) -> Lpips:
    """From tensors under their published names, `features.0.weight` and `lin0.model.1.weight`."""
    model = Lpips()
    model.features.load_state_dict(
        {name.removeprefix("features."): tensor for name, tensor in vgg.items() if name.startswith("features.")}
    )
    for i, weight in enumerate(model.linear):
        weight.data = linear[f"lin{i}.model.1.weight"].flatten()
    return model
