"""How near a reconstruction is to its original, and how well codes use their codebook.

PSNR and SSIM as usual for 8-bit RGB: SSIM (Wang et al. 2004) with an 11 x 11 Gaussian window of sigma 1.5 at full
overlap, averaged over the channels.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5


def psnr(original: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 tensors (3, H, W); infinite for equal ones."""
    error = (original.double() - other.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(original: Tensor, other: Tensor) -> float:
    """Structural similarity of two uint8 tensors (3, H, W), sides of at least 11; 1 for equal ones."""
    line = torch.exp(-((torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2) ** 2) / (2 * _SIGMA**2))
    line = line / line.sum()

    def mean(values: Tensor) -> Tensor:  # (3, H, W) -> (3, 1, H - 10, W - 10)
        return F.conv2d(F.conv2d(values[:, None], line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    return _ssim(original.double(), other.double(), mean, data_range=255)


class CodeUse:
    """How often each code of a codebook of `size` occurs."""

    def __init__(self, size: int):
        self.counts = np.zeros(size, np.int64)

    def add(self, codes: np.ndarray) -> None:
        self.counts += np.bincount(codes.ravel(), minlength=len(self.counts))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def distinct(self) -> int:
        return int(np.count_nonzero(self.counts))

    @property
    def dead_share(self) -> float:
        """Of the codebook: codes that do not occur."""
        return 1 - self.distinct / len(self.counts)

    @property
    def perplexity(self) -> float:
        """The number of codes that, used evenly, would carry as much information: between 1 and the size."""
        shares = self.counts[self.counts > 0] / max(self.total, 1)
        return math.exp(-(shares * np.log(shares)).sum()) if self.total else 0.0

    def most_used(self, count: int) -> list[tuple[int, int]]:
        """(code, occurrences), most first."""
        order = np.argsort(-self.counts, kind="stable")[:count]
        return [(int(code), int(self.counts[code])) for code in order if self.counts[code]]


def ssim_uniform(original: Tensor, other: Tensor, data_range: float) -> float:
    """Structural similarity with scikit-image's defaults: 7 x 7 uniform windows, sample covariance, values in [0, 1].

    The published evaluation of DualViTok gives it `data_range=2`, which flatters; 1 is right. uint8 (3, H, W) tensors.
    """
    side = 7

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values[None], side, stride=1)[0]

    return _ssim(original.double() / 255, other.double() / 255, mean, data_range, correction=side**2 / (side**2 - 1))


def _ssim(x: Tensor, y: Tensor, mean: Callable[[Tensor], Tensor], data_range: float, correction: float = 1.0) -> float:
    """`mean` is over a window at each place; `correction` is of its variances."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = correction * (mean(x * x) - mean_x**2), correction * (mean(y * y) - mean_y**2)
    covariance = correction * (mean(x * y) - mean_x * mean_y)
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (alike / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean().item()
