"""Progress bars: of one process, and one for all workers of a run, on the first."""

import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from vistoken import store
from vistoken.cli import note
from vistoken.jobs.counts import Counts
from vistoken.jobs.workers import Workers

SECONDS_BETWEEN = 0.2  # tellings of what happens often: torchrun's ranks count in a store that all of them share


def bar(description: str, total: int | None = None, **more: Any) -> tqdm:
    """A bar over items: live in a terminal, a line now and then in a log file. `more` is for `tqdm`."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=description, unit="item", mininterval=interval, **more)


class Progress:
    """Items done and to do, time left, and the rates and losses of all workers together.

    `rates` are totals shown per second, `totals` totals shown as they are; `Counts` bring the items.
    """

    def __init__(
        self,
        workers: Workers,
        total: int | None,
        description: str,
        rates: tuple[str, ...] = ("images",),
        totals: tuple[str, ...] = (),
    ):
        self._workers, self._rates, self._totals = workers, rates, totals
        self._names = ("items", "found", "rejected", "failed", "retries", *rates, *totals)
        self._began = time.monotonic()
        self._bar = bar(description, total, disable=not workers.reports, smoothing=0.1)
        self._found = 0
        self._lock = threading.Lock()  # images are counted in one thread, results in another
        self._pending: Counter[str] = Counter()
        self._told = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if not self._workers.reports or any(error):
            return
        self._workers.add({"retries": store.retries.take()})
        if count := self._workers.totals(["retries"])["retries"]:
            note(f"{count:,} requests to a store were made again, as they failed in a way that passes")

    def count(self, **counts: int) -> None:
        """Add to what is shown as rates or totals."""
        self._workers.add(counts)
        self.refresh()

    def count_soon(self, **counts: int) -> None:
        """The same, but a few times a second only: for what happens thousands of times."""
        with self._lock:
            self._pending.update(counts)
            if time.monotonic() - self._told < SECONDS_BETWEEN:
                return
        self._tell()

    def _tell(self, **counts: int) -> None:
        with self._lock:
            counts = dict(self._pending + Counter(counts))
            self._pending.clear()
            self._told = time.monotonic()
        self.count(**counts)

    def done(self, counts: Counts, shown: int = 0) -> None:
        """The result of a chunk was written, of whose items so many were `shown` before."""
        told = {"rejected": counts.rejected, "failed": counts.failed, "retries": store.retries.take()}
        self._tell(items=counts.items - shown, **told)

    def found(self, counts: Counts) -> None:
        """A result was there already, from an earlier run: no progress of this one, so it is left out of the rate."""
        self.count(found=counts.items, rejected=counts.rejected, failed=counts.failed)

    def wait_for_all(self) -> None:
        """Return when every worker is through with its chunks; show meanwhile what the others do."""
        self._workers.wait_for_all(meanwhile=self.refresh)
        self.refresh()

    def refresh(self) -> None:
        if self._bar.disable:
            return
        with self._lock:
            self._show()

    def _show(self) -> None:
        if count := store.retries.take():
            self._workers.add({"retries": count})
        now = self._workers.totals(self._names)
        elapsed = max(time.monotonic() - self._began, 1e-9)
        shown = {f"{name}/s": f"{now[name] / elapsed:.3g}" for name in self._rates}
        shown |= {name: tqdm.format_sizeof(now[name]) for name in self._totals}
        self._bar.set_postfix({**shown, "rejected": now["rejected"], "failed": now["failed"]}, refresh=False)
        if now["found"] != self._found:  # moves the bar and the origin of its rate
            self._bar.initial += now["found"] - self._found
            self._bar.n += now["found"] - self._found
            self._found = now["found"]
        self._bar.update(now["items"] + now["found"] - self._bar.n)


class ItemsUnderWay:
    """Moves the bar as the images of a chunk's items are done, long before the result of the chunk is written.

    Counts images as the summary does: each time an item names one, where all images of the item were encoded.
    """

    def __init__(self, progress: Progress):
        self._progress, self.shown = progress, 0
        self._encoded: dict[Hashable, bool] = {}  # image -> whether it was
        self._images: dict[int, Sequence[Hashable]] = {}
        self._waiting: defaultdict[Hashable, list[int]] = defaultdict(list)  # image -> items
        self._left: Counter[int] = Counter()  # images that an item waits for

    def expect(self, item: int, images: Sequence[Hashable]) -> None:
        self._images[item] = images
        for image in dict.fromkeys(images):
            if image not in self._encoded:
                self._waiting[image].append(item)
                self._left[item] += 1
        if not self._left[item]:
            self._show(item)

    def image_done(self, image: Hashable, encoded: bool) -> None:
        self._encoded[image] = encoded
        for item in self._waiting.pop(image, ()):
            self._left[item] -= 1
            if not self._left[item]:
                self._show(item)

    def _show(self, item: int) -> None:
        self.shown += 1
        images = self._images.pop(item)
        self._progress.count_soon(items=1, images=len(images) if all(self._encoded[i] for i in images) else 0)


class Stopwatch:
    """Seconds by stage, of any thread: `with watch("encode"): ...`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._seconds[stage] += seconds

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - began)

    def take(self) -> dict[str, float]:
        """What was measured since the last call."""
        with self._lock:
            taken, self._seconds = self._seconds, defaultdict(float)
        return taken
