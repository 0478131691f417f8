"""The job of the ILLUME document: annotated images to DualViTok codes, chunk by chunk."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import orjson

from vision_tokenizer.annotations import OUTPUT_FIELDS, Dataset, image_names, image_path
from vision_tokenizer.codebook_output import (
    RATIO,
    AnnotationFile,
    Settings,
    finish_dataset,
    make_manifest,
    open_files,
    remove_output,
)
from vision_tokenizer.codes import ImageTokenizer
from vision_tokenizer.engine import Encoded, Engine
from vision_tokenizer.errors import Failed, ItemError, UserError
from vision_tokenizer.image import prepare
from vision_tokenizer.jobs.chunks import Item
from vision_tokenizer.jobs.claims import Claims
from vision_tokenizer.jobs.ledger import Account, Problem
from vision_tokenizer.jobs.lock import run_lock
from vision_tokenizer.jobs.manifest import check_manifest
from vision_tokenizer.jobs.parts import Part
from vision_tokenizer.jobs.progress import Progress
from vision_tokenizer.jobs.run import Task, run_chunks
from vision_tokenizer.jobs.summary import accounts_table, time_line
from vision_tokenizer.resolution import anchors, ratio_tag

WORK_STAGES = ("encode", "wait for decode", "write")  # of the thread that feeds the device; "decode" runs beside it

Images = dict[Path, Encoded | ItemError]


def run_codebook_inference(
    datasets: Sequence[Dataset],
    tokenizer: ImageTokenizer,
    settings: Settings,
    claims: Claims,
    *,
    num_workers: int,
    restart: str | None = None,
) -> tuple[dict[str, Account], dict[str, str]]:
    """Encode all images of `datasets`.

    Returns, on the first rank, the account of each data set and the error of each that cannot be done at all.
    `restart` None goes on from what is there, "same" makes the output anew with the same settings, "any" with whatever
    settings. Raises `UserError` if an output was made with other settings, or another run is writing it.
    """
    with ExitStack() as locks:
        claims.lead(lambda: _begin(datasets, tokenizer, settings, locks, restart))
        opened, errors = _open_all(datasets, settings)
        todo = [file for files in opened.values() for file in files if file.finished() is None]
        progress = Progress(claims, sum(file.table.items for file in todo), "codebook inference")
        prepare_image = partial(
            prepare,
            choices=anchors(settings.resolution_type, settings.resolution),
            crop_percent_thresh=settings.crop_percent_thresh,
        )
        engine = Engine(
            tokenizer,
            prepare_image,
            batch_size=settings.batch_size,
            num_workers=num_workers,
            on_images=lambda count: progress.count(images=count),
        )
        run_chunks(todo, claims, partial(encode_chunks, engine), progress)
        if claims.rank != 0:
            return {}, {}
        accounts = {d.name: finish_dataset(d, settings, opened[d.name]) for d in datasets if d.name in opened}
        return accounts, errors


def _begin(
    datasets: Sequence[Dataset], tokenizer: ImageTokenizer, settings: Settings, locks: ExitStack, restart: str | None
) -> None:
    """Lock the outputs and settle with what is already in them."""
    opened, _ = _open_all(datasets, settings)
    for dataset in datasets:
        if dataset.name not in opened:
            continue
        locks.enter_context(run_lock(opened[dataset.name][0].parts.folder.parent))
        if restart == "any":
            remove_output(dataset, settings)
        manifest = make_manifest(tokenizer, settings, opened[dataset.name])
        check_manifest(settings.folder(dataset), manifest)
        if restart == "same":
            remove_output(dataset, settings)
            check_manifest(settings.folder(dataset), manifest)


def _open_all(
    datasets: Sequence[Dataset], settings: Settings
) -> tuple[dict[str, list[AnnotationFile]], dict[str, str]]:
    """Data set name -> its files, or -> why it has none. One that cannot be read does not keep the others."""
    opened: dict[str, list[AnnotationFile]] = {}
    errors: dict[str, str] = {}
    for dataset in datasets:
        try:
            opened[dataset.name] = open_files(dataset, settings)
        except UserError as error:
            errors[dataset.name] = str(error)
    return opened, errors


def report(
    datasets: Sequence[Dataset], settings: Settings, accounts: dict[str, Account], errors: dict[str, str]
) -> str:
    """The run in words and numbers, for the terminal."""
    lines, total = [accounts_table(accounts)] if accounts else [], Account()
    for dataset in datasets:
        if dataset.name in accounts:
            account = accounts[dataset.name]
            total.add(account)
            per_anchor = {name: n for name, n in sorted(account.counts.items()) if name.startswith("images ")}
            sizes = ", ".join(f"{name.removeprefix('images ')}: {n:,}" for name, n in per_anchor.items())
            lines += ["", f"{dataset.name} -> {settings.folder(dataset)}"]
            lines += [f"  {account.counts['images']:,} images encoded ({sizes or 'none'})"]
    decode = f"decode {total.seconds['decode']:.1f} s in the pool"
    lines += ["", f"time of the encoding processes: {time_line(total, WORK_STAGES)}; {decode}"]
    lines += [f"data set {name} was not done: {error}" for name, error in errors.items()]
    return "\n".join(lines)


def encode_chunks(engine: Engine, tasks: Iterator[Task]) -> Iterator[tuple[Task, Part]]:
    """The job's `process`: read each chunk, encode its images, put the codes back into its lines."""
    groups = ((work, work.images()) for work in map(ChunkWork.read, tasks))
    for work, images in engine.encode(groups):
        part = work.part(images)
        part.account.seconds.update(engine.watch.take())
        with engine.watch("write"):  # which our consumer does while we are suspended
            yield work.task, part


@dataclass
class ChunkWork:
    """One chunk in progress: what its items need, what they already have, and then what became of them."""

    task: Task
    kept: dict[int, bytes] = field(default_factory=dict)  # item -> its output line from an earlier run
    problems: dict[int, Problem] = field(default_factory=dict)
    paths: dict[int, list[Path]] = field(default_factory=dict)  # item -> its images, yet to be encoded
    items: dict[int, Item] = field(default_factory=dict)

    @classmethod
    def read(cls, task: Task) -> "ChunkWork":
        work = cls(task)
        items = list(task.source.table.read(task.chunk))
        if task.previous:
            work._keep_previous(items)
        for item in items:
            work.items[item.index] = item
            if item.index not in work.kept and item.index not in work.problems:
                try:
                    work.paths[item.index] = work._image_paths(item)
                except ItemError as error:
                    work._fail(item, error)
        return work

    def _keep_previous(self, items: list[Item]) -> None:
        """Only what failed is tried again: rejected items stay so, and the rest have their lines in the part."""
        previous = {problem.item: problem for problem in self.task.previous.problems}
        self.problems = {index: problem for index, problem in previous.items() if problem.kind == "rejected"}
        lines = self.task.source.parts.path(self.task.chunk.index, ".jsonl").read_bytes().splitlines(keepends=True)
        done = [item.index for item in items if item.index not in previous]
        self.kept = dict(zip(done, lines, strict=True))

    def _image_paths(self, item: Item) -> list[Path]:
        if item.error:
            raise Failed("not JSON", item.error)
        image_dir = self.task.source.dataset.image_dir
        return [image_path(image_dir, name) for name in image_names(item.value)]

    def _fail(self, item: Item, error: ItemError) -> None:
        item_id = item.value.get("id") if isinstance(item.value, dict) else None
        file = str(self.task.source.table.path)
        self.problems[item.index] = Problem.of(error, file, item.where, item.index, item_id)

    def images(self) -> Iterator[Path]:
        for paths in self.paths.values():
            yield from paths

    def part(self, images: Images) -> Part:
        """The finished chunk: its lines in input order, its problems, its account."""
        account = Account(items=len(self.items))
        if self.task.previous:
            account.counts.update(self.task.previous.account.counts)
        lines = []
        for index, item in self.items.items():
            if index in self.paths:
                try:
                    line = self._encoded_line(item, [images[path] for path in self.paths[index]], account)
                except ItemError as error:
                    self._fail(item, error)
                    continue
                lines.append(line)
            elif index in self.kept:
                lines.append(self.kept[index])
        account.done = len(lines)
        problems = [self.problems[index] for index in sorted(self.problems)]
        account.reasons.update((problem.kind, problem.reason) for problem in problems)
        payload = self.task.source.parts.path(self.task.chunk.index, ".jsonl")
        return Part(account, problems, {payload: b"".join(lines)})

    @staticmethod
    def _encoded_line(item: Item, results: list[Encoded | ItemError], account: Account) -> bytes:
        """The item's own text with the three fields spliced in. Raises the first error among its images."""
        for result in results:
            if isinstance(result, ItemError):
                raise result
        matched = [result.info.anchor for result in results]
        values = ([result.info.size for result in results], [result.codes for result in results], matched)
        added = orjson.dumps(dict(zip(OUTPUT_FIELDS, values, strict=True)), option=orjson.OPT_SERIALIZE_NUMPY)
        account.counts[ratio_tag(matched[0]) if len(set(matched)) == 1 else f"{RATIO}mixed"] += 1
        account.counts["images"] += len(results)
        account.counts.update(f"images h{h} w{w}" for h, w in matched)
        return item.raw[: item.raw.rindex(b"}")].rstrip() + b", " + added[1:] + b"\n"
