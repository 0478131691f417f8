"""The job of the UniToken document: conversations to token files, chunk by chunk."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Protocol

from pre_tokenize.output import TokenOutput
from pre_tokenize.record import Lengths, companions
from pre_tokenize.sequences import Draft, SequenceFormat
from pre_tokenize.token_file import TokenSample
from vision_tokenizer.codebook.encoder import Images
from vistoken.errors import ItemError
from vistoken.jobs.counts import Counts, counts_table, time_line
from vistoken.jobs.progress import ItemsUnderWay, Progress, Stopwatch
from vistoken.jobs.run import OpenChunk, Task, Writer, todo
from vistoken.jobs.workers import Workers
from vistoken.store import Location

STAGES = ("wait for text", "wait for decode", "encode", "wait for write")  # of the thread that feeds the device
BESIDE = ("text", "decode", "write")  # of the threads beside it


class ImageEncoder(Protocol):
    """Images to codes, chunk by chunk: an `Encoder`, or `NoImages` where the items have their codes already."""

    watch: Stopwatch

    def add(self, chunk: "TokenChunk", images: Iterator[tuple[Location, Location]]) -> None: ...
    def finished(self) -> Iterator[tuple["TokenChunk", Images]]: ...
    def flush(self) -> Iterator[tuple["TokenChunk", Images]]: ...


MakeEncoder = Callable[[Progress], AbstractContextManager[ImageEncoder]]  # its images count in the progress


class NoImages:
    """The encoder where there is nothing to encode."""

    def __init__(self) -> None:
        self.watch = Stopwatch()
        self._chunks: list[TokenChunk] = []

    def add(self, chunk: "TokenChunk", images: Iterator[tuple[Location, Location]]) -> None:
        self._chunks.append(chunk)

    def finished(self) -> Iterator[tuple["TokenChunk", Images]]:
        while self._chunks:
            yield self._chunks.pop(), {}

    flush = finished


def run_pre_tokenization(
    output: TokenOutput,
    sequences: SequenceFormat,
    make_encoder: MakeEncoder,
    workers: Workers,
    *,
    overwrite: bool = False,
    other_devices: bool = False,
) -> tuple[Location, Counts, Lengths] | None:
    """Do all chunks that this worker gets, and write its record when all of them are complete.

    Returns the record, its counts and its lengths; None on a rank of torchrun that is not the first, as these write
    one record together.
    """
    chunks = workers.chunk_range(len(output.source.table))
    items = sum(output.source.table[index].items for index in chunks)

    def open_chunk(task: Task) -> TokenChunk:
        with encoder.watch("text"):
            return TokenChunk(task, sequences, output, progress)

    with (
        output.begin(workers, "any" if overwrite else None, other_devices),
        Progress(workers, items, "tokens", rates=("images",), totals=("tokens",)) as progress,
        make_encoder(progress) as encoder,
        Writer(encoder.watch) as writer,
    ):
        for chunk in one_ahead(todo([output.source], workers, progress), open_chunk, encoder.watch):
            encoder.add(chunk, chunk.images())
            for chunk, images in encoder.finished():
                writer.write(chunk, images, encoder.watch, progress)
        for chunk, images in encoder.flush():
            writer.write(chunk, images, encoder.watch, progress)
        writer.flush()
        progress.wait_for_all()
        return output.write_record(workers) if workers.reports else None


def one_ahead(
    tasks: Iterator[Task], open_chunk: Callable[[Task], "TokenChunk"], watch: Stopwatch
) -> Iterator["TokenChunk"]:
    """Open each chunk, which tokenises its text, in a thread while the caller encodes the images of the one before."""
    thread = ThreadPoolExecutor(1, "text")
    opened: Future[TokenChunk] | None = None
    try:
        for task in chain(tasks, [None]):
            following = thread.submit(open_chunk, task) if task else None
            if opened:
                with watch("wait for text"):
                    chunk = opened.result()
                yield chunk
            opened = following
    finally:  # a run that is stopped waits for the text that is being tokenised, and begins no more
        thread.shutdown(cancel_futures=True)


class TokenChunk(OpenChunk):
    """A chunk of conversations: those whose text is tokenised, and the samples that it already has."""

    def __init__(self, task: Task, sequences: SequenceFormat, output: TokenOutput, progress: Progress):
        super().__init__(task)
        self.under_way = ItemsUnderWay(progress)
        self._sequences, self._output = sequences, output
        self._samples: dict[int, TokenSample] = {}
        if done := self.done_before():
            self._samples = output.read_back(self.chunk, done)
        self._drafts: dict[int, Draft] = {}
        items = list(self.todo())
        for item, draft in zip(items, sequences.drafts(items), strict=True):
            if isinstance(draft, ItemError):
                self.fail(item, draft)
            else:
                self._drafts[item.index] = draft
                self.under_way.expect(item.index, draft.paths)

    def images(self) -> Iterator[tuple[Location, Location]]:
        for draft in self._drafts.values():
            yield from zip(draft.paths, draft.paths, strict=True)

    def write(self, images: Images, watch: Stopwatch, progress: Progress) -> None:
        """Put the codes into the sequences and save the chunk, samples in input order."""
        with watch("write"):
            for index, draft in self._drafts.items():
                try:
                    self._samples[index] = self._sequences.sample(draft, images)
                except ItemError as error:
                    self.fail(self.items[index], error)
            samples = [self._samples[index] for index in sorted(self._samples)]
            tallies = {
                "images": sum(len(sample.images) for sample in samples),
                "tokens": sum(len(sample.tokens) for sample in samples),
            }
            files = self._output.chunk_files(self.chunk, samples)
        seconds = watch.take()
        with watch("write"):  # counted with the next chunk
            self.save(files, tallies=tallies, seconds=seconds, progress=progress)
        progress.count(tokens=tallies["tokens"])


def images_sought(counts: Counts, image_dir: Location) -> str:
    """Where images were looked for, if some were not found and no flag said where."""
    if not counts.reasons["failed", "image not found"] or image_dir != Path():
        return ""
    return f"image not found: relative paths begin at the current folder, {Path.cwd()}; --image_dir names another"


def report(input_file: Location, record: Location, counts: Counts, lengths: Lengths, max_seq_len: int) -> str:
    """The run in words and numbers, for the terminal."""
    lines = [
        counts_table({input_file.name: counts}, "input"),
        "",
        f"sequences: {lengths}",
        f"longer than {max_seq_len:,} (--max_seq_len): {lengths.longer_than(max_seq_len):,}, kept whole",
        f"images: {counts.tallies['images']:,}",
        f"time: {time_line(counts, STAGES, BESIDE)}",
        f"record: {record}",
    ]
    if counts.rejected + counts.failed:
        lines.append(f"not in it: {companions(record)[0]}")
    return "\n".join(lines)
