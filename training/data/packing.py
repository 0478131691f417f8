"""What the model reads: samples with room made for their images' features, and packed batches of them.

Legend: L tokens of a sample, T tokens of a batch, F continuous tokens of a batch, N tiles, S side of a tile.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from pre_tokenize.token_file import IGNORE
from training.data.anyres import NEWLINE, ImageInput
from vision_tokenizer.models.chameleon.vocabulary import RELEASED_MARKS

IMAGE_START, IMAGE_END = RELEASED_MARKS.image_start, RELEASED_MARKS.image_end
SEPARATOR, NEWLINE_TOKEN = RELEASED_MARKS.separator, RELEASED_MARKS.new_line


@dataclass(frozen=True)
class Sample:
    """One training example with its continuous tokens in place."""

    name: str  # the record it comes from and its id there
    tokens: np.ndarray  # (L,) int64; 0 under a continuous token
    labels: np.ndarray  # (L,) int64, IGNORE where nothing is learned
    features: np.ndarray  # (L,) int64 row among the features of the sample's tiles, -1 for discrete tokens
    tiles: list[np.ndarray]  # one (N, 3, S, S) uint8 array per image
    feature_count: int  # features that the tower makes of the tiles

    def __len__(self) -> int:
        return len(self.tokens)


class Skipped(NamedTuple):
    """A sample that could not be used, and what stood in for it."""

    name: str
    reason: str
    instead: str


@dataclass(frozen=True)
class Batch:
    """Samples one after another, without padding."""

    names: list[str]
    tokens: torch.Tensor  # (T,) int64
    learned: torch.Tensor  # (K,) int64: positions from which the next token of the same sample is learned
    targets: torch.Tensor  # (K,) int64: these next tokens
    positions: torch.Tensor  # (T,) int64 inside the sample
    lengths: torch.Tensor  # (samples,) int64, stays on CPU
    feature_places: torch.Tensor  # (F,) int64: where in the sequence a feature stands
    feature_rows: torch.Tensor  # (F,) int64: which row of the tower's output it is
    tiles: torch.Tensor  # (N, 3, S, S) uint8, at least one
    skipped: Sequence[Skipped] = ()  # samples that others stand in for

    @property
    def label_count(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> "Batch":
        return self._with(lambda tensor: tensor.to(device, non_blocking=True), self.lengths)

    def pin_memory(self) -> "Batch":
        return self._with(torch.Tensor.pin_memory, self.lengths.pin_memory())

    def _with(self, moved: Callable[[torch.Tensor], torch.Tensor], lengths: torch.Tensor) -> "Batch":
        """All other tensors moved."""
        others = ((name, value) for name, value in vars(self).items() if name != "lengths")
        tensors: dict[str, Any] = {name: moved(value) for name, value in others if isinstance(value, torch.Tensor)}
        return replace(self, lengths=lengths, **tensors)


def discrete(name: str, tokens: np.ndarray, labels: np.ndarray) -> Sample:
    """A sample of a model without a vision tower, in whose vocabulary Chameleon's ids mean something else."""
    return Sample(name, tokens.astype(np.int64), labels.astype(np.int64), np.full(len(tokens), -1), [], 0)


def interleave(name: str, tokens: np.ndarray, labels: np.ndarray, images: list[ImageInput]) -> Sample:
    """Put each image's separator and continuous tokens before the end of its block of discrete ones.

    `tokens` and `labels` are (l,), with one block end for each of `images`. The separator is always learned.
    """
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # (tokens, labels, features)
    separator = np.array([SEPARATOR])
    start, row = 0, 0
    for end, image in zip(np.flatnonzero(tokens == IMAGE_END), images, strict=True):
        newline = image.layout == NEWLINE
        rows = np.where(newline, -1, image.layout + row)
        pieces += [
            (tokens[start:end], labels[start:end], np.full(end - start, -1)),
            (separator, separator, np.array([-1])),
            (np.where(newline, NEWLINE_TOKEN, 0), np.full(len(newline), IGNORE), rows),
        ]
        start, row = int(end), row + image.feature_count
    pieces.append((tokens[start:], labels[start:], np.full(len(tokens) - start, -1)))
    ids, learned, features = (np.concatenate(column).astype(np.int64) for column in zip(*pieces, strict=True))
    return Sample(name, ids, learned, features, [image.tiles for image in images], row)


def pack(samples: list[Sample], side: int, skipped: Sequence[Skipped] = ()) -> Batch:
    """Join samples into one sequence. `side` is a tile's, for the blank one that stands in where no sample has any:
    the tower runs on every rank in every step, or sharded parameters would wait for each other forever.
    """
    targets = np.concatenate([np.append(sample.labels[1:], IGNORE) for sample in samples])
    learned = np.flatnonzero(targets >= 0)  # chosen here: on a GPU this would wait for the device
    row_starts = np.cumsum([0] + [sample.feature_count for sample in samples[:-1]])
    rows = np.concatenate(
        [np.where(s.features >= 0, s.features + start, -1) for s, start in zip(samples, row_starts, strict=True)]
    )
    tiles = [tiles for sample in samples for tiles in sample.tiles] or [np.zeros((1, 3, side, side), np.uint8)]
    return Batch(
        names=[sample.name for sample in samples],
        tokens=torch.from_numpy(np.concatenate([sample.tokens for sample in samples])),
        learned=torch.from_numpy(learned),
        targets=torch.from_numpy(targets[learned]),
        positions=torch.from_numpy(np.concatenate([np.arange(len(sample)) for sample in samples])),
        lengths=torch.tensor([len(sample) for sample in samples]),
        feature_places=torch.from_numpy(np.flatnonzero(rows >= 0)),
        feature_rows=torch.from_numpy(rows[rows >= 0]),
        tiles=torch.from_numpy(np.concatenate(tiles)),
        skipped=skipped,
    )
