"""Number formats, and the search for the nearest code, which must not depend on them.

Legend: T tokens, K codes, d code width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vision_tokenizer.errors import UserError

# tf32 rounds the inputs of fp32 products on NVIDIA GPUs; elsewhere it computes as fp32 does
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# 1024 x 8192 fp32 distances are 32 MiB whatever the batch and the codebook
TOKENS_AT_ONCE = 1024
CODES_AT_ONCE = 8192

NO_CODE = -1  # of a feature that is not finite: weights are damaged, or fp16 overflowed


def choose_dtype(name: str) -> torch.dtype:
    """The torch dtype of one of the names in `DTYPES`. Raises `UserError`."""
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Compute fp32 matrix products and convolutions in IEEE fp32, or with TF32 inputs, and restore the setting."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def nearest_codes(features: Tensor, codebook: Tensor, half_norms: Tensor) -> Tensor:
    """Index of the codebook row nearest to each feature by Euclidean distance, the lowest on a tie.

    `features` (..., d) of any float dtype, `codebook` (K, d) and `half_norms` (K,) = |row|^2 / 2, both fp32; returns
    (...) int64, `NO_CODE` for a feature that is not finite. |x - c|^2 / 2 without its |x|^2 / 2 is |c|^2 / 2 - x c, so
    one product per block decides.
    """
    tokens = features.float().flatten(0, -2)
    with float32_products(tf32=False):
        blocks = [_nearest(block, codebook, half_norms) for block in tokens.split(TOKENS_AT_ONCE)]
    return torch.cat(blocks).view(features.shape[:-1])


def _nearest(tokens: Tensor, codebook: Tensor, half_norms: Tensor) -> Tensor:
    """(T, d) -> (T,), one block of codes after the other."""
    best = index = None
    for start in range(0, len(codebook), CODES_AT_ONCE):
        block = slice(start, start + CODES_AT_ONCE)
        distances = torch.addmm(half_norms[block], tokens, codebook[block].T, alpha=-1)  # (T, block)
        least, at = distances.min(dim=1)  # of equal minima, the first
        if best is None:
            best, index = least, at
        else:
            closer = least < best
            best, index = torch.where(closer, least, best), torch.where(closer, at + start, index)
    return index.masked_fill_(~tokens.isfinite().all(1), NO_CODE)
