"""The job of the ILLUME document: annotated images to DualViTok codes, chunk by chunk."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from vision_tokenizer.codebook.annotations import Dataset, image_names
from vision_tokenizer.codebook.encoder import Encoded, Encoder, Images
from vision_tokenizer.codebook.forms import Row
from vision_tokenizer.codebook.inputs import item_image
from vision_tokenizer.codebook.output import RATIO, CodebookFile, CodebookOutput, Settings, check_folders
from vision_tokenizer.images.anchors import anchors, crop_share, ratio_tag
from vision_tokenizer.images.dualvitok import prepare
from vision_tokenizer.images.files import CROP_ABOVE_THRESHOLD, CropRejected
from vision_tokenizer.models.protocol import ImageTokenizer
from vistoken.cli import note
from vistoken.errors import ItemError, UserError
from vistoken.jobs.chunks import Item
from vistoken.jobs.counts import Counts, counts_table, time_line
from vistoken.jobs.files import exclusive
from vistoken.jobs.progress import ItemsUnderWay, Progress, Stopwatch
from vistoken.jobs.run import OpenChunk, Task, Writer, todo
from vistoken.jobs.workers import Workers
from vistoken.store import Location

STAGES = ("encode", "wait for decode", "wait for write")  # of the thread that feeds the device
THRESHOLDS = (0.1, 0.2, 0.3)  # of the crop, for which the summary says how many items they reject
BESIDE = ("decode", "write")  # of the threads beside it


def run_codebook_inference(
    datasets: Sequence[Dataset],
    tokenizer: ImageTokenizer,
    settings: Settings,
    workers: Workers,
    *,
    num_workers: int,
    restart: str | None = None,
    other_devices: bool = False,
) -> tuple[dict[str, Counts], dict[str, list[str]]]:
    """Encode all images of `datasets`.

    Returns, on the first worker, the counts of each data set and why files of it, or all of it, cannot be read.
    `restart` and `other_devices` are those of `Output.begin`. Raises `UserError` if an output was made with other
    settings, or another run is writing it.
    """
    check_folders(datasets, settings)
    outputs = [CodebookOutput(dataset, tokenizer, settings) for dataset in datasets]
    readable = [output for output in outputs if output.sources]
    prepare_image = partial(
        prepare,
        choices=anchors(settings.resolution_type, settings.resolution),
        crop_percent_thresh=settings.crop_percent_thresh,
        orientation=settings.exif_orientation,
    )
    with ExitStack() as held:
        for output in readable:
            held.enter_context(output.begin(workers, restart, other_devices))
        files = [file for output in readable for file in output.sources]
        open_files = [file for file in files if not file.was_finished]
        if files and not open_files:
            note("nothing to do: every file was finished before")
        items = [file.table.items for file in open_files if file.table.items is not None]
        total = sum(items) if len(items) == len(open_files) else None  # of tar files nobody knows before they are read
        progress = held.enter_context(Progress(workers, total, "codes"))
        encoder: Encoder[CodebookChunk] = held.enter_context(
            Encoder(
                tokenizer,
                prepare_image,
                batch_size=settings.batch_size,
                num_workers=num_workers,
                cuda_graphs=settings.cuda_graphs,
                on_image=lambda chunk, name, encoded: chunk.under_way.image_done(name, encoded),
            )
        )
        writer = held.enter_context(Writer(encoder.watch))
        for task in todo(files, workers, progress):  # of all: a worker that begins late finds some finished already
            chunk = CodebookChunk(task, progress)
            encoder.add(chunk, chunk.images())
            for chunk, images in encoder.finished():
                writer.write(chunk, images, encoder.watch, progress)
        for chunk, images in encoder.flush():
            writer.write(chunk, images, encoder.watch, progress)
        writer.flush()
        progress.wait_for_all()
        counts = join(readable, workers)
    return counts, {output.dataset.name: output.unreadable for output in outputs if output.unreadable}


def join(outputs: Sequence[CodebookOutput], workers: Workers) -> dict[str, Counts]:
    """Write the final files, on the first worker of those that wait for each other, of ranges on the last.

    Returns the counts of each data set that this worker wrote.
    """
    counts = {}
    for output in outputs:
        if not workers.waits and not output.complete():
            note(f"data set {output.dataset.name}: others are not through; who ends last writes the final files")
        elif not workers.waits or workers.rank == 0:
            with exclusive(output.work / "join.lock"):
                counts[output.dataset.name] = output.finish()
    return counts


class CodebookChunk(OpenChunk):
    """A chunk of annotations or a shard, the images its items need, and the rows that it already has."""

    source: CodebookFile
    under_way: ItemsUnderWay

    def __init__(self, task: Task, progress: Progress):
        super().__init__(task)
        self.under_way = ItemsUnderWay(progress)
        self.unread = False  # the input could not be read to the chunk's end
        self._form = self.source.form
        self._payload = self.source.results.path(self.chunk.index, self._form.suffix)
        self._rows: dict[int, Any] = {}  # item -> its row of the output
        if done := self.done_before():
            self._rows = dict(zip(done, self._form.unpack(self._payload.read_bytes()), strict=True))
        self._names: dict[int, list[Location | str]] = {}  # item -> its images, yet to be encoded

    def images(self) -> Iterator[tuple[Location | str, Any]]:
        """Read the chunk: the images that its items need, by name."""
        for item in self._read():
            if item.error:
                self.fail(item, item.error)
                continue
            try:
                images = [item_image(self.source.dataset, item, name) for name in image_names(item.value)]
            except ItemError as error:
                self.fail(item, error)
                continue
            self._names[item.index] = [name for name, _ in images]
            self.under_way.expect(item.index, self._names[item.index])
            while images:
                yield images.pop(0)  # and hold none while the encoder has no room for more

    def _read(self) -> Iterator[Item]:
        try:
            yield from self.todo()
        except UserError:  # told at the end, by `CodebookOutput.finish`: the other files go on
            self.unread = True

    def write(self, images: Images, watch: Stopwatch, progress: Progress) -> None:
        """Put the codes to the items, in input order, and save the chunk."""
        if self.unread:
            return
        with watch("write"):
            tallies = Counter(self.previous.counts.tallies if self.previous else ())
            for index, names in self._names.items():
                tally_crops([images[name] for name in names], tallies)
                try:
                    row = encoded_row(self.items[index], [images[name] for name in names], tallies)
                    self._rows[index] = self._form.kept(row)
                except ItemError as error:
                    self.fail(self.items[index], error)
            content = self._form.pack(self._rows[index] for index in sorted(self._rows))
        seconds = watch.take()
        with watch("write"):  # counted with the next chunk
            self.save({self._payload: content}, tallies=tallies, seconds=seconds, progress=progress)


def tally_crops(results: Sequence[Encoded | ItemError], tallies: Counter[str]) -> None:
    """Count an item for each threshold that would reject it, if nothing else does."""
    losses = []
    for result in results:
        if isinstance(result, CropRejected):
            losses.append(result.crop_share)
        elif isinstance(result, Encoded):
            height, width = result.info.size
            losses.append(crop_share(height, width, result.info.anchor))
        else:
            return
    tallies.update(f"crop above {threshold:g}" for threshold in THRESHOLDS if max(losses) > threshold)


def encoded_row(item: Item, results: list[Encoded | ItemError], tallies: Counter[str]) -> Row:
    """The item with its codes. Raises the first error among its images."""
    images = []
    for result in results:
        if isinstance(result, ItemError):
            raise result
        images.append(result)
    row = Row(item.raw, [i.info.size for i in images], [i.codes for i in images], [i.info.anchor for i in images])
    tallies[ratio_tag(row.anchors[0]) if len(set(row.anchors)) == 1 else f"{RATIO}mixed"] += 1
    tallies["images"] += len(images)
    tallies.update(f"images h{h} w{w}" for h, w in row.anchors)
    return row


def report(
    datasets: Sequence[Dataset], settings: Settings, counts: dict[str, Counts], unreadable: dict[str, list[str]]
) -> str:
    """The run in words and numbers, for the terminal."""
    lines, total = [counts_table(counts)] if counts else [], Counts()
    for dataset in datasets:
        if dataset.name in counts:
            of_dataset = counts[dataset.name]
            total.add(of_dataset)
            per_anchor = {name: n for name, n in sorted(of_dataset.tallies.items()) if name.startswith("images ")}
            sizes = ", ".join(f"{name.removeprefix('images ')}: {n:,}" for name, n in per_anchor.items())
            lines += ["", f"{dataset.name} -> {settings.folder(dataset)}"]
            lines += [f"  {of_dataset.tallies['images']:,} images encoded ({sizes or 'none'})"]
            if cropped := of_dataset.reasons["rejected", CROP_ABOVE_THRESHOLD]:
                items, tallies = of_dataset.items, of_dataset.tallies
                shares = [f"{t:g} rejects {tallies[f'crop above {t:g}'] / items:.0%}" for t in THRESHOLDS]
                lines += [
                    f"  {cropped:,} of {items:,} items ({cropped / items:.0%}) lose more than "
                    f"{settings.crop_percent_thresh:.0%} of an image to the crop and are rejected; "
                    f"--crop_percent_thresh {', '.join(shares)}, 0 none"
                ]
            if of_dataset.rejected + of_dataset.failed:
                lines += [f"  what was rejected or failed, and why: {settings.folder(dataset)}/*.rejected.jsonl"]
    lines += ["", f"time of the encoding processes, of all runs: {time_line(total, STAGES, BESIDE)}"]
    lines += [f"not done: {message}" for messages in unreadable.values() for message in messages]
    return "\n".join(lines)
