"""Progress bars: of one process, and one for the whole crew, on rank 0."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from vistoken.jobs.counts import Account
from vistoken.jobs.workers import Claims


def bar(description: str, total: int | None = None, **more: Any) -> tqdm:
    """A bar over items: live in a terminal, a line now and then in a log file. `more` is for `tqdm`."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=description, unit="item", mininterval=interval, **more)


class Progress:
    """Items done and to do, time left, and the crew's rates and losses.

    `rates` are tallies shown per second, `totals` tallies shown as they are; `Account`s bring the items.
    """

    def __init__(
        self,
        claims: Claims,
        total: int,
        description: str,
        rates: tuple[str, ...] = ("images",),
        totals: tuple[str, ...] = (),
    ):
        self._claims, self._rates, self._totals = claims, rates, totals
        self._names = ("items", "found", "rejected", "failed", *rates, *totals)
        self._began = time.monotonic()
        self._bar = bar(description, total, disable=not claims.leads, smoothing=0.1)
        self._found = 0

    def count(self, **tallies: int) -> None:
        """Add to the tallies shown as rates or totals."""
        self._claims.tally(tallies)
        self.refresh()

    def part(self, account: Account) -> None:
        """A chunk was completed."""
        self._tally_items("items", account)

    def found(self, account: Account) -> None:
        """A chunk was there already, from an earlier run: no progress of this one, so it is left out of the rate."""
        self._tally_items("found", account)

    def _tally_items(self, name: str, account: Account) -> None:
        self._claims.tally({name: account.items, "rejected": account.rejected, "failed": account.failed})
        self.refresh()

    def refresh(self) -> None:
        if self._bar.disable:
            return
        now = self._claims.tallies(self._names)
        elapsed = max(time.monotonic() - self._began, 1e-9)
        shown = {f"{name}/s": f"{now[name] / elapsed:.3g}" for name in self._rates}
        shown |= {name: tqdm.format_sizeof(now[name]) for name in self._totals}
        self._bar.set_postfix({**shown, "rejected": now["rejected"], "failed": now["failed"]}, refresh=False)
        if now["found"] != self._found:  # moves the bar and the origin of its rate
            self._bar.initial += now["found"] - self._found
            self._bar.n += now["found"] - self._found
            self._found = now["found"]
        self._bar.update(now["items"] + now["found"] - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class Stopwatch:
    """Seconds by stage: `with watch("encode"): ...`."""

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()

    def add(self, stage: str, seconds: float) -> None:
        self._seconds[stage] += seconds

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - began)

    def take(self) -> Counter[str]:
        """What was measured since the last call."""
        taken, self._seconds = self._seconds, Counter()
        return taken
