"""What codebook inference would do with a data set, told from its annotations and image headers, without a model.

The rules are the job's own functions, so the run will do what is counted here. A file is decoded to see whether it
is truncated, unless it is a JPEG, PNG or WebP whose end shows that it is whole. Other damage behind a sound header
shows only in the run.
"""

import hashlib
import io
import tempfile
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from math import log2
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from vision_tokenizer.codebook.annotations import Dataset, check_conversations, image_names
from vision_tokenizer.codebook.inputs import input_files, input_table, item_image
from vision_tokenizer.images.anchors import crop_share, match_anchor
from vision_tokenizer.images.dualvitok import prepare
from vision_tokenizer.images.files import (
    Embedded,
    exif_orientation,
    is_whole,
    open_image,
    open_source,
    place_image,
    read_image,
    upright_size,
)
from vistoken.errors import Failed, ItemError, Rejected, UserError
from vistoken.jobs.chunks import Item
from vistoken.jobs.counts import Counts, Problem
from vistoken.jobs.run import Table
from vistoken.store import Location, Url

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)  # at which the report says how much would be rejected
BINS_PER_OCTAVE, MAX_OCTAVES = 12, 4  # of the histogram of width / height
CHUNK_ITEMS = 64  # that a worker surveys at a time
_SAMPLE = 4096  # bytes from each end of a file that tell copies apart
WINDOW = 4  # chunks per worker handed out at a time
TIMED_CHUNKS, TIMED_IMAGES = 64, 4  # of every so many chunks, so many images are decoded to see how long that takes

T = TypeVar("T")
R = TypeVar("R")


class Header(NamedTuple):
    """What the header tells of an image."""

    size: tuple[int, int]  # (h, w)
    anchor: tuple[int, int]
    crop_share: float
    path_digest: int
    content_digest: int
    rejected: Rejected | None  # by the crop threshold
    turned: bool  # its EXIF data say that it is to be turned
    decoding: float = 0.0  # seconds of a core that it took to decode it, if it was

    @property
    def ratio(self) -> tuple[int, tuple[int, int] | None]:
        """(bin of log2(w/h), anchor or None)."""
        octaves = min(max(log2(self.size[1] / self.size[0]), -MAX_OCTAVES), MAX_OCTAVES)
        return round(octaves * BINS_PER_OCTAVE), None if self.rejected else self.anchor


@dataclass
class Survey:
    """What some items hold. Grows by 16 bytes an image."""

    counts: Counts = field(default_factory=Counts)  # as codebook inference will count
    images: int = 0  # referred to by all items
    turned: int = 0  # of these, with an EXIF orientation other than upright
    anchors: Counter[tuple[int, int]] = field(default_factory=Counter)  # images that will be in the output
    ratios: Counter[tuple] = field(default_factory=Counter)  # `Header.ratio` of all images to be encoded
    thresholds: Counter[float] = field(default_factory=Counter)  # items that each threshold would reject
    source_bytes: int = 0  # of the annotations that will be done
    decoded: int = 0  # images that were decoded as codebook inference will, to see how long it takes
    decoded_pixels: int = 0
    decoding: float = 0.0  # seconds of a core
    format_errors: Counter[str] = field(default_factory=Counter)  # breaches of the rules for conversations
    paths: array = field(default_factory=lambda: array("Q"))
    contents: array = field(default_factory=lambda: array("Q"))
    problems: list[Problem] = field(default_factory=list)

    def add(self, other: "Survey") -> None:
        """Add everything but the problems, which the caller writes to a file."""
        self.counts.add(other.counts)
        self.images += other.images
        self.turned += other.turned
        for name in ("anchors", "ratios", "thresholds", "format_errors"):
            getattr(self, name).update(getattr(other, name))
        for name in ("source_bytes", "decoded", "decoded_pixels", "decoding"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.paths.extend(other.paths)
        self.contents.extend(other.contents)

    @property
    def clean(self) -> bool:
        return not self.counts.failed and not self.format_errors

    def duplicates(self) -> tuple[int, int]:
        """(references to an image that another line names too, files whose size and ends equal another file's)."""
        _, first = np.unique(np.frombuffer(self.paths, np.uint64), return_index=True)
        contents = np.frombuffer(self.contents, np.uint64)[first]
        return len(self.paths) - len(first), len(contents) - len(np.unique(contents))


@dataclass(frozen=True)
class Rules:
    """What decides the plan of a data set. Pickles to the workers."""

    dataset: Dataset
    choices: tuple[tuple[int, int], ...]
    crop_percent_thresh: float
    exif_orientation: str = "ignore"


def survey_dataset(
    rules: Rules, num_workers: int, on_items: Callable[[int], object], on_problem: Callable[[Problem], None]
) -> tuple[Survey, list[str]]:
    """Survey every annotation file or shard of a data set. Returns the survey, and why some files cannot be read.

    Raises `UserError` where the data set has no files at all.
    """
    total, errors = Survey(), []
    folders = (rules.dataset.image_dir, rules.dataset.annotation_dir)
    stored = "://" in (rules.dataset.shards or "") or any(isinstance(folder, Url) for folder in folders)
    with tempfile.TemporaryDirectory() as cache:
        tables = []
        for file in input_files(rules.dataset):
            try:
                cached = Path(cache) / f"{file.name}.chunks.json"
                tables.append(input_table(rules.dataset, file, CHUNK_ITEMS, cached, whole=False))
            except UserError as error:
                errors.append(str(error))
        chunks = ((table, index) for table in tables for index in range(len(table)))
        for found in _in_order(partial(_survey_chunk, rules), chunks, num_workers, stored):
            total.add(found)
            for problem in found.problems:
                on_problem(problem)
            on_items(found.counts.items)
    return total, errors


def _in_order(function: Callable[[T], R], arguments: Iterator[T], num_workers: int, stored: bool) -> Iterator[R]:
    """`function` of each argument, computed by processes: results in order, and only a few under way.

    Where `stored`, they are no forks of this one, whose connections to a store would not work in them.
    """
    if num_workers == 1:
        yield from map(function, arguments)
        return
    pool = ProcessPoolExecutor(num_workers, get_context("spawn" if stored else None))
    try:
        waiting = deque(pool.submit(function, each) for each in islice(arguments, WINDOW * num_workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, each) for each in islice(arguments, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _survey_chunk(rules: Rules, chunk: tuple[Table, int]) -> Survey:
    table, index = chunk
    survey = Survey()
    headers: dict[str, Header | Failed] = {}  # many items of a chunk may name one image

    def look(name: str) -> Header | Failed:
        if name not in headers:
            timed = index % TIMED_CHUNKS == 0 and survey.decoded < TIMED_IMAGES and rules.dataset.tokenizer_inference
            headers[name] = header = _header(rules, item, name, timed)
            if isinstance(header, Header) and header.decoding:
                survey.decoded += 1
                survey.decoded_pixels += header.size[0] * header.size[1]
                survey.decoding += header.decoding
        return headers[name]

    for item in table.read(table[index]):
        survey.counts.items += 1
        try:
            _survey_item(rules, survey, item, look)
        except ItemError as error:
            survey.counts.reasons[error.kind, error.reason] += 1
            survey.problems.append(Problem.of(error, table.path, item))
        if not isinstance(item.value, dict) or not isinstance(item.value.get("images", []), str | list):
            continue  # told already
        try:
            check_conversations(item.value)
        except Failed as breach:
            survey.format_errors[breach.reason] += 1
            survey.problems.append(Problem.of(breach, table.path, item))
    return survey


def _survey_item(rules: Rules, survey: Survey, item: Item, look: Callable[[str], Header | Failed]) -> None:
    """Count an item. Raises the error that codebook inference will report: the first among its images."""
    if item.error:
        raise item.error
    text_only = not rules.dataset.tokenizer_inference and isinstance(item.value, dict) and "images" not in item.value
    names = [] if text_only else image_names(item.value)
    looked = [look(name) for name in names]
    headers = [header for header in looked if isinstance(header, Header)]
    survey.images += len(names)
    survey.turned += sum(header.turned for header in headers)
    survey.paths.extend(header.path_digest for header in headers)
    survey.contents.extend(header.content_digest for header in headers)
    if rules.dataset.tokenizer_inference:
        survey.ratios.update(header.ratio for header in headers)
        if len(headers) == len(names):
            worst = max(header.crop_share for header in headers)
            survey.thresholds.update(threshold for threshold in THRESHOLDS if worst > threshold)
    for header in looked:
        if error := header.rejected if isinstance(header, Header) else header:
            raise error
    survey.counts.done += 1
    if rules.dataset.tokenizer_inference:
        survey.source_bytes += len(item.raw)
        survey.anchors.update(header.anchor for header in headers)


def _header(rules: Rules, item: Item, name: str, timed: bool) -> Header | Failed:
    rejected, decoding = None, 0.0
    try:
        where, path = item_image(rules.dataset, item, name)
        with open_image(path) as image:
            size, ends = upright_size(image, rules.exif_orientation), _ends(path)
            turned = exif_orientation(image) > 1
            if not is_whole(path, image):
                read_image(path)
            if rules.dataset.tokenizer_inference:
                place_image(path, size, rules.choices, rules.crop_percent_thresh)
        if timed:
            began = time.thread_time()
            prepare(path, rules.choices, rules.crop_percent_thresh, rules.exif_orientation)
            decoding = time.thread_time() - began
    except Failed as error:
        return error
    except Rejected as error:
        rejected = error
    anchor = match_anchor(*size, rules.choices)
    return Header(
        size, anchor, crop_share(*size, anchor), _digest(str(where).encode()), _digest(ends), rejected, turned, decoding
    )


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _ends(image: Location | Embedded) -> bytes:
    """Size, beginning and end of a file: the same for copies."""
    with open_source(image) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        beginning = file.read(_SAMPLE)
        file.seek(max(size - _SAMPLE, 0))
        return size.to_bytes(8, "little") + beginning + file.read(_SAMPLE)
