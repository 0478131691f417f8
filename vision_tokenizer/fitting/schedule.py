"""The learning rate of every update, as published."""

import math

from vision_tokenizer.fitting.config import RunSettings


def learning_rate(update: int, total: int, settings: RunSettings) -> float:
    """Of update `update`, counted from 1, of `total`."""
    lr, rising = settings.lr, settings.warmup * total
    if update <= rising:
        return lr * update / rising
    after = update - rising
    if settings.lr_decay_style == "linear":
        return lr * (total - after) / total
    if settings.lr_decay_style == "cosine":
        fall = (1 + math.cos(math.pi * min(1.0, after / total))) * (1 / settings.lr_decay_ratio - 1) / 2
        return lr * settings.lr_decay_ratio * (fall + 1)
    return lr
