"""Images to codes at full speed: decode pool -> one bucket per resolution -> batches of one fixed shape.

Images come in groups (the chunks of a job) and leave with their group, but batches are filled across groups, so that
only the last batch of a resolution is ever padded. A batch always has `batch_size` slots: an image's codes then
depend neither on its neighbours nor on its place among them.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from vision_tokenizer.images.dualvitok import normalize
from vision_tokenizer.models.protocol import ImageTokenizer
from vistoken.errors import Failed, ItemError, UserError
from vistoken.jobs.progress import Stopwatch

CPU_STREAMS = 8  # at most this many batches side by side on a CPU: each has activations of its own
MAX_OPEN_GROUPS = 16  # a rare resolution's bucket may hold a group back this long, then it is encoded as it is

Ref = TypeVar("Ref", bound=Hashable)  # what names an image, e.g. its path
Tag = TypeVar("Tag")  # what names a group
Prepare = Callable[[Ref], tuple[torch.Tensor, Any]]  # -> pixels (3, H, W), uint8 or float32 in [-1, 1], and its info


class Encoded(NamedTuple):
    """An image's codes per branch, each an (h, w) int32 array, with what `prepare` said of the image."""

    codes: tuple[np.ndarray, ...]
    info: Any


@dataclass(eq=False)
class _Group(Generic[Tag]):
    tag: Tag
    waiting: int
    results: dict[Hashable, Encoded | ItemError] = field(default_factory=dict)

    def finish(self, ref: Hashable, result: Encoded | ItemError) -> None:
        self.results[ref] = result
        self.waiting -= 1


class _Slot(NamedTuple):
    group: _Group
    ref: Hashable
    info: Any
    pixels: torch.Tensor


def _not_finite(ref: Hashable) -> Failed:
    return Failed(
        "not a number", f"{ref}: its features are not finite: a damaged checkpoint, or too much for fp16 (try bf16)"
    )


class Engine:
    """Encodes groups of images with `tokenizer`; `prepare` runs in `num_workers` threads.

    Pillow and torch release the interpreter lock while they decode, resize and compute, so threads overlap. On a CPU
    batches are encoded side by side, with a share of torch's threads each: threads that share out every layer among
    themselves spend more time waiting for one another.
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        prepare: Prepare,
        *,
        batch_size: int,
        num_workers: int,
        on_images: Callable[[int], None] = lambda count: None,
    ):
        self._tokenizer, self._prepare = tokenizer, prepare
        self._batch_size, self._num_workers = batch_size, num_workers
        self._on_images = on_images
        self._on_cuda = tokenizer.device.type == "cuda"
        self._threads = torch.get_num_threads()
        self._streams = 1 if self._on_cuda else min(self._threads, CPU_STREAMS)
        self._window = 2 * (batch_size * self._streams + num_workers)  # images decoded or being decoded, ahead
        self._buckets: dict[tuple[torch.dtype, torch.Size], list[_Slot]] = defaultdict(list)
        self._launched: deque[tuple[list[_Slot], Callable[[], list[np.ndarray]]]] = deque()
        self.watch = Stopwatch()

    def encode(
        self, groups: Iterable[tuple[Tag, Iterable[Ref]]]
    ) -> Iterator[tuple[Tag, dict[Ref, Encoded | ItemError]]]:
        """Yield every group once all of its images are done, with one result per image, codes or error.

        `groups` is drawn from only as the pipeline has room. Within a group an image named twice is encoded once.
        """
        open_groups: deque[_Group] = deque()
        decoding: deque[tuple[_Group, Ref, Future]] = deque()
        pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="decode")
        self._encoders = ThreadPoolExecutor(
            self._streams, "encode", torch.set_num_threads, (self._threads // self._streams,)
        )
        try:
            for tag, refs in groups:
                distinct = list(dict.fromkeys(refs))
                group = _Group(tag, len(distinct))
                open_groups.append(group)
                for ref in distinct:
                    decoding.append((group, ref, pool.submit(self._timed_prepare, ref)))
                    if len(decoding) > self._window:
                        self._fill(*decoding.popleft())
                        yield from self._finished(open_groups)
                if len(open_groups) > MAX_OPEN_GROUPS:
                    while decoding and decoding[0][0] is open_groups[0]:
                        self._fill(*decoding.popleft())
                    self._flush(open_groups[0])
                yield from self._finished(open_groups)
            while decoding:
                self._fill(*decoding.popleft())
                yield from self._finished(open_groups)
            self._flush()
            yield from self._finished(open_groups)
        finally:
            pool.shutdown(cancel_futures=True)
            self._encoders.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)  # MKL's number is the whole process's

    @staticmethod
    def _finished(open_groups: deque[_Group]) -> Iterator[tuple[Any, dict]]:
        for group in [group for group in open_groups if not group.waiting]:
            open_groups.remove(group)
            yield group.tag, group.results

    def _timed_prepare(self, ref: Ref) -> tuple[torch.Tensor, Any, float]:
        began = time.perf_counter()
        pixels, info = self._prepare(ref)
        return pixels, info, time.perf_counter() - began

    def _fill(self, group: _Group, ref: Ref, decoded: Future) -> None:
        """Put a decoded image into its bucket, and encode the bucket when it is full."""
        with self.watch("wait for decode"):
            error = decoded.exception()
        if isinstance(error, ItemError):
            group.finish(ref, type(error)(error.reason, error.detail))  # its traceback would keep the image alive
            return
        pixels, info, seconds = decoded.result()
        self.watch.add("decode", seconds)
        bucket = self._buckets[pixels.dtype, pixels.shape]
        bucket.append(_Slot(group, ref, info, pixels))
        if len(bucket) == self._batch_size:
            self._launch(bucket)

    def _flush(self, group: _Group | None = None) -> None:
        """Encode the buckets that hold images of `group` (of any, if None) and collect all results."""
        for bucket in self._buckets.values():
            if any(group is None or slot.group is group for slot in bucket):
                self._launch(bucket)
        while self._launched:
            self._collect()

    def _launch(self, bucket: list[_Slot]) -> None:
        """Start a batch and empty its bucket; results are collected while later batches run."""
        slots = bucket.copy()
        bucket.clear()
        with self.watch("encode"):
            first = slots[0].pixels
            batch = torch.zeros((self._batch_size, *first.shape), dtype=first.dtype, pin_memory=self._on_cuda)
            for row, slot in zip(batch[: len(slots)], slots, strict=True):  # the rest is padding
                row.copy_(slot.pixels)
            start = self._start_on_gpu if self._on_cuda else self._start_on_cpu
            self._launched.append((slots, start(batch)))
        while len(self._launched) > self._streams:
            self._collect()

    def _start_on_cpu(self, batch: torch.Tensor) -> Callable[[], list[np.ndarray]]:
        def codes() -> list[np.ndarray]:
            return [grid.int().numpy() for grid in self._tokenizer.encode(normalize(batch))]

        return self._encoders.submit(codes).result

    def _start_on_gpu(self, batch: torch.Tensor) -> Callable[[], list[np.ndarray]]:
        device = self._tokenizer.device
        try:
            codes = self._tokenizer.encode(normalize(batch.to(device, non_blocking=True)))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{device} has too little memory for batches of {len(batch)} images of {batch.shape[2]} x "
                f"{batch.shape[3]}: choose a smaller --batch_size"
            ) from error
        host = [torch.empty(grid.shape, dtype=torch.int32, pin_memory=True) for grid in codes]
        for kept, computed in zip(host, codes, strict=True):
            kept.copy_(computed, non_blocking=True)
        copied = torch.cuda.current_stream(device).record_event()

        def result() -> list[np.ndarray]:
            copied.synchronize()
            return [grid.numpy() for grid in host]

        return result

    def _collect(self) -> None:
        """Hand the oldest launched batch's codes to their groups."""
        slots, result = self._launched.popleft()
        with self.watch("encode"):
            branches = result()
        for row, slot in enumerate(slots):
            codes = tuple(grid[row] for grid in branches)
            complete = all(grid.min() >= 0 for grid in codes)
            slot.group.finish(slot.ref, Encoded(codes, slot.info) if complete else _not_finite(slot.ref))
        self._on_images(len(slots))
