"""The job of the UniToken document: conversations to token files, chunk by chunk."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from pre_tokenize.output import Output, chunks_of, leads
from pre_tokenize.record import Lengths
from pre_tokenize.token_file import TokenSample
from vision_tokenizer.engine import Encoded
from vision_tokenizer.errors import ItemError
from vision_tokenizer.jobs.chunks import Item
from vision_tokenizer.jobs.claims import Claims
from vision_tokenizer.jobs.ledger import Account, Problem
from vision_tokenizer.jobs.parts import Part
from vision_tokenizer.jobs.progress import Progress, Stopwatch
from vision_tokenizer.jobs.run import Source, Task, run_chunks

STAGES = ("text", "wait for decode", "encode", "write")  # of the thread that feeds the device

Images = Mapping[Path, Encoded | ItemError]


class Draft(Protocol):
    """An item on its way to a sequence; `paths` are the images whose codes it needs."""

    @property
    def paths(self) -> Sequence[Path]: ...


class Sequences(Protocol):
    """How items become sequences, in two steps around the encoding of their images: see `ChameleonSequences`."""

    def drafts(self, items: Sequence[Item]) -> Iterable[Draft | ItemError]: ...

    def sample(self, draft: Draft, images: Images) -> TokenSample: ...


class Encoder(Protocol):
    """Images to codes, chunk by chunk: an `Engine`."""

    watch: Stopwatch

    def encode(self, groups: Iterable[tuple["ChunkWork", Iterable[Path]]]) -> Iterable[tuple["ChunkWork", Images]]: ...


@dataclass
class ChunkWork:
    """One chunk in progress: what its items need, what they already have, and then what became of them."""

    task: Task
    items: dict[int, Item]
    drafts: dict[int, Draft] = field(default_factory=dict)
    kept: dict[int, TokenSample] = field(default_factory=dict)
    problems: dict[int, Problem] = field(default_factory=dict)

    @classmethod
    def read(cls, task: Task, sequences: Sequences, output: Output) -> "ChunkWork":
        """Read the chunk's items and tokenise their text; of a chunk done before, only those that failed."""
        work = cls(task, {item.index: item for item in task.source.table.read(task.chunk)})
        if task.previous:
            before = {problem.item: problem for problem in task.previous.problems}
            work.problems = {item: problem for item, problem in before.items() if problem.kind == "rejected"}
            work.kept = output.read_back(task.chunk, [item for item in work.items if item not in before])
        todo = [item for index, item in work.items.items() if index not in work.kept and index not in work.problems]
        for item, draft in zip(todo, sequences.drafts(todo), strict=True):
            if isinstance(draft, ItemError):
                work._fail(item, draft)
            else:
                work.drafts[item.index] = draft
        return work

    def images(self) -> Iterator[Path]:
        for draft in self.drafts.values():
            yield from draft.paths

    def part(self, images: Images, sequences: Sequences, output: Output) -> Part:
        """The finished chunk: its samples in input order, its problems, its account."""
        samples = []
        for index, item in self.items.items():
            if index in self.drafts:
                try:
                    samples.append(sequences.sample(self.drafts[index], images))
                except ItemError as error:
                    self._fail(item, error)
            elif index in self.kept:
                samples.append(self.kept[index])
        problems = [self.problems[index] for index in sorted(self.problems)]
        account = Account(items=len(self.items), done=len(samples))
        account.reasons.update((problem.kind, problem.reason) for problem in problems)
        account.counts["images"] = sum(len(sample.images) for sample in samples)
        account.counts["tokens"] = sum(len(sample.tokens) for sample in samples)
        return Part(account, problems, output.chunk_files(self.task.chunk, samples, self.task.source.parts))

    def _fail(self, item: Item, error: ItemError) -> None:
        item_id = item.value.get("id") if isinstance(item.value, dict) else None
        file = str(self.task.source.table.path)
        self.problems[item.index] = Problem.of(error, file, item.where, item.index, item_id)


def tokenize_chunks(
    tasks: Iterator[Task], *, sequences: Sequences, encoder: Encoder, output: Output, progress: Progress
) -> Iterator[tuple[Task, Part]]:
    """The job's `process`: read each chunk, have its images encoded, join text and images."""

    def groups() -> Iterator[tuple[ChunkWork, Iterable[Path]]]:
        for task in tasks:
            with encoder.watch("text"):
                work = ChunkWork.read(task, sequences, output)
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
    output: Output,
    sequences: Sequences,
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
        claims.lead(lambda: seat.enter_context(output.begin(claims, overwrite=overwrite)))
        items = sum(source.table[index].items for index in chunks_of(claims, len(source.table)))
        progress = Progress(claims, items, "pre-tokenize", rates=("images",), totals=("tokens",))
        encoder = make_encoder(lambda count: progress.count(images=count))
        process = partial(tokenize_chunks, sequences=sequences, encoder=encoder, output=output, progress=progress)
        run_chunks([source], claims, process, progress)
        return output.write_record(source, claims) if leads(claims) else None
