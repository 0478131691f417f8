"""The job of the ILLUME document: annotated images to DualViTok codes, chunk by chunk."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import orjson

from vision_tokenizer.codebook.annotations import OUTPUT_FIELDS, Dataset, image_names, image_path
from vision_tokenizer.codebook.encoder import Encoded, Engine
from vision_tokenizer.codebook.output import (
    RATIO,
    WORK,
    AnnotationFile,
    Settings,
    check_folders,
    finish_dataset,
    make_manifest,
    open_files,
    remove_output,
    remove_unfinished,
)
from vision_tokenizer.images.anchors import anchors, ratio_tag
from vision_tokenizer.images.dualvitok import prepare
from vision_tokenizer.models.protocol import ImageTokenizer
from vistoken.cli import note
from vistoken.errors import Failed, ItemError
from vistoken.jobs.chunks import Item
from vistoken.jobs.counts import Account
from vistoken.jobs.lock import run_lock
from vistoken.jobs.manifest import check_manifest
from vistoken.jobs.open_chunk import OpenChunk
from vistoken.jobs.progress import Progress
from vistoken.jobs.results import Part
from vistoken.jobs.run import Task, run_chunks
from vistoken.jobs.summary import accounts_table, time_line
from vistoken.jobs.workers import Claims

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
) -> tuple[dict[str, Account], dict[str, list[str]]]:
    """Encode all images of `datasets`.

    Returns, on the first rank, the account of each data set and why files of it, or all of it, cannot be read.
    `restart` None goes on from what is there, "same" makes the output anew with the same settings, "any" with whatever
    settings. Raises `UserError` if an output was made with other settings, or another run is writing it.
    """
    check_folders(datasets, settings)
    with ExitStack() as locks:
        claims.lead(lambda: _begin(datasets, tokenizer, settings, locks, restart))
        opened, errors = _open_all(datasets, settings)
        for dataset in datasets:  # the same on every rank, or codes of different kinds would be mixed
            if files := opened[dataset.name]:
                check_manifest(settings.folder(dataset), make_manifest(tokenizer, settings, files))
        todo = [file for files in opened.values() for file in files if file.finished() is None]
        if not todo and any(opened.values()):
            note("nothing to do: every file was finished before")
        progress = Progress(claims, sum(file.table.items for file in todo), "codes")
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
        accounts = {
            d.name: finish_dataset(d, settings, files, errors[d.name]) for d in datasets if (files := opened[d.name])
        }
        return accounts, {name: messages for name, messages in errors.items() if messages}


def _begin(
    datasets: Sequence[Dataset], tokenizer: ImageTokenizer, settings: Settings, locks: ExitStack, restart: str | None
) -> None:
    """Lock the outputs and settle with what is already in them."""
    opened, _ = _open_all(datasets, settings)
    for dataset in datasets:
        files = opened[dataset.name]
        if not files:
            continue
        locks.enter_context(run_lock(settings.folder(dataset) / WORK))
        remove_unfinished(dataset, settings)
        if restart == "any":
            remove_output(dataset, settings)
        manifest = make_manifest(tokenizer, settings, files)
        check_manifest(settings.folder(dataset), manifest)
        if restart == "same":
            remove_output(dataset, settings)
            check_manifest(settings.folder(dataset), manifest)


def _open_all(
    datasets: Sequence[Dataset], settings: Settings
) -> tuple[dict[str, list[AnnotationFile]], dict[str, list[str]]]:
    """Data set name -> its files, and -> why others of its files cannot be read."""
    opened: dict[str, list[AnnotationFile]] = {}
    errors: dict[str, list[str]] = {}
    for dataset in datasets:
        opened[dataset.name], errors[dataset.name] = open_files(dataset, settings)
    return opened, errors


def report(
    datasets: Sequence[Dataset], settings: Settings, accounts: dict[str, Account], errors: dict[str, list[str]]
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
            if account.rejected + account.failed:
                lines += [f"  what was rejected or failed, and why: {settings.folder(dataset)}/*.rejected.jsonl"]
    decode = f"decode {total.seconds['decode']:.1f} s in the pool"
    lines += ["", f"time of the encoding processes, of all runs: {time_line(total, WORK_STAGES)}; {decode}"]
    lines += [f"not done: {message}" for messages in errors.values() for message in messages]
    return "\n".join(lines)


def encode_chunks(engine: Engine, tasks: Iterator[Task]) -> Iterator[tuple[Task, Part]]:
    """The job's `process`: read each chunk, encode its images, put the codes back into its lines."""
    groups = ((work, work.images()) for work in map(ChunkWork, tasks))
    for work, images in engine.encode(groups):
        part = work.part(images)
        part.account.seconds.update(engine.watch.take())
        with engine.watch("write"):  # which our consumer does while we are suspended
            yield work.task, part


class ChunkWork:
    """One chunk in progress: the images its items need, the lines it already has, and then its part."""

    def __init__(self, task: Task):
        self.task = task
        self._chunk = OpenChunk.read(task)
        self._payload = task.source.parts.path(task.chunk.index, ".jsonl")
        self._kept = self._lines_of_earlier_run()  # item -> its output line
        self._paths: dict[int, list[Path]] = {}  # item -> its images, yet to be encoded
        for item in self._chunk.todo():
            try:
                self._paths[item.index] = self._image_paths(item)
            except ItemError as error:
                self._chunk.fail(item, error)

    def _lines_of_earlier_run(self) -> dict[int, bytes]:
        done = self._chunk.done_before()
        if not done:
            return {}
        with self._payload.open("rb") as lines:
            return dict(zip(done, lines, strict=True))

    def _image_paths(self, item: Item) -> list[Path]:
        if item.error:
            raise Failed("not JSON", item.error)
        return [image_path(self.task.source.dataset.image_dir, name) for name in image_names(item.value)]

    def images(self) -> Iterator[Path]:
        for paths in self._paths.values():
            yield from paths

    def part(self, images: Images) -> Part:
        """The finished chunk: its lines in input order, its problems, its account."""
        lines = dict(self._kept)
        counts = Counter(self.task.previous.account.counts if self.task.previous else ())
        for index, paths in self._paths.items():
            item = self._chunk.items[index]
            try:
                lines[index] = _encoded_line(item, [images[path] for path in paths], counts)
            except ItemError as error:
                self._chunk.fail(item, error)
        account, problems = self._chunk.close(done=len(lines))
        account.counts = counts
        return Part(account, problems, {self._payload: b"".join(lines[index] for index in sorted(lines))})


def _encoded_line(item: Item, results: list[Encoded | ItemError], counts: Counter[str]) -> bytes:
    """The item's own text with the three fields spliced in. Raises the first error among its images."""
    for result in results:
        if isinstance(result, ItemError):
            raise result
    matched = [result.info.anchor for result in results]
    values = ([result.info.size for result in results], [result.codes for result in results], matched)
    added = orjson.dumps(dict(zip(OUTPUT_FIELDS, values, strict=True)), option=orjson.OPT_SERIALIZE_NUMPY)
    counts[ratio_tag(matched[0]) if len(set(matched)) == 1 else f"{RATIO}mixed"] += 1
    counts["images"] += len(results)
    counts.update(f"images h{h} w{w}" for h, w in matched)
    return item.raw[: item.raw.rindex(b"}")].rstrip() + b", " + added[1:] + b"\n"
