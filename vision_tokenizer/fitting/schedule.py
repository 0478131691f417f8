"""The learning rate of every update, as published."""

import math


def learning_rate(update: int, total: int, *, lr: float, style: str, warmup: float, decay_ratio: float) -> float:
    """Of update `update`, counted from 1, of `total`; `warmup` is the share of them that the rate rises in."""
    rising = warmup * total
    if update <= rising:
        return lr * update / rising
    after = update - rising
    if style == "linear":
        return lr * (total - after) / total
    if style == "cosine":
        fall = (1 + math.cos(math.pi * min(1.0, after / total))) * (1 / decay_ratio - 1) / 2
        return lr * decay_ratio * (fall + 1)
    return lr
