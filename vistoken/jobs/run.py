"""The one skeleton of every job: sources in chunks, chunks claimed and worked on, results saved, final files joined.

    with output.begin(workers):
        for chunk in todo(sources, workers, progress):
            encoder.add(chunk, images)                 # fills batches across chunks
            for chunk, codes in encoder.finished():
                writer.write(chunk, codes)             # chunk.save(...) in a thread of its own
        ...
        output.finish()

Killing a process anywhere loses only the chunks that are open in it; the next run does these again.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from vistoken.errors import ItemError, UserError
from vistoken.jobs.chunks import Chunk, Item
from vistoken.jobs.counts import Counts, Problem
from vistoken.jobs.files import exclusive, remove_leftovers
from vistoken.jobs.manifest import MANIFEST, check_manifest
from vistoken.jobs.progress import ItemsUnderWay, Progress, Stopwatch
from vistoken.jobs.results import Final, Result, ResultMissing, Results, WholeResult, joining
from vistoken.jobs.workers import Workers
from vistoken.store import Location, Url, read_ahead

WORK = ".work"  # in an output folder: what a run knows of its chunks
WRITES_AHEAD = 3  # finished chunks that may wait to be written, in memory


class Chunks(Protocol):
    """The chunks of an input file, by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Chunk: ...


class Table(Chunks, Protocol):
    """What a `ChunkTable` is: an input file in chunks of items."""

    @property
    def path(self) -> Location: ...
    @property
    def fingerprint(self) -> str:
        """Changes with the content."""
        ...

    @property
    def items(self) -> int | None:
        """None: not known before all of it is read."""
        ...

    def read(self, chunk: Chunk) -> Iterator[Item]: ...


@dataclass(eq=False)
class Source:
    """One input file of a job, by chunks, and where their results go."""

    table: Table
    results: Results
    was_finished: bool = field(default=False, init=False)  # nothing was left to do when the run began

    def finished(self) -> Final | None:
        """What is known of a final file in which nothing failed, else None: there is work to do."""
        return None

    def is_complete(self) -> bool:
        """Whether every chunk has a result."""
        return self.results.count() >= len(self.table)

    def save(self, index: int, result: Result) -> None:
        """Complete the result of a chunk."""
        self.results.write(index, result)


@dataclass(eq=False)
class JoinedSource(Source):
    """A source whose results become one file, `output`; then they go, unless a rerun may retry what failed."""

    output: Location

    @property
    def rejected(self) -> Location:
        return self.output.with_suffix(".rejected.jsonl")

    def final(self) -> Final | None:
        """What is known of the final file, if it is there; None also where a chunk was done again since."""
        final = self.results.final()
        if final is None:
            return None
        try:
            whole = self.output.stat().st_size == final.bytes
        except FileNotFoundError:
            whole = False
        if not whole and not final.counts.failed:  # else it is made again: the run retries anyway
            raise UserError(
                f"{self.output}: finished earlier, but this is not what was written then. "
                "Restore the file, or run with --no-resume to make it anew."
            )
        return final if whole else None

    def finished(self) -> Final | None:
        final = self.final()
        return None if final is None or final.counts.failed else final

    def save(self, index: int, result: Result) -> None:
        if isinstance(self.results, WholeResult):
            self.check_unchanged()
        super().save(index, result)

    def finish(self) -> Final:
        """Join the results, if that is not done; drop them where nothing failed."""
        final = self.final() or self.join()
        if not final.counts.failed:
            self.results.remove()
        return final

    def join(self) -> Final:
        """Join the results into `output` and `rejected`."""
        self.check_unchanged()
        try:
            with joining(self.contents(), self.output, self.rejected) as final:
                pass
        except (ResultMissing, FileNotFoundError):
            if (found := self.final()) is None:  # else another worker, in a store, has joined them meanwhile
                raise
            return found
        self.results.write_mark(final)
        return final

    def contents(self) -> Iterator[tuple[Result, bytes]]:
        """The results, each with what it adds to `output`."""
        return self.results.contents(range(len(self.table)), ".jsonl")

    def check_unchanged(self) -> None:
        """Raise `UserError` where the input is not what the chunks were read from; for jobs to fill in."""


@dataclass(frozen=True)
class Task:
    """One chunk to do. `previous` is its result of an earlier run in which items failed: only those are tried again.

    `given_up` says why nothing of it is tried, and `done` is to be called when its result is complete.
    """

    source: Source
    chunk: Chunk
    previous: Result | None
    given_up: ItemError | None = None
    done: Callable[[], None] = lambda: None


def todo(sources: Sequence[Source], workers: Workers, progress: Progress) -> Iterator[Task]:
    """The chunks that this worker claims, of all `sources`, and whose results are not there yet or have failures."""
    chunks = [(source, index) for source in sources for index in range(len(source.table))]
    for number, (source, index) in workers.claim(list(enumerate(chunks))):
        if source.was_finished:
            workers.finished(number)
            continue
        previous = source.results.found(index)
        if previous is not None and not previous.counts.failed:
            progress.found(previous.counts)
            workers.finished(number)
        else:
            done = partial(workers.finished, number)
            yield Task(source, source.table[index], previous, workers.given_up(number), done)


class OpenChunk:
    """A chunk while a job works on it: which items are to be done, and what becomes of each."""

    under_way: ItemsUnderWay | None = None  # of jobs that tell each item as it is done

    def __init__(self, task: Task):
        self.source, self.chunk, self.previous = task.source, task.chunk, task.previous
        self._given_up, self._done = task.given_up, task.done
        self.items: dict[int, Item] = {}  # those that were read
        self._problems: dict[int, Problem] = {}
        if self.previous:  # what a rule rejected stays rejected
            self._problems = {p.item: p for p in self.previous.problems if p.kind == "rejected"}
        self._settled = {*self.done_before(), *self._problems}

    def done_before(self) -> list[int]:
        """Items that an earlier run did; its files have their results in this order."""
        if self.previous is None:
            return []
        not_done = {problem.item for problem in self.previous.problems}
        first = self.chunk.first_item
        return [index for index in range(first, first + self.previous.counts.items) if index not in not_done]

    def todo(self) -> Iterator[Item]:
        """Read the chunk: the items to do now, all of a new chunk, of one done before only those that failed."""
        for item in self.source.table.read(self.chunk):
            self.items[item.index] = item
            if item.index in self._settled:
                continue
            if self._given_up:
                self.fail(item, self._given_up)
            else:
                yield item

    def fail(self, item: Item, error: ItemError) -> None:
        """`item` is rejected or failed, as `error` says."""
        self._problems[item.index] = Problem.of(error, self.source.table.path, item)

    def save(
        self,
        files: Mapping[Location, bytes],
        *,
        progress: Progress,
        tallies: Mapping[str, int] = {},
        seconds: Mapping[str, float] = {},
    ) -> None:
        """Write the chunk's result: its files, its problems, and its counts, in which the other items are done."""
        problems = [self._problems[index] for index in sorted(self._problems)]
        counts = Counts(items=len(self.items), done=len(self.items) - len(problems))
        counts.reasons.update((problem.kind, problem.reason) for problem in problems)
        counts.tallies.update(tallies)
        counts.seconds.update(seconds)
        self.source.save(self.chunk.index, Result(counts, problems, files))
        progress.done(counts, self.under_way.shown if self.under_way else 0)
        self._done()


class Writer:
    """Writes finished chunks in a thread of its own: the thread that feeds the device does not wait for the disk.

    `watch` has the seconds of the thread that hands chunks over and waits ("wait for write").
    """

    def __init__(self, watch: Stopwatch):
        self._watch = watch
        self._pool = ThreadPoolExecutor(1, "write")
        self._writing: deque[Future[None]] = deque()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def write(self, chunk: "Writable", *given: Any) -> None:
        """Have `chunk.write(*given)` called. Raises what the writing of an earlier chunk raised."""
        self._writing.append(self._pool.submit(chunk.write, *given))
        while self._writing and (len(self._writing) > WRITES_AHEAD or self._writing[0].done()):
            with self._watch("wait for write"):
                self._writing.popleft().result()

    def flush(self) -> None:
        """Wait until everything is written. Raises what the writing raised."""
        while self._writing:
            with self._watch("wait for write"):
                self._writing.popleft().result()


class Writable(Protocol):
    def write(self, *given: Any) -> None: ...


class Output:
    """A job's output folder: final files, `manifest.json`, and `.work/` with the results of an unfinished run.

    A job derives from it, with `sources` and its own `finish`.
    """

    def __init__(self, folder: Location, manifest: Mapping[str, Any], sources: Sequence[Source]):
        self.folder, self.manifest, self.sources = folder, manifest, sources
        self.work = folder / WORK

    @contextmanager
    def begin(self, workers: Workers, restart: str | None = None, other_devices: bool = False) -> Iterator[None]:
        """Lock the folder against other runs and settle with what an earlier one left in it.

        `restart` None goes on from there; "same" makes the output anew, but only with the settings it had; "any" with
        whatever settings. `other_devices` allows the manifest's `device` to differ. Raises `UserError` where another
        run is at work, or the settings are not the former ones.
        """
        with ExitStack() as held:
            workers.on_first(lambda: self._settle(workers, restart, other_devices, held))
            # every worker has the same manifest, or codes of different kinds would be mixed
            check_manifest(self.folder, self.manifest, other_devices=other_devices)
            marks = self._marks()  # one listing instead of a look for each of perhaps 100,000 files
            marked = [source for source in self.sources if source.results.mark.name in marks]
            read = read_ahead if isinstance(self.folder, Url) else map  # a store is asked for several at a time
            for source, final in zip(marked, read(lambda source: source.finished(), marked), strict=True):
                source.was_finished = final is not None
            yield

    def _settle(self, workers: Workers, restart: str | None, other_devices: bool, held: ExitStack) -> None:
        with exclusive(self.work / "begin.lock"):
            alone = held.enter_context(workers.lock(self.work))
            for folder in self.folders():
                remove_leftovers(folder)
            if restart == "any":
                self.remove()
            self.check_folder()
            # until something was done with the manifest that is there, it binds nobody
            begun = any(self.work.glob("*/[0-9]*.json")) or any(path.exists() for path in self.made())
            binding = not alone or begun
            check_manifest(self.folder, self.manifest, binding=binding, other_devices=other_devices)
            if restart == "same":
                self.remove()
                check_manifest(self.folder, self.manifest)
            self.prepare(workers)

    def complete(self) -> bool:
        """Whether every chunk has a result, whoever did it."""
        marks = self._marks()
        return all(source.results.mark.name in marks or source.is_complete() for source in self.sources)

    def _marks(self) -> set[str]:
        return {path.name for path in self.work.glob("*.done.json")}

    def folders(self) -> list[Location]:
        """Where a killed run may have left temporary files."""
        of_chunks = [source.results.folder for source in self.sources if not isinstance(source.results, WholeResult)]
        return [self.folder, self.work, *of_chunks]

    def check_folder(self) -> None:
        """Raise `UserError` where what is in the folder is in the way; for jobs to fill in."""

    def prepare(self, workers: Workers) -> None:
        """Bring what an earlier run left into order; for jobs to fill in."""

    def made(self) -> list[Location]:
        """The final files and folders of earlier runs; for jobs to fill in."""
        return []

    def remove(self) -> None:
        """Delete all that earlier runs made, but for chunk tables and locks.

        The manifest goes last: what is still there when we are killed is never taken for the work of other settings.
        """
        try:
            for mark in self.work.glob("*.done.json"):
                mark.unlink()
            for folder in self.work.glob("*"):
                if folder.is_dir():
                    Results(folder).remove()
            for path in self.made():
                path.unlink(missing_ok=True)
            (self.folder / MANIFEST).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot remove ({error.strerror}). Fix the permissions.") from error
