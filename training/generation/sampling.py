"""From scores to the next token: what is allowed, temperature, top-k, top-p, and the draw.

Legend: R rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens of one kind are drawn."""

    temperature: float = 1.0
    top_k: int = 0  # as many of the greatest scores stay, and those equal to the last; 0: all
    top_p: float = 1.0  # tokens stay until those before them exceed this probability


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022) of raw logits."""
    return scale * (conditional - unconditional) + unconditional


def restrict(scores: Tensor, allowed: Tensor, kinds: Sequence[Sampling]) -> Tensor:
    """(R, V) float scores -> the same divided by the temperature, -inf for what is not `allowed` (R, V) or filtered
    out. `kinds` has one `Sampling` a row.
    """
    scores = scores.masked_fill(~allowed, -torch.inf)
    scores = scores / scores.new_tensor([kind.temperature for kind in kinds])[:, None]
    top_k = [min(kind.top_k or scores.shape[1], scores.shape[1]) for kind in kinds]
    if min(top_k) < scores.shape[1]:
        limited = [row for row, k in enumerate(top_k) if k < scores.shape[1]]
        best = scores[limited].topk(max(top_k[row] for row in limited)).values
        last = torch.tensor([[top_k[row] - 1] for row in limited], device=scores.device)
        threshold = scores.new_full((len(kinds), 1), -torch.inf)
        threshold[limited] = best.gather(1, last)
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    if any(kind.top_p < 1 for kind in kinds):
        ordered, places = scores.sort(descending=True)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability
        top_p = scores.new_tensor([kind.top_p for kind in kinds])[:, None]
        gone = (before > top_p) & (top_p < 1)
        gone[:, 0] = False
        scores = ordered.masked_fill(gone, -torch.inf).gather(1, places.argsort())
    return scores


def draw(scores: Tensor, noise: Sequence[float]) -> list[int]:
    """(R, V) scores of `restrict` and a number from [0, 1) a row -> a token each, with the probability of its score."""
    cumulated = scores.double().softmax(-1).cumsum(-1)
    reached = cumulated.new_tensor(noise)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, reached, right=True).squeeze(1).clamp(max=scores.shape[1] - 1).tolist()
