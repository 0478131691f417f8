"""The account of a job: every item ends in exactly one of done, rejected, failed."""

import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vistoken.errors import ItemError
from vistoken.jobs.chunks import Item


@dataclass(frozen=True)
class Problem:
    """Why one item is not in the output; a line of `*.rejected.jsonl`."""

    file: str
    where: str  # "line 18" or "item 17"
    item: int  # index among the file's items, from 0
    id: str | int | float | None  # the item's own `id`, if it has one
    kind: str  # "rejected" or "failed"
    reason: str
    detail: str

    @classmethod
    def of(cls, error: ItemError, file: Path, item: Item) -> "Problem":
        """`item` is one of `file`, or anything else with its `where`, `index` and `id`."""
        item_id = item.id if isinstance(item.id, str | int | float | None) else reprlib.repr(item.id)
        return cls(str(file), item.where, item.index, item_id, error.kind, error.reason, error.detail)


@dataclass
class Account:
    """What became of some items. `counts` and `seconds` are tallies a job adds (images per anchor, stages)."""

    items: int = 0
    done: int = 0
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, reason) -> items
    counts: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Account") -> None:
        self.items += other.items
        self.done += other.done
        self.reasons += other.reasons
        self.counts += other.counts
        self.seconds += other.seconds

    def total(self, kind: str) -> int:
        return sum(count for (of, _), count in self.reasons.items() if of == kind)

    @property
    def rejected(self) -> int:
        return self.total("rejected")

    @property
    def failed(self) -> int:
        return self.total("failed")

    @property
    def failed_share(self) -> float:
        return self.failed / self.items if self.items else 0.0

    def check(self, what: str) -> None:
        """done + rejected + failed = input, or the job is wrong."""
        if self.done + self.rejected + self.failed != self.items:
            raise AssertionError(
                f"{what}: {self.items} items in, but {self.done} done + {self.rejected} rejected + {self.failed} failed"
            )

    def as_dict(self) -> dict[str, Any]:
        return {
            "items": self.items,
            "done": self.done,
            "rejected": self.rejected,
            "failed": self.failed,
            "reasons": {f"{kind}: {reason}": n for (kind, reason), n in sorted(self.reasons.items())},
            "counts": dict(sorted(self.counts.items())),
            "seconds": {stage: round(seconds, 3) for stage, seconds in sorted(self.seconds.items())},
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Account":
        reasons = {tuple(name.split(": ", 1)): n for name, n in stored["reasons"].items()}
        return cls(
            stored["items"], stored["done"], Counter(reasons), Counter(stored["counts"]), Counter(stored["seconds"])
        )
