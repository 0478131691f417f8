"""What the verify commands found, and how they choose the few things that they look at closely."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import orjson

from vision_tokenizer.codebook.read import read_lines
from vistoken.store import Location

EXAMPLES = 5  # issues of a kind that are told in full

T = TypeVar("T")


@dataclass
class Issues:
    """What is wrong: counted by kind, with the first few of each kind in full."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, detail: str) -> None:
        self.counts[kind] += 1
        if len(self.examples[kind]) < EXAMPLES:
            self.examples[kind].append(detail)

    def __str__(self) -> str:
        if not self.counts:
            return "no issues"
        lines = []
        for kind, count in sorted(self.counts.items()):
            lines += [f"{kind}: {count:,}", *(f"    {example}" for example in self.examples[kind])]
            lines += ["    ..."] if count > len(self.examples[kind]) else []
        total = self.counts.total()
        return "\n".join([*lines, "", f"{total:,} issue{'s' if total > 1 else ''}"])


def rejected_entries(path: Location, issues: Issues) -> Iterator[dict[str, Any]]:
    """What a `*.rejected.jsonl` has of each item, if there is such a file; a line that tells nothing is an issue."""
    for number, line in enumerate(read_lines(path) if path.exists() else (), start=1):
        try:
            entry = orjson.loads(line)
            read = {"item": int(entry["item"]), "kind": str(entry["kind"]), "reason": str(entry["reason"])}
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            issues.add("broken entry", f"{path}, line {number}: {error}")
        else:
            yield read


def draw(length: int, count: int, seed: int) -> list[int]:
    """`count` positions of `length`, drawn evenly, in order. The same seed draws the same ones."""
    return sorted(random.Random(seed).sample(range(length), min(count, length)))


class Reservoir(Generic[T]):
    """`size` things, drawn evenly from all that are offered. The same seed draws the same ones."""

    def __init__(self, size: int, seed: int):
        self.size, self._seen, self._random = size, 0, random.Random(seed)
        self.drawn: list[T] = []

    def offer(self, thing: T) -> None:
        self._seen += 1
        if len(self.drawn) < self.size:
            self.drawn.append(thing)
        elif (slot := self._random.randrange(self._seen)) < self.size:
            self.drawn[slot] = thing
