"""The order of training: which samples make up which step.

Everything is a function of the seed, the epoch and the number of the step, so a position is two integers and nothing
has to be kept or stored: records are shuffled by a keyed permutation that is computed where it is needed.
Steps are global. Processes and accumulated batches only share one out, so the order does not depend on how many
there are.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vistoken.store import Location

WINDOW = 1 << 16  # samples among which those of similar length are gathered


@dataclass(frozen=True)
class Source:
    """A record in a data config."""

    path: Location
    ratio: float = 1.0  # share drawn in an epoch; above 1 repeats
    type: str = "default"  # batches hold one type only
    image_dir: Location | None = None  # where relative images begin, if not where they did when the tokens were made
    validation: float = 0.0  # share that is never trained on, by a hash of the id


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenSource(Source):
    """One whose record is open."""

    lengths: np.ndarray  # (n,) discrete tokens
    continuous: Callable[[np.ndarray], np.ndarray] | None = None  # rows -> their continuous tokens

    @property
    def drawn(self) -> int:
        return round(len(self.lengths) * self.ratio)

    def tokens(self, rows: np.ndarray, limit: int | None = None) -> np.ndarray:
        """How long these samples are with their continuous tokens, the discrete ones being cut at `limit`."""
        lengths = np.minimum(self.lengths[rows], limit or np.iinfo(np.int32).max).astype(np.int64)
        return lengths + self.continuous(rows) if self.continuous else lengths


def permute(positions: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Where `positions` (int64, below `size`) go under the permutation of range(size) that `key` names.

    A Feistel network over the next power of four, walked again where it leaves the range (Black and Rogaway, 2002):
    no table, so a permutation of any size costs nothing to make.
    """
    half = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    rounds = np.random.SeedSequence([size, *key]).generate_state(6, np.uint64)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_key in rounds:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        values[outside] = (left << half) | right
        outside = values >= size
    return values.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64; products wrap around, as they should."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(keys: np.ndarray) -> np.ndarray:
    """Whole numbers -> numbers in [0, 1), always the same for the same one."""
    return _mix(_mix(keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))) / 2.0**64


class Sampler:
    """Global steps of `step_size` samples of one type and of similar length.

    A sample is known by its number: the rows of all sources counted through; `starts` holds each source's first.
    """

    def __init__(self, sources: Sequence[OpenSource], step_size: int, seed: int, window: int = WINDOW):
        self.sources, self.step_size, self.seed = sources, step_size, seed
        self.window = max(window // step_size, 1)  # in steps
        self.starts = np.cumsum([0, *(len(source.lengths) for source in sources)])
        self.types = sorted({source.type for source in sources})
        self._members = [[i for i, source in enumerate(sources) if source.type == name] for name in self.types]
        self._drawn = [np.array([sources[i].drawn for i in members]) for members in self._members]
        self.type_steps = [int(drawn.sum()) // step_size for drawn in self._drawn]

    def __len__(self) -> int:
        """Steps in an epoch; what does not fill one is left out, other samples in every epoch."""
        return sum(self.type_steps)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """The steps of an epoch from number `start` on: sample numbers, sorted by length."""
        order = self.order(epoch)
        done = np.bincount(order[:start], minlength=len(self.types))
        streams = [self._type_steps(kind, epoch, int(done[kind])) for kind in range(len(self.types))]
        for kind in order[start:]:
            yield next(streams[kind])

    def order(self, epoch: int) -> np.ndarray:
        """Which of `types` each step of an epoch has, (steps,)."""
        order = np.repeat(np.arange(len(self.types)), self.type_steps)
        np.random.default_rng([self.seed, epoch, 0]).shuffle(order)
        return order

    def _type_steps(self, kind: int, epoch: int, start: int) -> Iterator[list[int]]:
        for window in range(start // self.window, -(-self.type_steps[kind] // self.window)):
            first = window * self.window
            last = min(first + self.window, self.type_steps[kind])
            samples = self._draw(kind, epoch, np.arange(first * self.step_size, last * self.step_size))
            by_length = np.argsort(self.tokens(samples), kind="stable").reshape(-1, self.step_size)
            np.random.default_rng([self.seed, epoch, 1, kind, window]).shuffle(by_length)
            for step in by_length[max(start - first, 0) :]:
                yield samples[step].tolist()

    def tokens(self, samples: np.ndarray, limit: int | None = None) -> np.ndarray:
        """How long each of these samples is, see `Source.tokens`."""
        owners = np.searchsorted(self.starts, samples, side="right") - 1
        lengths = np.empty(len(samples), np.int64)
        for owner in np.unique(owners):
            own = owners == owner
            lengths[own] = self.sources[owner].tokens(samples[own] - self.starts[owner], limit)
        return lengths

    def _draw(self, kind: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The samples at `positions` of a type's shuffled epoch."""
        drawn = self._drawn[kind]
        shuffled = permute(positions, int(drawn.sum()), (self.seed, epoch, 2, kind))
        ends = np.cumsum(drawn)
        member = np.searchsorted(ends, shuffled, side="right")
        place = shuffled - (ends - drawn)[member]
        samples = np.empty(len(positions), np.int64)
        for number, source in enumerate(self._members[kind]):
            size = len(self.sources[source].lengths)
            turns = np.where(member == number, place // max(size, 1), -1)  # above ratio 1 the record is used again
            for turn in np.unique(turns[turns >= 0]):
                chosen = np.flatnonzero(turns == turn)
                rows = permute(place[chosen] % size, size, (self.seed, epoch, 3, source, int(turn)))
                samples[chosen] = self.starts[source] + rows
        return samples


def share_out(lengths: np.ndarray, processes: int, budget: int) -> list[list[list[int]]]:
    """Positions in `lengths` by batch and process: a step's samples in as few batches as hold `budget` tokens each.

    Only a sample that is longer by itself exceeds it. Each process gets as many batches, none empty, and those that
    are computed at the same time are about as long. `lengths` is (samples,), a multiple of `processes`.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    batches = max(-(-int(np.minimum(lengths, budget).sum()) // (budget * processes)), 1)
    while True:
        emptiest = [(0, number) for number in range(batches * processes)]  # a heap
        found: list[list[int]] = [[] for _ in emptiest]
        for position in longest_first:
            load, number = heapq.heappop(emptiest)
            found[number].append(int(position))
            heapq.heappush(emptiest, (load + max(int(lengths[position]), 1), number))
        if all(load <= budget or len(found[number]) == 1 for load, number in emptiest):
            break
        batches += 1
    by_load = [sorted(found[number]) for _, number in sorted(emptiest, reverse=True)]
    return [by_load[start : start + processes] for start in range(0, len(by_load), processes)]


@dataclass(frozen=True)
class RankBatches:
    """What one process loads: its share of each step, batch by batch, from a position until the last epoch's end.

    A step has `accumulation` batches of as many samples, neighbours in length going to different processes, so that
    these take about the same time; with a `budget` of tokens, as many batches as `share_out` makes of it.
    """

    sampler: Sampler
    epochs: int
    accumulation: int
    rank: int
    world: int
    position: tuple[int, int]  # an epoch and a step in it
    condition_dropout: float = 0.0  # share of samples that come as -1 - number: without their condition, see `Batches`
    budget: int | None = None
    limit: int | None = None  # where the samples' discrete tokens are cut off

    def __iter__(self) -> Iterator[list[int]]:
        for batches in self.steps():
            yield from batches

    def steps(self) -> Iterator[list[list[int]]]:
        """This process's batches of each step."""
        first, step = self.position
        size = self.sampler.step_size // self.accumulation
        for epoch in range(first, self.epochs):
            for samples in self.sampler.epoch(epoch, step if epoch == first else 0):
                if self.budget:
                    shares = share_out(self.sampler.tokens(np.array(samples), self.limit), self.world, self.budget)
                    batches = [[samples[position] for position in batch[self.rank]] for batch in shares]
                else:
                    starts = range(0, len(samples), size)
                    batches = [samples[start : start + size][self.rank :: self.world] for start in starts]
                yield [self._dropped(batch, epoch) for batch in batches]

    def _dropped(self, samples: list[int], epoch: int) -> list[int]:
        """By sample and epoch, so that neither the step nor the process decides."""
        if not self.condition_dropout:
            return samples
        key = np.random.SeedSequence([self.sampler.seed, epoch, 4]).generate_state(1, np.uint64)
        drawn = uniform(np.array(samples, np.uint64) + key) < self.condition_dropout
        return [-1 - number if drop else number for number, drop in zip(samples, drawn, strict=True)]
