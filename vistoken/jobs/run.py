"""The loop of every job: claim a chunk, process it, complete its part.

`process` is the job itself: a generator that is given the tasks and yields each one back with its `Part`, in any
order. It may hold several open at once (to fill its batches across chunks); what is not yielded is simply not done yet,
and the next run does it. Killing the process anywhere loses only the open chunks.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from vistoken.jobs.chunks import Chunk, ChunkTable
from vistoken.jobs.files import remove_leftovers
from vistoken.jobs.progress import Progress
from vistoken.jobs.results import Part, Parts
from vistoken.jobs.workers import Claims


@dataclass(frozen=True)
class Source:
    """One input file of a job and where its parts go."""

    table: ChunkTable
    parts: Parts


class Task(NamedTuple):
    """One chunk to do. `previous` is its part from an earlier run in which items failed: only those are tried again."""

    source: Source
    chunk: Chunk
    previous: Part | None


Process = Callable[[Iterator[Task]], Iterable[tuple[Task, Part]]]


def run_chunks(sources: Sequence[Source], claims: Claims, process: Process, progress: Progress) -> None:
    """Do every chunk of `sources` that is not complete, and wait until the rest of the crew has, too."""
    for source in sources:
        remove_leftovers(source.parts.folder)
    with closing(progress):
        for task, part in process(_open_tasks(sources, claims, progress)):
            task.source.parts.write(task.chunk.index, part)
            progress.part(part.account)
        for _ in claims.wait_for_crew():
            progress.refresh()
        progress.refresh()


def _open_tasks(sources: Sequence[Source], claims: Claims, progress: Progress) -> Iterator[Task]:
    starts = [0, *accumulate(len(source.table) for source in sources)]  # chunks of all sources are numbered through
    for number in claims.claim(starts[-1]):
        at = bisect_right(starts, number) - 1
        source, chunk_index = sources[at], number - starts[at]
        previous = source.parts.read(chunk_index)
        if previous is not None and not previous.account.failed:
            progress.found(previous.account)
        else:
            yield Task(source, source.table[chunk_index], previous)
