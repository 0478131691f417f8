"""The job of the UniToken document: conversations to token files, chunk by chunk."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

from pre_tokenize.output import OutputFolder
from pre_tokenize.record import Lengths, companions
from pre_tokenize.sequences import Draft, Images, SequenceFormat
from pre_tokenize.token_file import TokenSample
from vistoken.errors import ItemError
from vistoken.jobs.counts import Account
from vistoken.jobs.open_chunk import OpenChunk
from vistoken.jobs.progress import Progress, Stopwatch
from vistoken.jobs.results import Part
from vistoken.jobs.run import Source, Task, run_chunks
from vistoken.jobs.summary import accounts_table, time_line
from vistoken.jobs.workers import Claims

STAGES = ("text", "wait for decode", "encode", "write")  # of the thread that feeds the device


class Encoder(Protocol):
    """Images to codes, chunk by chunk: an `Engine`."""

    watch: Stopwatch

    def encode(self, groups: Iterable[tuple["ChunkWork", Iterable[Path]]]) -> Iterable[tuple["ChunkWork", Images]]: ...


class ChunkWork:
    """One chunk in progress: what its items need, what they already have, and then its part."""

    def __init__(self, task: Task, sequences: SequenceFormat, output: OutputFolder):
        """Read the chunk's items and tokenise their text; of a chunk done before, only those that failed."""
        self.task = task
        self._chunk = OpenChunk.read(task)
        self._kept: dict[int, TokenSample] = {}
        if done := self._chunk.done_before():
            self._kept = output.read_back(task.chunk, done)
        self._drafts: dict[int, Draft] = {}
        todo = self._chunk.todo()
        for item, draft in zip(todo, sequences.drafts(todo), strict=True):
            if isinstance(draft, ItemError):
                self._chunk.fail(item, draft)
            else:
                self._drafts[item.index] = draft

    def images(self) -> Iterator[Path]:
        for draft in self._drafts.values():
            yield from draft.paths

    def part(self, images: Images, sequences: SequenceFormat, output: OutputFolder) -> Part:
        """The finished chunk: its samples in input order, its problems, its account."""
        samples = dict(self._kept)
        for index, draft in self._drafts.items():
            try:
                samples[index] = sequences.sample(draft, images)
            except ItemError as error:
                self._chunk.fail(self._chunk.items[index], error)
        account, problems = self._chunk.close(done=len(samples))
        ordered = [samples[index] for index in sorted(samples)]
        account.counts["images"] = sum(len(sample.images) for sample in ordered)
        account.counts["tokens"] = sum(len(sample.tokens) for sample in ordered)
        return Part(account, problems, output.chunk_files(self.task.chunk, ordered, self.task.source.parts))


def tokenize_chunks(
    tasks: Iterator[Task], *, sequences: SequenceFormat, encoder: Encoder, output: OutputFolder, progress: Progress
) -> Iterator[tuple[Task, Part]]:
    """The job's `process`: read each chunk, have its images encoded, join text and images."""

    def groups() -> Iterator[tuple[ChunkWork, Iterable[Path]]]:
        for task in tasks:
            with encoder.watch("text"):
                work = ChunkWork(task, sequences, output)
            yield work, work.images()

    for work, images in encoder.encode(groups()):
        with encoder.watch("write"):
            part = work.part(images, sequences, output)
        part.account.seconds.update(encoder.watch.take())
        progress.count(tokens=part.account.counts["tokens"])
        with encoder.watch("write"):  # which our consumer does while we are suspended
            yield work.task, part


def run_job(
    source: Source,
    output: OutputFolder,
    sequences: SequenceFormat,
    make_encoder: Callable[[Callable[[int], None]], Encoder],
    claims: Claims,
    *,
    overwrite: bool,
) -> tuple[Path, Account, Lengths] | None:
    """Do all chunks that this process gets, and write its record when all of them are complete.

    `make_encoder` is given a function to call with the number of images done. Returns the record, its account and
    its lengths; None on a rank of torchrun that is not the first, as these write one record together.
    """
    with ExitStack() as seat:
        claims.lead(lambda: seat.enter_context(output.begin(source, claims, overwrite=overwrite)))
        items = sum(source.table[index].items for index in claims.chunk_range(len(source.table)))
        progress = Progress(claims, items, "tokens", rates=("images",), totals=("tokens",))
        encoder = make_encoder(lambda count: progress.count(images=count))
        process = partial(tokenize_chunks, sequences=sequences, encoder=encoder, output=output, progress=progress)
        run_chunks([source], claims, process, progress)
        return output.write_record(source, claims) if claims.leads else None


def report(input_file: Path, record: Path, account: Account, lengths: Lengths, max_seq_len: int) -> str:
    """The run in words and numbers, for the terminal."""
    lines = [
        accounts_table({input_file.name: account}, "input"),
        "",
        f"sequences: {lengths}",
        f"longer than {max_seq_len:,} (--max_seq_len): {lengths.longer_than(max_seq_len):,}, kept whole",
        f"images: {account.counts['images']:,}",
        f"time: {time_line(account, STAGES)}"
        + (f"; decode {account.seconds['decode']:.1f} s in the pool" if account.seconds["decode"] else ""),
        f"record: {record}",
    ]
    if account.rejected + account.failed:
        lines.append(f"not in it: {companions(record)[0]}")
    return "\n".join(lines)
