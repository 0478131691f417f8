"""Images to codes at full speed: decode pool -> one bucket per resolution -> batches of one fixed shape.

Images come with the chunk of a job that needs them and leave with it, but batches are filled across chunks, so that
only the last batch of a resolution is ever padded. A batch always has `batch_size` slots: an image's codes then depend
neither on its neighbours nor on its place among them.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from vision_tokenizer.codebook.graphs import Recordings
from vision_tokenizer.images.dualvitok import normalize
from vision_tokenizer.models.protocol import ImageTokenizer
from vistoken.device import memory_named
from vistoken.errors import Failed, ItemError
from vistoken.jobs.progress import Stopwatch

CPU_STREAMS = 8  # at most this many batches side by side on a CPU: each has activations of its own
SECONDS_AHEAD = {"cpu": 0.0, "cuda": 2.0}  # for which there are decoded images, whatever the next ones take
MOST_AHEAD = 4096  # decoded images in memory: 0.8 GB at 256 x 256
MAX_OPEN_CHUNKS = 16  # a rare resolution's bucket may hold a chunk back this long, then it is encoded as it is
MAX_OPEN_IMAGES = 8192  # the same for chunks of many images, as shards are

Ref = TypeVar("Ref")  # an image as `prepare` takes it, e.g. its path or its bytes
C = TypeVar("C")  # a chunk
Prepare = Callable[[Ref], tuple[torch.Tensor, Any]]  # -> pixels (3, H, W), uint8 or float32 in [-1, 1], and its info


class Encoded(NamedTuple):
    """An image's codes per branch, each an (h, w) int32 array, with what `prepare` said of the image."""

    codes: tuple[np.ndarray, ...]
    info: Any


Images = dict[Any, Encoded | ItemError]  # what became of a chunk's images, by name


@dataclass(eq=False)
class _Open(Generic[C]):
    """A chunk with images still to come."""

    chunk: C
    to_read: Iterator[tuple[Hashable, Any]] | None  # None: all images are under way, or done
    names: set[Hashable] = field(default_factory=set)  # of those that were read
    images: Images = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.to_read is None and len(self.images) == len(self.names)

    def next(self) -> tuple[Hashable, Any] | None:
        """Read the next image that has not come before."""
        for name, image in self.to_read or ():
            if name not in self.names:
                self.names.add(name)
                return name, image
        self.to_read = None
        return None


class Slot(NamedTuple):
    """An image's place in a batch."""

    owner: _Open
    name: Hashable
    info: Any
    pixels: torch.Tensor


class Batcher:
    """Sorts images into buckets of one shape and hands a bucket out when it holds a batch."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self._buckets: dict[tuple[torch.dtype, torch.Size], list[Slot]] = defaultdict(list)

    def add(self, slot: Slot) -> list[Slot] | None:
        """Put an image into its bucket -> the bucket, if that made it full."""
        key = slot.pixels.dtype, slot.pixels.shape
        self._buckets[key].append(slot)
        return self._buckets.pop(key) if len(self._buckets[key]) == self.batch_size else None

    def rest(self, owner: _Open | None = None) -> list[list[Slot]]:
        """Take out the buckets that hold images of `owner`; all, if None."""
        keys = [k for k, slots in self._buckets.items() if owner is None or any(s.owner is owner for s in slots)]
        return [self._buckets.pop(key) for key in keys]

    def stack(self, slots: list[Slot], *, pinned: bool) -> torch.Tensor:
        """(batch_size, 3, H, W), of which what `slots` do not fill is zero."""
        first = slots[0].pixels
        batch = torch.zeros((self.batch_size, *first.shape), dtype=first.dtype, pin_memory=pinned)
        for row, slot in zip(batch, slots, strict=False):
            row.copy_(slot.pixels)
        return batch


class Pending(Protocol):
    """A batch that is being encoded."""

    def result(self) -> list[np.ndarray]:
        """Per branch (B, h, w) int32 codes, once they are there."""
        ...


class CpuRunner:
    """Encodes batches side by side, each in a thread with a share of torch's own threads.

    Threads that share out every layer among themselves spend more time waiting for one another.
    """

    def __init__(self, tokenizer: ImageTokenizer):
        self._tokenizer = tokenizer
        self._threads = torch.get_num_threads()
        self.streams = min(self._threads, CPU_STREAMS)
        self._pool = ThreadPoolExecutor(self.streams, "encode", torch.set_num_threads, (self._threads // self.streams,))

    def start(self, batch: torch.Tensor) -> Pending:
        return self._pool.submit(self._encode, batch)

    def _encode(self, batch: torch.Tensor) -> list[np.ndarray]:
        with _memory_named(self._tokenizer.device, len(batch), batch.shape):
            return [grid.int().numpy() for grid in self._tokenizer.encode(normalize(batch))]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # MKL's number is the whole process's


class GpuRunner:
    """Launches batches one after the other; the copy of their codes to the host runs beside the next one."""

    streams = 1

    def __init__(self, tokenizer: ImageTokenizer, *, graphs: bool = False):
        self._tokenizer = tokenizer
        self._recordings = Recordings(tokenizer) if graphs else None

    def start(self, batch: torch.Tensor) -> Pending:
        device = self._tokenizer.device
        if self._recordings:
            codes = self._recordings.encode(batch)
        else:
            codes = self._tokenizer.encode(normalize(batch.to(device, non_blocking=True)))
        host = [torch.empty(grid.shape, dtype=torch.int32, pin_memory=True) for grid in codes]
        for kept, computed in zip(host, codes, strict=True):
            kept.copy_(computed, non_blocking=True)
        return _OnItsWay(host, torch.cuda.current_stream(device).record_event())

    def close(self) -> None:
        pass


class _OnItsWay(NamedTuple):
    host: list[torch.Tensor]
    copied: torch.cuda.Event

    def result(self) -> list[np.ndarray]:
        self.copied.synchronize()
        return [grid.numpy() for grid in self.host]


def _memory_named(device: torch.device, size: int, shape: torch.Size) -> AbstractContextManager[None]:
    return memory_named(device, "--batch_size", size, f"images of {shape[-2]} x {shape[-1]}")


class Encoder(Generic[C]):
    """Encodes the images of chunks with `tokenizer`; `prepare` runs in `num_workers` threads.

        with Encoder(...) as encoder:
            for chunk in chunks:
                encoder.add(chunk, images)
                for chunk, images in encoder.finished(): ...
            for chunk, images in encoder.flush(): ...

    Images are read as they are needed, so that a chunk of any size holds few of them. Pillow and torch release the
    interpreter lock while they decode, resize and compute, so threads overlap. Images are decoded some
    seconds ahead of a GPU, so that a few large ones, or a slow disk, do not keep it waiting.
    `on_image` is told each image's chunk and name, and whether it was encoded.
    `watch` has the seconds of this thread ("wait for decode", "encode") and of the pool ("decode").
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        prepare: Prepare,
        *,
        batch_size: int,
        num_workers: int,
        cuda_graphs: bool = False,
        on_image: Callable[[C, Any, bool], None] = lambda chunk, name, encoded: None,
    ):
        self._prepare, self._on_image = prepare, on_image
        self._device = tokenizer.device
        self._pinned = tokenizer.device.type == "cuda"
        self._runner = GpuRunner(tokenizer, graphs=cuda_graphs) if self._pinned else CpuRunner(tokenizer)
        self._batcher = Batcher(batch_size)
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="decode")
        self.window = 2 * (batch_size * self._runner.streams + num_workers)  # images decoded or being decoded, ahead
        self._began, self._encoded = time.monotonic(), 0
        self._open: deque[_Open[C]] = deque()
        self._decoding: deque[tuple[_Open[C], Hashable, Future]] = deque()
        self._encoding: deque[tuple[list[Slot], Pending]] = deque()
        self.watch = Stopwatch()

    def __enter__(self) -> "Encoder[C]":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._runner.close()

    def add(self, chunk: C, images: Iterable[tuple[Hashable, Any]]) -> None:
        """Queue a chunk and its images, each a name and what `prepare` takes. One named twice is encoded once."""
        self._open.append(_Open(chunk, iter(images)))

    def finished(self) -> Iterator[tuple[C, Images]]:
        """Work until another chunk may be added; yield those of which every image is done, codes or error."""
        while self._decode_ahead():
            self._fill_one()
            yield from self._complete()
        while len(self._open) > MAX_OPEN_CHUNKS or self._held() > MAX_OPEN_IMAGES:
            oldest = self._open[0]
            while any(owner is oldest for owner, _, _ in self._decoding):
                self._fill_one()
            self._encode_rest(oldest)
            yield from self._complete()
        yield from self._complete()

    def flush(self) -> Iterator[tuple[C, Images]]:
        """Work until everything is done; yield every chunk that is left."""
        while self._decode_ahead() or self._decoding:
            self._fill_one()
            yield from self._complete()
        self._encode_rest()
        yield from self._complete()

    def _complete(self) -> Iterator[tuple[C, Images]]:
        for opened in [opened for opened in self._open if opened.complete]:
            self._open.remove(opened)
            yield opened.chunk, opened.images

    def _held(self) -> int:
        """Images of open chunks that were read; the last chunk counts only once another one waits behind it."""
        return sum(len(opened.names) for opened in self._open) if len(self._open) > 1 else 0

    def _decode_ahead(self) -> bool:
        """Read images until enough are being decoded; False if there are no more."""
        for opened in self._open:
            while opened.to_read is not None:
                if len(self._decoding) >= self.window:
                    return True
                if image := opened.next():
                    self._decoding.append((opened, image[0], self._pool.submit(self._timed_prepare, image[1])))
        return False

    def _timed_prepare(self, ref: Any) -> tuple[torch.Tensor, Any, float]:
        began = time.perf_counter()
        pixels, info = self._prepare(ref)
        return pixels, info, time.perf_counter() - began

    def _fill_one(self) -> None:
        """Put the image that was decoded first into its batch, and start the batch if that is full."""
        opened, name, decoded = self._decoding.popleft()
        with self.watch("wait for decode"):
            error = decoded.exception()
        if isinstance(error, ItemError):
            self._finish(opened, name, copy(error))  # its own traceback would keep the image alive
            return
        pixels, info, seconds = decoded.result()
        self.watch.add("decode", seconds)
        if slots := self._batcher.add(Slot(opened, name, info, pixels)):
            self._start(slots)

    def _start(self, slots: list[Slot]) -> None:
        """Start a batch; its codes are collected while later ones run."""
        with self.watch("encode"), _memory_named(self._device, self._batcher.batch_size, slots[0].pixels.shape):
            batch = self._batcher.stack(slots, pinned=self._pinned)
            self._encoding.append((slots, self._runner.start(batch)))
        while len(self._encoding) > self._runner.streams:
            self._collect()

    def _encode_rest(self, owner: _Open | None = None) -> None:
        """Encode the batches that are not full but hold images of `owner` (any, if None), and collect all codes."""
        for slots in self._batcher.rest(owner):
            self._start(slots)
        while self._encoding:
            self._collect()

    def _collect(self) -> None:
        """Hand the codes of the batch that was started first to their chunks."""
        slots, pending = self._encoding.popleft()
        with self.watch("encode"):
            branches = pending.result()
        for row, slot in enumerate(slots):
            codes = tuple(grid[row] for grid in branches)
            result: Encoded | Failed = Encoded(codes, slot.info)
            if any(grid.min() < 0 for grid in codes):
                why = "its features are not finite: a damaged checkpoint, or too much for fp16 (try bf16)"
                result = Failed("not a number", f"{slot.name}: {why}")
            self._finish(slot.owner, slot.name, result)
        self._encoded += len(slots)
        rate = self._encoded / max(time.monotonic() - self._began, 1.0)
        self.window = max(self.window, min(int(rate * SECONDS_AHEAD[self._device.type]), MOST_AHEAD))

    def _finish(self, opened: _Open[C], name: Hashable, result: Encoded | ItemError) -> None:
        opened.images[name] = result
        self._on_image(opened.chunk, name, isinstance(result, Encoded))
