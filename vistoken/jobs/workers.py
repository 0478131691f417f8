"""Who does which chunk, and how the workers of one run learn that all are done.

- `OneProcess`: every chunk, in order;
- `SharedQueue`: the processes of torchrun, or of srun, take the next number of a counter in its rendezvous store, so
  fast ranks do more, on any number of machines;
- `FixedRange`: process `--rank=i` of the `--splits=n` of a shell loop, an array or an indexed job, which share nothing
  but the output, does a contiguous range; who ends last joins the results;
- `RayWorker`, see `ray_workers.py`.
"""

import os
import re
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

from vistoken.cli import Outcome, stopping
from vistoken.errors import Failed, Preempted, UserError
from vistoken.jobs.files import run_lock
from vistoken.store import Location

T = TypeVar("T")

_CONNECT = timedelta(minutes=5)
_FOREVER = timedelta(days=30)  # ranks wait as long as the others work; torchrun ends them all where one dies
_GOODBYE = 30.0  # seconds that rank 0 keeps the store for ranks that have not left it


class OneProcess:
    """One process does all."""

    rank, world_size = 0, 1
    waits = True  # whether after `wait_for_all` every chunk of the run is done, those of others, too
    reports = True  # whether this worker shows progress and prints the result
    share = 0, 1  # which final record of how many its chunks go into: ranges write one each, torchrun's ranks share one

    def __init__(self) -> None:
        self._totals: Counter[str] = Counter()
        self._left = 0  # chunks that were not claimed any more

    def chunk_range(self, total: int) -> range:
        """The numbers of the chunks, of `total`, that go into the record of this worker's share."""
        return range(total)

    def claim(self, chunks: Sequence[T]) -> Iterator[T]:
        """The chunks that this worker is to do."""
        for number in self.chunk_range(len(chunks)):
            if stopping.is_set():
                self._left += 1
            else:
                yield chunks[number]

    def finished(self, number: int) -> None:
        """The result of this chunk of those of `claim` is complete."""

    def given_up(self, number: int) -> Failed | None:
        """Why the items of this chunk are not to be tried any more."""
        return None

    def on_first(self, step: Callable[[], None]) -> None:
        """Run `step` on the first worker while the others wait for it."""
        step()

    def lock(self, folder: Location) -> AbstractContextManager[bool]:
        """Hold `folder` against other runs; as `run_lock`."""
        return run_lock(folder, *self.share)

    def add(self, counts: Mapping[str, int]) -> None:
        """Add to the run's totals."""
        self._totals.update(counts)

    def totals(self, names: Sequence[str]) -> dict[str, int]:
        """The run's totals now."""
        return {name: self._totals[name] for name in names}

    def wait_for_all(self, meanwhile: Callable[[], None]) -> None:
        """Call once the results of all claimed chunks are written: return when every worker has got here.

        Raises `Preempted` where chunks are left that nobody claims any more.
        """
        if self._left:
            raise _preempted(self._left)


class FixedRange(OneProcess):
    """Worker `rank` of `splits`: chunks [rank * total // splits, (rank + 1) * total // splits)."""

    waits = False

    def __init__(self, rank: int, splits: int):
        super().__init__()
        self.rank, self.world_size = self.share = rank, splits

    def chunk_range(self, total: int) -> range:
        return range(self.rank * total // self.world_size, (self.rank + 1) * total // self.world_size)


class SharedQueue(OneProcess):
    """A rank under torchrun. Queue and totals live in the store that torchrun itself rendezvoused through."""

    def __init__(self) -> None:
        from torch.distributed import PrefixStore, rendezvous

        store, self.rank, self.world_size = next(iter(rendezvous("env://", timeout=_CONNECT)))
        self.reports = self.rank == 0
        # after an elastic restart the counters begin anew; finished chunks are known from the disk
        self._store = PrefixStore(f"vistoken/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._steps = self._chunks = 0

    def claim(self, chunks: Sequence[T]) -> Iterator[T]:
        agreed = int(self._store.compare_set("total", "", str(len(chunks))))
        if agreed != len(chunks):
            raise UserError(
                f"rank {self.rank} sees {len(chunks)} chunks to do where another one sees {agreed}: "
                "every machine must see the same input and output folders"
            )
        self._chunks = len(chunks)
        while not stopping.is_set() and (number := self._store.add("claimed", 1) - 1) < len(chunks):
            yield chunks[number]

    def on_first(self, step: Callable[[], None]) -> None:
        self._steps += 1
        if self.rank == 0:
            step()
            self._store.set(f"step/{self._steps}", "")
        self._store.wait([f"step/{self._steps}"], _FOREVER)

    def add(self, counts: Mapping[str, int]) -> None:
        for name, count in counts.items():
            if count:
                self._store.add(f"total/{name}", count)

    def totals(self, names: Sequence[str]) -> dict[str, int]:
        return {name: self._store.add(f"total/{name}", 0) for name in names}

    def wait_for_all(self, meanwhile: Callable[[], None]) -> None:
        """Rank 0 may hold the store itself (under launchers other than torchrun), so it leaves last."""
        self._store.add("finished", 1)
        while self._store.add("finished", 0) < self.world_size:
            meanwhile()
            time.sleep(0.2)
        unclaimed = self._chunks - self._store.add("claimed", 0)
        left, patience = self._store.add("left", 1), time.monotonic() + _GOODBYE
        while self.rank == 0 and left < self.world_size and time.monotonic() < patience:
            time.sleep(0.05)
            left = self._store.add("left", 0)
        if unclaimed > 0:
            raise _preempted(unclaimed)


def _preempted(chunks: int) -> Preempted:
    return Preempted(f"stopped by SIGUSR1: chunks that were open are finished, {chunks:,} are left")


Workers = OneProcess  # the interface: what the three have in common


def adopt_slurm_step() -> None:
    """Under srun with several tasks, set the variables that torchrun would set, from those of the step."""
    step = os.environ
    if "RANK" in step or int(step.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    nodes, tasks = step["SLURM_STEP_NODELIST"], step.get("SLURM_STEP_TASKS_PER_NODE", "1")
    names = {
        "RANK": step["SLURM_PROCID"],
        "WORLD_SIZE": step["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": step["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": tasks.partition("(")[0].partition(",")[0],
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(20000 + (7 * int(step["SLURM_JOB_ID"]) + int(step["SLURM_STEP_ID"])) % 10000),
    }
    for name, value in names.items():
        step.setdefault(name, value)


def first_host(nodes: str) -> str:
    """`gpu[004-007,9],x` -> `gpu004`."""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST {nodes!r}: no host name in it")
    name, inside, after = found.groups()
    return name + (inside or "") + (after or "")


def launched_workers(rank: int = 0, splits: int = 1) -> Workers:
    """A range of `splits`, a shared queue where torchrun (or an equal) set its variables, else one process."""
    if splits > 1:
        return FixedRange(rank, splits)
    return SharedQueue() if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() else OneProcess()


def run_job(run: Callable[..., Outcome], module: str, args: Namespace, description: str, **options: Any) -> int:
    """`run`, which is `module`'s, as the worker that a launcher made this process; or on Ray, which has the options."""
    if args.ray is not None:
        from vistoken.jobs.ray_workers import run_on_ray

        return run_on_ray(module, args, description, **options)
    adopt_slurm_step()
    return run(args, lambda: launched_workers(args.rank, args.splits)).tell()
