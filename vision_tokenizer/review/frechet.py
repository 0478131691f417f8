"""The Frechet distance between two sets of features, from sums that merge.

Legend: N features, C their width.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass
class Moments:
    """Sums over features in fp64. Merged chunk by chunk in the chunks' order, they are the same whoever made them."""

    count: int
    total: np.ndarray  # (C,)
    products: np.ndarray  # (C, C)

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        wide = features.astype(np.float64)
        return cls(len(wide), wide.sum(0), wide.T @ wide)

    @classmethod
    def merged(cls, parts: Iterable["Moments"]) -> "Moments":
        first, *others = parts
        whole = cls(first.count, first.total.copy(), first.products.copy())
        for part in others:
            whole.count += part.count
            whole.total += part.total
            whole.products += part.products
        return whole

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        mean = self.total / self.count
        return mean, (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)


def frechet_distance(one: Moments, other: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)). Both need two features at least."""
    (mean, covariance), (other_mean, other_covariance) = one.mean_and_covariance(), other.mean_and_covariance()
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # sqrt(S1 S2) has the trace of sqrt(S1^(1/2) S2 S1^(1/2)), which is symmetric
    shared = np.sqrt(np.linalg.eigvalsh(root @ other_covariance @ root).clip(0)).sum()
    return float(((mean - other_mean) ** 2).sum() + np.trace(covariance) + np.trace(other_covariance) - 2 * shared)
