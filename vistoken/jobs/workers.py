"""How a process comes by its chunks, and how the crew learns that all are done.

- alone: every chunk, in order;
- torchrun: the next number of a counter in the rendezvous store, so fast ranks take more, on any number of nodes;
- `--rank=i --splits=n` processes of a bash loop, which share nothing but the disk: a contiguous range each.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta

from vistoken.errors import UserError

_CONNECT = timedelta(minutes=5)
_FOREVER = timedelta(days=30)  # ranks wait as long as the others work; one that dies takes the crew with it


class Solo:
    """One process does all."""

    rank, world_size = 0, 1
    leads = True  # whether this process tells of its progress and its result
    seat = 0, 1  # which result of how many its work goes into: a range has its own, the ranks of torchrun share one

    def __init__(self) -> None:
        self._tallies: Counter[str] = Counter()

    def chunk_range(self, total: int) -> range:
        """The chunks in [0, total) that go into the seat's result."""
        return range(total)

    def lead(self, step: Callable[[], None]) -> None:
        """Run `step` on the first rank while the others wait for it."""
        step()

    def claim(self, total: int) -> Iterator[int]:
        """Chunk numbers in [0, total) that this process is to do."""
        yield from self.chunk_range(total)

    def tally(self, counts: Mapping[str, int]) -> None:
        """Add to the crew's counters."""
        self._tallies.update(counts)

    def tallies(self, names: tuple[str, ...]) -> dict[str, int]:
        """The crew's counters now."""
        return {name: self._tallies[name] for name in names}

    def wait_for_crew(self) -> Iterator[None]:
        """To be called once all that was claimed is on the disk: yield now and then until the whole crew got here."""
        return iter(())


class Split(Solo):
    """Seat `rank` of `splits`: chunks [rank * total / splits, (rank + 1) * total / splits)."""

    def __init__(self, rank: int, splits: int):
        super().__init__()
        self.rank, self.world_size = self.seat = rank, splits

    def chunk_range(self, total: int) -> range:
        return range(self.rank * total // self.world_size, (self.rank + 1) * total // self.world_size)


class Torchrun:
    """A rank under torchrun. Its counters live in the store that torchrun itself rendezvoused through."""

    seat = 0, 1

    def __init__(self) -> None:
        from torch.distributed import PrefixStore, rendezvous

        store, self.rank, self.world_size = next(iter(rendezvous("env://", timeout=_CONNECT)))
        self.leads = self.rank == 0
        # after an elastic restart the counters begin anew; finished chunks are known from the disk
        self._store = PrefixStore(f"vistoken/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._led = 0

    def chunk_range(self, total: int) -> range:
        return range(total)

    def lead(self, step: Callable[[], None]) -> None:
        self._led += 1
        if self.rank == 0:
            step()
            self._store.set(f"led/{self._led}", b"")
        self._store.wait([f"led/{self._led}"], _FOREVER)

    def claim(self, total: int) -> Iterator[int]:
        agreed = int(self._store.compare_set("total", "", str(total)))
        if agreed != total:
            raise UserError(
                f"rank {self.rank} sees {total} chunks to do where another one sees {agreed}: "
                "every machine must see the same input and output folders"
            )
        while (number := self._store.add("claimed", 1) - 1) < total:
            yield number

    def tally(self, counts: Mapping[str, int]) -> None:
        for name, count in counts.items():
            if count:
                self._store.add(f"tally/{name}", count)

    def tallies(self, names: tuple[str, ...]) -> dict[str, int]:
        return {name: self._store.add(f"tally/{name}", 0) for name in names}

    def wait_for_crew(self) -> Iterator[None]:
        self._store.add("finished", 1)
        while self._store.add("finished", 0) < self.world_size:
            yield
            time.sleep(0.2)


Claims = Solo | Split | Torchrun


def crew() -> Claims:
    """The claims of this process: the store's where torchrun (or an equal) set its variables, else its own."""
    return Torchrun() if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() else Solo()
