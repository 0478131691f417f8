"""A job on Ray: one actor per GPU, or per share of the CPUs, and a driver that hands the chunks out.

The driver looks after the actors, shows progress and prints the report; it computes nothing and reads no input. Actors
take chunks from a queue beside the driver, which also holds the output folders against other runs. Where an actor or
its node dies, its open chunks are handed out again, each by itself, so that a chunk that kills its actor takes no
others with it; after `ATTEMPTS` deaths its items fail. Actors are started wherever the cluster has room for one more,
so nodes may join in mid-run. A round of an actor ends when the queue is empty; it begins another one when chunks come
back.
"""

import argparse
import importlib
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vistoken.cli import Outcome
from vistoken.errors import Failed, UserError
from vistoken.jobs.files import run_lock
from vistoken.jobs.progress import Progress
from vistoken.jobs.workers import OneProcess
from vistoken.store import Location

T = TypeVar("T")

ATTEMPTS = 3  # deaths of an actor that a chunk may cost
_LOOK = 1.0  # seconds between two looks at the cluster


class Queue:
    """What is to be done, and by whom: an actor beside the driver."""

    def __init__(self) -> None:
        self._chunks: int | None = None
        self._next = 0
        self._again: deque[int] = deque()  # chunks whose actor died
        self._open: dict[int, int] = {}  # chunk -> actor
        self._deaths: Counter[int] = Counter()  # chunk -> actors that died over it
        self._alone: set[int] = set()  # actors whose round is for one chunk
        self._steps: dict[int, int | None] = {}  # step -> the actor that does it, None when it is done
        self._totals: Counter[str] = Counter()
        self._held = ExitStack()
        self._locks: dict[Location, bool] = {}  # folders that are held until the run ends -> whether it was alone there

    def claim(self, actor: int, chunks: int, first: bool) -> tuple[int, int] | None:
        """The next chunk and the deaths it has cost, or None: the round is over. `first`: of this round."""
        self._chunks = chunks if self._chunks is None else self._chunks
        if chunks != self._chunks:
            raise ValueError(f"an actor sees {chunks} chunks to do where another one sees {self._chunks}")
        if actor in self._alone:
            self._alone.discard(actor)
            return None
        if first and self._again:
            chunk = self._again.popleft()
            self._alone.add(actor)
        elif self._next < chunks:
            chunk, self._next = self._next, self._next + 1
        else:
            return None
        self._open[chunk] = actor
        return chunk, self._deaths[chunk]

    def finish(self, chunk: int) -> None:
        self._open.pop(chunk, None)

    def lost(self, actor: int) -> int:
        """An actor died. Returns the most deaths that one of its chunks has cost."""
        self._alone.discard(actor)
        self._steps = {step: by for step, by in self._steps.items() if by != actor}
        chunks = sorted(chunk for chunk, by in self._open.items() if by == actor)
        for chunk in chunks:
            del self._open[chunk]
            self._deaths[chunk] += 1
            self._again.append(chunk)
        return max((self._deaths[chunk] for chunk in chunks), default=0)

    def step(self, actor: int, number: int) -> str:
        """Whether an actor is to do a step that comes before all chunks, to wait for who does it, or to go on."""
        by = self._steps.setdefault(number, actor)
        return "done" if by is None else "do" if by == actor else "wait"

    def step_done(self, number: int) -> None:
        self._steps[number] = None

    def lock(self, folder: Location) -> bool | UserError:
        """Hold an output folder, whichever actors come and go."""
        try:
            if folder not in self._locks:
                self._locks[folder] = self._held.enter_context(run_lock(folder))
            return self._locks[folder]
        except UserError as error:
            return error

    def add(self, counts: Mapping[str, int]) -> None:
        self._totals.update(counts)

    def totals(self, names: Sequence[str]) -> dict[str, int]:
        return {name: self._totals[name] for name in names}

    def state(self) -> "State":
        unclaimed = None if self._chunks is None else self._chunks - self._next
        return State(unclaimed, len(self._again), len(self._open))


class State(NamedTuple):
    unclaimed: int | None  # None: no actor has looked yet
    again: int
    open: int

    @property
    def complete(self) -> bool:
        return self.unclaimed == self.again == self.open == 0


class Driver(OneProcess):
    """The driver's view of the queue: it only looks."""

    def __init__(self, queue: Any):
        import ray

        super().__init__()
        self._get, self._queue = ray.get, queue

    def add(self, counts: Mapping[str, int]) -> None:
        if counts := {name: count for name, count in counts.items() if count}:
            self._queue.add.remote(counts)

    def totals(self, names: Sequence[str]) -> dict[str, int]:
        return self._get(self._queue.totals.remote(names))


class RayWorker(Driver):
    """An actor's view of the queue. With `joins`, all chunks are done and it writes the final files."""

    def __init__(self, queue: Any, number: int, joins: bool):
        super().__init__(queue)
        self._number, self._joins = number, joins
        self.rank = 0 if joins else 1
        self.reports = joins
        self._steps = 0
        self._deaths: dict[int, int] = {}

    def claim(self, chunks: Sequence[T]) -> Iterator[T]:
        first = True
        while not self._joins and (claimed := self._get(self._queue.claim.remote(self._number, len(chunks), first))):
            number, self._deaths[claimed[0]] = claimed
            first = False
            yield chunks[number]

    def finished(self, number: int) -> None:
        self._get(self._queue.finish.remote(number))

    def given_up(self, number: int) -> Failed | None:
        deaths = self._deaths.get(number, 0)
        return Failed("worker died", f"{deaths} workers died while they had this chunk") if deaths >= ATTEMPTS else None

    def on_first(self, step: Callable[[], None]) -> None:
        self._steps += 1
        while (todo := self._get(self._queue.step.remote(self._number, self._steps))) == "wait":
            time.sleep(0.2)
        if todo == "do":
            step()
            self._get(self._queue.step_done.remote(self._steps))

    @contextmanager
    def lock(self, folder: Location) -> Iterator[bool]:
        alone = self._get(self._queue.lock.remote(folder.absolute()))
        if isinstance(alone, UserError):
            raise alone
        yield alone


class Actor:
    """Runs `module.run(args, make_workers)` in rounds. Relative paths are the driver's."""

    def __init__(self, module: str, args: argparse.Namespace, folder: str):
        os.environ["RANK"] = "1"  # notes are for the driver to tell
        with suppress(FileNotFoundError):  # then whole paths and URLs only
            os.chdir(folder)
        self._run, self._args = importlib.import_module(module).run, args

    def work(self, queue: Any, number: int, joins: bool) -> tuple[Outcome | None, UserError | None]:
        """One round. An error of the user's comes as a value, since Ray would wrap it."""
        try:
            return self._run(self._args, lambda: RayWorker(queue, number, joins)), None
        except UserError as error:
            return None, error


def run_on_ray(module: str, args: argparse.Namespace, description: str, totals: tuple[str, ...] = ()) -> int:
    """Do the job of a command on Ray. `module` has its `run`. Returns the exit code."""
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray needs Ray. Please install vistoken[ray]") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(address=args.ray or None, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise UserError(f"--ray {args.ray}: no Ray cluster there ({error})") from error
    try:
        return _Run(ray, module, args).through(description, totals).tell()
    finally:
        ray.shutdown()


class _Run:
    """The actors of one run. A handle and a round for each."""

    def __init__(self, ray: Any, module: str, args: argparse.Namespace):
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray, self._module, self._args = ray, module, args
        self._folder = str(Path.cwd())
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._queue = ray.remote(num_cpus=0, scheduling_strategy=here)(Queue).remote()
        self._actors: dict[int, Any] = {}
        self._rounds: dict[Any, int] = {}  # what a round will return -> its actor
        self._started = self._deaths = 0  # `_deaths` since a chunk was finished

    def through(self, description: str, totals: tuple[str, ...]) -> Outcome:
        """All chunks, then the final files."""
        with Progress(Driver(self._queue), None, description, totals=totals) as progress:
            while not (state := State(*self._ray.get(self._queue.state.remote()))).complete:
                self._start_missing(state)
                self._look(joins=False)
                progress.refresh()
            progress.refresh()
        while True:
            self._start_missing(state)
            number = min(self._actors)
            if number not in self._rounds.values():
                self._begin(number, joins=True)
            if outcome := self._look(joins=True):
                return outcome

    def _start_missing(self, state: State) -> None:
        """As many actors as the cluster has room for; the idle ones begin a round where chunks came back."""
        cluster = self._ray.cluster_resources()
        gpus, all_cpus = int(cluster.get("GPU", 0)), int(cluster.get("CPU", 1))
        on_gpus = gpus > 0 and self._args.device != "cpu"
        cpus = self._args.ray_cpus or (max(1, all_cpus // gpus) if on_gpus else 1)
        wanted = min(gpus, max(1, all_cpus // cpus)) if on_gpus else max(1, all_cpus // cpus)
        self._args.num_workers = self._args.num_workers or cpus
        while len(self._actors) < (1 if state.complete else wanted):
            options = {"num_cpus": cpus, "num_gpus": int(on_gpus)}
            actor = self._ray.remote(**options)(Actor).remote(self._module, self._args, self._folder)
            self._actors[self._started] = actor
            self._begin(self._started, joins=state.complete)
            self._started += 1
        if state.again or state.unclaimed:
            for number in self._actors.keys() - set(self._rounds.values()):
                self._begin(number, joins=False)

    def _begin(self, number: int, joins: bool) -> None:
        self._rounds[self._actors[number].work.remote(self._queue, number, joins)] = number

    def _look(self, joins: bool) -> Outcome | None:
        """Wait a little for a round to end. Returns what the one that joins has to say."""
        if not self._rounds:
            time.sleep(_LOOK)
        for ended in self._ray.wait(list(self._rounds), timeout=_LOOK)[0] if self._rounds else []:
            number = self._rounds.pop(ended)
            try:
                outcome, error = self._ray.get(ended)
            except self._ray.exceptions.RayTaskError:
                raise  # a defect: its traceback is the actor's
            except self._ray.exceptions.RayError as error:  # the actor, its node, or the way there
                self._bury(number, error)
                continue
            self._deaths = 0
            if error is not None:
                raise error
            if joins and outcome.report:
                return outcome
        return None

    def _bury(self, number: int, error: Exception) -> None:
        del self._actors[number]
        worst = self._ray.get(self._queue.lost.remote(number))
        self._deaths += worst == 0  # it died before it had a chunk
        if self._deaths > ATTEMPTS or worst > ATTEMPTS:
            raise UserError(
                f"Ray's actors die again and again, the last one so: {error}\nWhat is finished is kept; Ray's own logs "
                "say more. Mend it, then run the same command again."
            ) from error
