"""What became of a job's items: every one ends in exactly one of done, rejected, failed."""

import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vistoken.errors import ItemError
from vistoken.jobs.chunks import Item
from vistoken.store import Location

SUMMARY = "run_summary.json"


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
    def of(cls, error: ItemError, file: Location, item: Item) -> "Problem":
        """`item` is one of `file`."""
        item_id = item.id if isinstance(item.id, str | int | float | None) else reprlib.repr(item.id)
        return cls(str(file), item.where, item.index, item_id, error.kind, error.reason, error.detail)


@dataclass
class Counts:
    """Items by what became of them. A job adds tallies of its own (images per anchor) and seconds by stage."""

    items: int = 0
    done: int = 0
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, reason) -> items
    tallies: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Counts") -> None:
        self.items += other.items
        self.done += other.done
        self.reasons += other.reasons
        self.tallies += other.tallies
        self.seconds += other.seconds

    @property
    def rejected(self) -> int:
        return sum(count for (kind, _), count in self.reasons.items() if kind == "rejected")

    @property
    def failed(self) -> int:
        return sum(count for (kind, _), count in self.reasons.items() if kind == "failed")

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
            "counts": dict(sorted(self.tallies.items())),
            "seconds": {stage: round(seconds, 3) for stage, seconds in sorted(self.seconds.items())},
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Counts":
        reasons: Counter[tuple[str, str]] = Counter()
        for name, count in stored["reasons"].items():
            kind, _, reason = name.partition(": ")
            reasons[kind, reason] = count
        return cls(stored["items"], stored["done"], reasons, Counter(stored["counts"]), Counter(stored["seconds"]))


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows (the first is the head) with aligned columns; numbers to the right."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    right = [all(isinstance(row[column], int | float) for row in rows[1:]) for column in range(len(cells[0]))]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def counts_table(counts: Mapping[str, Counts], what: str = "data set") -> str:
    """One row for each input and the reasons below it; done + rejected + failed = items is there to be seen."""
    rows: list[Sequence[object]] = [(what, "items", "done", "rejected", "failed")]
    rows += [(name, n.items, n.done, n.rejected, n.failed) for name, n in counts.items()]
    reasons = [
        f"  {name}: {kind}: {reason}: {count:,}"
        for name, n in counts.items()
        for (kind, reason), count in sorted(n.reasons.items())
    ]
    return "\n".join([table(rows), *reasons])


def time_line(counts: Counts, stages: Sequence[str], beside: Sequence[str]) -> str:
    """Where the time went, e.g. `encode 91%, wait for decode 6%, wait for write 3%; beside it decode 8.1 s`.

    `stages` are of the thread that feeds the device, `beside` those of other threads.
    """
    spent = sum(counts.seconds[stage] for stage in stages)
    if not spent:
        return "nothing to do"
    shares = ", ".join(f"{stage} {counts.seconds[stage] / spent:.0%}" for stage in stages)
    others = ", ".join(f"{stage} {counts.seconds[stage]:.1f} s" for stage in beside if counts.seconds[stage])
    return f"{shares}; beside it {others}" if others else shares
