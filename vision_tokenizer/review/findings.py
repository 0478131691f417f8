"""What the verifying commands say, and what they look at more closely."""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

SHOWN = 5  # findings of a kind that are told in words

T = TypeVar("T")


@dataclass
class Findings:
    """What is wrong, counted by kind, the first few of each in words."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, detail: str) -> None:
        self.counts[kind] += 1
        if len(self.examples[kind]) < SHOWN:
            self.examples[kind].append(detail)

    def __str__(self) -> str:
        lines = []
        for kind, count in sorted(self.counts.items()):
            lines += [f"{kind}: {count:,}", *(f"    {example}" for example in self.examples[kind])]
            lines += ["    ..."] if count > len(self.examples[kind]) else []
        return "\n".join(lines)


def draw(length: int, count: int, seed: int) -> list[int]:
    """`count` positions of `length`, drawn evenly, in order; the same ones for the same seed."""
    return sorted(random.Random(seed).sample(range(length), min(count, length)))


class Sample(Generic[T]):
    """`size` things drawn evenly from all that are offered, the same ones for the same seed."""

    def __init__(self, size: int, seed: int):
        self.size, self._seen, self._random = size, 0, random.Random(seed)
        self.drawn: list[T] = []

    def offer(self, thing: T) -> None:
        self._seen += 1
        if len(self.drawn) < self.size:
            self.drawn.append(thing)
        elif (slot := self._random.randrange(self._seen)) < self.size:
            self.drawn[slot] = thing
