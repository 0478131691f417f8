"""The search for the nearest code, which must not depend on the number format of the model.

Legend: T tokens, K codes, d code width.
"""

import torch
from torch import Tensor

from vistoken.device import float32_products

# 1024 x 8192 fp32 distances are 32 MiB whatever the batch and the codebook
TOKENS_AT_ONCE = 1024
CODES_AT_ONCE = 8192

NO_CODE = -1  # of a feature that is not finite: weights are damaged, or fp16 overflowed


def nearest_codes(features: Tensor, codebook: Tensor, half_norms: Tensor) -> Tensor:
    """Index of the codebook row nearest to each feature by Euclidean distance, the lowest on a tie.

    `features` (..., d) of any float dtype, `codebook` (K, d) and `half_norms` (K,) = |row|^2 / 2, both fp32 (or fp64,
    which then decides); returns (...) int64, `NO_CODE` for a feature that is not finite. |x - c|^2 / 2 without its
    |x|^2 / 2 is |c|^2 / 2 - x c, so one product per block decides.
    """
    tokens = features.to(codebook.dtype).flatten(0, -2)
    with float32_products(tf32=False):
        blocks = [_nearest(block, codebook, half_norms) for block in tokens.split(TOKENS_AT_ONCE)]
    return torch.cat(blocks).view(features.shape[:-1])


def _nearest(tokens: Tensor, codebook: Tensor, half_norms: Tensor) -> Tensor:
    """(T, d) -> (T,), one block of codes after the other."""
    best: Tensor | None = None
    index: Tensor | None = None
    for start in range(0, len(codebook), CODES_AT_ONCE):
        block = slice(start, start + CODES_AT_ONCE)
        distances = torch.addmm(half_norms[block], tokens, codebook[block].T, alpha=-1)  # (T, block)
        least, at = distances.min(dim=1)  # of equal minima, the first
        if best is None or index is None:
            best, index = least, at
        else:
            closer = least < best
            best, index = torch.where(closer, least, best), torch.where(closer, at + start, index)
    assert index is not None  # a codebook has rows
    return index.masked_fill_(~tokens.isfinite().all(1), NO_CODE)
